"""The domain of the master as immutable values: jobs, plans, processes, nodes, snapshots."""
