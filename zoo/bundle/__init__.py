"""A bundle: card, weights, graphs and the page beside them. No torch."""
