"""Parts of a run: what acts on it beside the optimizers, a file per kind; `assembly` makes those of a recipe."""
