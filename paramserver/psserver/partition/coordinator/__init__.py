"""The coordinator of a job, partition 0: collects votes, decides, reports."""
