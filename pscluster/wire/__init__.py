"""The data plane: frames, their bodies, connections, and the event loop that drives them."""
