"""How a model gets its weights: objectives, recipes, one loop."""
