"""Comparing the checkpoints of two runs."""

import torch

from daqconvert.training.checkpoint import read_checkpoint


def same(a, b) -> bool:
    """All tensors of two checkpoints, model and optimizers, are identical, and so are the measured values."""
    first, second = read_checkpoint(a), read_checkpoint(b)
    assert first.tensors.keys() == second.tensors.keys()
    timing = ("seconds", "images_per_second")
    rows = [[{k: v for k, v in row.items() if k not in timing} for row in c.meta["history"]] for c in (first, second)]
    return rows[0] == rows[1] and all(torch.equal(v, second.tensors[k]) for k, v in first.tensors.items())
