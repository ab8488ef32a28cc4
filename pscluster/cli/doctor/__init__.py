"""psctl doctor: facts are gathered, then judged by pure checks."""
