"""What arrives at a partition: the handshake, checked frames, connected clients."""
