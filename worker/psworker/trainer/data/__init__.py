"""From the task of the user and (step, shard) to a batch."""
