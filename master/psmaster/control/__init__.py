"""The one loop that owns the state of the master: inputs in, one durable transaction at a time."""
