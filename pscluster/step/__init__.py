"""What a step is, to every process: tree, layout, sampling, codec, summary."""
