"""A partition and its standby: the same sums and decisions, step by step."""
