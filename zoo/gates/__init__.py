"""Random gated networks: template, bank, paths and the networks derived from them."""
