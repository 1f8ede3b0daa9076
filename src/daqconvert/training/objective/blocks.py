"""Which outputs teach a network that nobody has named any of: its blocks'.

A block is an innermost module with two quantized layers or more below it, as a residual block, an inverted residual,
an attention or an MLP. Layers outside of all blocks count too, but for the first, which sees what the teacher's sees,
and the last, whose output are the logits.
"""

from __future__ import annotations

from torch import nn

from daqconvert.layers.base import QuantizedLayer
from daqconvert.models import quantized_layers


def block_names(model: nn.Module) -> list[str]:
    """Return the names of a quantized model's blocks and of the layers between them, in the model's order.

    Args:
        model: From `quantize`.

    Example:
        >>> block = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
        >>> block_names(dq.quantize(nn.Sequential(nn.Linear(4, 4), block, nn.Linear(4, 4), nn.Linear(4, 2))))
        ['1', '2']
    """
    sites = quantized_layers(model)
    below: dict[str, int] = {}
    for name in sites:
        parts = name.split(".")
        for depth in range(1, len(parts)):
            above = ".".join(parts[:depth])
            below[above] = below.get(above, 0) + 1
    several = [name for name, count in below.items() if count > 1]
    blocks = {name for name in several if not any(other.startswith(f"{name}.") for other in several)}
    ends = {next(iter(sites)), next(reversed(sites))} if sites else set()
    for name, site in sites.items():
        inside = any(name.startswith(f"{block}.") for block in blocks)
        if isinstance(site, QuantizedLayer) and not inside and name not in ends:
            blocks.add(name)
    return [name for name, _ in model.named_modules() if name in blocks]
