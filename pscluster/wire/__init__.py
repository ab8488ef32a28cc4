"""How tensors move between processes: frames, connections, the loop that drives them."""
