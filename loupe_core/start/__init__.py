"""How a training begins: the first classifier, the optimizer's groups, the choice of a recipe."""
