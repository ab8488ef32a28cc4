"""A job's spec and its code bundle."""
