"""gRPC: the same protocol on another port."""
