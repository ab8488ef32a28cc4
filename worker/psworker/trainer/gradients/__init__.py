"""From the gradients of autograd to frames for each partition."""
