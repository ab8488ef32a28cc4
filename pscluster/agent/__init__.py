"""What both agents share: attending the master, starting and ending processes, relaying what they say.

`pscluster.agent.link` is the other end: what a trainer or partition holds to speak with its agent. Nothing
here imports torch, and this package file imports nothing, so that a started process is under control before
its slow imports.
"""
