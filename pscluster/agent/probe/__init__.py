"""Measurements that the master orders: the connection to another node, and how fast this node computes.

`prober` answers the orders, `pairs` and `session` measure a connection, `compute` a node's devices."""
