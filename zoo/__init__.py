"""What a model is: networks, gates, paths, attacks, evaluation, export, bundles and the hub."""
