"""Weights of a bundle and the torch models that they make."""
