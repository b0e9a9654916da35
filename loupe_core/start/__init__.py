"""How a training begins: the backbone, the first classifier, the optimizer's groups, the choice of a recipe."""
