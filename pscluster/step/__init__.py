"""The definition of a step, shared by all processes: tree, layout, sampling, codec, summary."""
