"""What both agents share: the stream to the master, the processes of the node, and what these report.

`pscluster.agent.link` is the other end: a trainer's or partition's connection to its agent. Nothing here imports torch,
and this package file imports nothing, so that a started process is under control before its slow imports.
"""
