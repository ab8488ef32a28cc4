"""One step of a partition: gradients summed, voted on, committed, applied."""
