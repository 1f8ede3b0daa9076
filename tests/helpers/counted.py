"""What the counter of multiply-accumulates sees of one run."""

import torch

from daqconvert.macs import counting


def events_of(model, *args):
    """Run a model without gradients and return every product that was counted."""
    with torch.no_grad(), counting(model, args) as counter:
        model(*args)
    return counter.events
