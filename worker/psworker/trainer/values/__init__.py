"""Values from the partitions to the memory of the model."""
