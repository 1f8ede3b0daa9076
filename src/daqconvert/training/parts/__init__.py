"""Parts of a run: what acts on it beside the optimizers, each a file of its own, in one order (`assembly`)."""
