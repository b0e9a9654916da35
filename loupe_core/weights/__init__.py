"""Weights that travel with the package, and the backbone that they are of."""
