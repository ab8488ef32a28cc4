"""What a job is: its spec and its code bundle."""
