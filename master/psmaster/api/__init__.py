"""What agents and clients reach the master by: gRPC services, HTTP, and the conversion of their messages."""
