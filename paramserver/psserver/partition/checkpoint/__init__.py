"""Snapshots of a partition: frozen, written in the background, restored."""
