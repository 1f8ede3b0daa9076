"""Comparing the checkpoints of two runs."""

import torch

from daqconvert.training.checkpoint import read_checkpoint


def same(a, b) -> bool:
    """Return whether all tensors of two checkpoints and all measured values are identical."""
    first, second = read_checkpoint(a), read_checkpoint(b)
    assert first.tensors.keys() == second.tensors.keys()
    timing = ("seconds", "images_per_second")
    rows = [[{k: v for k, v in row.items() if k not in timing} for row in c.meta["history"]] for c in (first, second)]
    return rows[0] == rows[1] and all(torch.equal(v, second.tensors[k]) for k, v in first.tensors.items())
