"""One training step of a residual network whose depth, width or batch grows by 8: time, and memory in tensors.

The network: a 3x3 stem, `blocks` residual blocks of two 3x3 convolutions with batch norm at `width` channels and
16 px, mean, linear. One fixed batch, SGD. `float` is the network itself; `ours` is the same at W4A4 with the default
policy, calibrated on the batch. The cost of a step should be linear:

    depth    time and memory in the number of blocks
    batch    time and memory in the number of images
    width    time in multiply-accumulates; memory in elements: inputs of each convolution, and its weights
"""

from __future__ import annotations

import gc
import math
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import daqconvert as dq
from benchmarks.qat import qat_memory

PIXELS, CLASSES = 16, 10
FACTORS = (1, 2, 4, 8)
CONTENDERS = ("ours", "float")
LEARNING_STEPS, LEARNING_RATE = 8, 0.02


@dataclass(frozen=True)
class Size:
    """How large a network and its batch are."""

    blocks: int = 4
    width: int = 32
    batch: int = 16

    @property
    def macs(self) -> int:
        """Multiply-accumulates of one forward."""
        area, weights = PIXELS * PIXELS, (3 + 2 * self.blocks * self.width) * self.width * 9
        return self.batch * (area * weights + self.width * CLASSES)

    @property
    def elements(self) -> int:
        """Elements that enter each layer, and weights."""
        area, weights = PIXELS * PIXELS, (3 + 2 * self.blocks * self.width) * self.width * 9
        return self.batch * (area * (3 + 2 * self.blocks * self.width) + self.width) + weights + self.width * CLASSES


BASES = {"depth": Size(blocks=2), "width": Size(blocks=2, width=16), "batch": Size(batch=8)}
"""What grows from where: `blocks` from 2 to 16, `width` from 16 to 128, `batch` from 8 to 64."""
FIELDS = {"depth": "blocks", "width": "width", "batch": "batch"}
AXES: dict[str, dict[str, tuple[str, Callable[[Size], float]]]] = {
    "depth": dict.fromkeys(("time", "memory"), ("residual blocks", lambda size: size.blocks)),
    "width": {
        "time": ("10^9 multiply-accumulates of a forward", lambda size: size.macs / 1e9),
        "memory": ("10^6 elements of inputs and weights", lambda size: size.elements / 1e6),
    },
    "batch": dict.fromkeys(("time", "memory"), ("images", lambda size: size.batch)),
}


def sizes(part: str) -> list[Size]:
    """Return the four sizes of a part."""
    base, field = BASES[part], FIELDS[part]
    return [replace(base, **{field: getattr(base, field) * factor}) for factor in FACTORS]


class Block(nn.Module):
    """Two convolutions with batch norm, and a shortcut."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        """Return `relu(block(x) + x)`."""
        return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))) + x)


class Residual(nn.Module):
    """Stem, blocks, mean, linear."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, size.width, 3, padding=1), nn.BatchNorm2d(size.width), nn.ReLU())
        self.blocks = nn.Sequential(*(Block(size.width) for _ in range(size.blocks)))
        self.head = nn.Linear(size.width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits."""
        return self.head(self.blocks(self.stem(x)).mean(dim=(2, 3)))


def stepper(contender: str, size: Size) -> Callable[[], float]:
    """Build a network and its batch; return one training step of it, which returns the loss."""
    torch.manual_seed(0)
    model: nn.Module = Residual(size)
    images, targets = torch.randn(size.batch, 3, PIXELS, PIXELS), torch.randint(CLASSES, (size.batch,))
    if contender == "ours":
        model = dq.quantize(model, w_bits=4, a_bits=4)
        dq.calibrate(model, [images])
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)

    def step() -> float:
        optimizer.zero_grad(set_to_none=True)
        loss = F.cross_entropy(model(images), targets)
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    return step


def check(contender: str, size: Size, step: Callable[[], float]) -> list[float]:
    """Return the losses of the first steps.

    Raises:
        SystemExit: If they are not finite or do not fall.
    """
    losses = [step() for _ in range(LEARNING_STEPS)]
    if not all(map(math.isfinite, losses)) or min(losses[-3:]) >= losses[0]:
        raise SystemExit(f"{contender}, {size}: the loss does not fall: {[round(loss, 4) for loss in losses]}")
    return losses


def measure(part: str, rounds: int, seed: int, tick: Callable[[str], None]) -> dict[str, Any]:
    """Return times and memory of all sizes of a part, the straight lines through them, and ratios to float.

    Args:
        part: Key of `BASES`.
        rounds: Rounds; in each, every contender makes one step at every size, in a random order.
        seed: Seed of the order.
        tick: Called with a word after each piece of work; there are `pieces(rounds)`.
    """
    qat_memory.self_check()
    order = [(name, size) for size in sizes(part) for name in CONTENDERS]
    steps: dict[tuple[str, Size], Callable[[], float]] = {}
    losses = {}
    for name, size in order:
        steps[name, size] = stepper(name, size)
        losses[name, size] = check(name, size, steps[name, size])
        tick(f"{name} learns")
    seconds: dict[tuple[str, Size], list[float]] = {key: [] for key in order}
    draw = random.Random(seed)
    for _ in range(rounds):
        for key in draw.sample(order, len(order)):
            gc.collect()
            start = time.perf_counter()
            steps[key]()
            seconds[key].append(time.perf_counter() - start)
        tick("a round")
    steps.clear()
    rows = []
    for name, size in order:
        memory = qat_memory.peak_of_last_step(lambda name=name, size=size: stepper(name, size), steps=3)
        found, first = seconds[name, size], losses[name, size]
        rows.append(
            {
                "contender": name, "blocks": size.blocks, "width": size.width, "batch": size.batch,
                "x": {quantity: of(size) for quantity, (_, of) in AXES[part].items()},
                "time_ms": round(statistics.median(found) * 1e3, 3), "all_ms": [round(s * 1e3, 2) for s in found],
                "memory_mb": round(memory["peak_bytes"] / 1e6, 4), "loss": [round(first[0], 4), round(first[-1], 4)],
            }
        )  # fmt: skip
        tick(f"memory of {name}")
    return {
        "axes": {quantity: label for quantity, (label, _) in AXES[part].items()},
        "lines": {name: {q: line(rows, name, q) for q in ("time", "memory")} for name in CONTENDERS},
        "ratios": {
            quantity: [
                round(mine[key] / other[key], 3) for mine, other in zip(rows[::2], rows[1::2], strict=True)
            ]
            for quantity, key in KEYS.items()
        },
        "rows": rows,
    }  # fmt: skip


KEYS = {"time": "time_ms", "memory": "memory_mb"}


def pieces(rounds: int) -> int:
    """Return how often `measure` calls its `tick`."""
    return 2 * len(CONTENDERS) * len(FACTORS) + rounds


def points(rows: list[dict[str, Any]], contender: str, quantity: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the points `(x, y)` of a contender's measurements of a quantity."""
    own = [row for row in rows if row["contender"] == contender]
    return np.array([row["x"][quantity] for row in own]), np.array([row[KEYS[quantity]] for row in own])


def line(rows: list[dict[str, Any]], contender: str, quantity: str) -> dict[str, float]:
    """Return the line of least squares, and R^2, the share of the variance that it explains."""
    x, y = points(rows, contender, quantity)
    slope, start = np.polyfit(x, y, 1)
    rest = float(((y - (slope * x + start)) ** 2).sum() / ((y - y.mean()) ** 2).sum())
    return {"slope": round(float(slope), 6), "start": round(float(start), 4), "r2": round(1.0 - rest, 5)}
