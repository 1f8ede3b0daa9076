"""Parts of a run: what acts on it beside the optimizers. `assembly` makes them, in the order in which they act."""
