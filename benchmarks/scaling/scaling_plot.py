"""The plot of `scaling.py`: time and memory of a training step against depth, width and batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.scaling.scaling_steps import CONTENDERS, points

PARTS = ("depth", "width", "batch")
ROWS = {"time": "ms a step", "memory": "MB in tensors, peak"}
COLORS = {"ours": "#1f5fa8", "float": "#888888"}
LABELS = {"ours": "W4A4", "float": "float"}


def draw(parts: dict[str, Any], path: Path) -> None:
    """Write the plot of what has been measured.

    Args:
        parts: Records by part.
        path: Of a `.png` file; whole or not at all.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(2, 3, figsize=(12, 6.5), layout="constrained")
    for column, part in enumerate(PARTS):
        for row, (quantity, label) in enumerate(ROWS.items()):
            panel = axes[row][column]
            panel.set_title(part if row == 0 else "", fontsize=11)
            panel.set_ylabel(label if column == 0 else "")
            if part in parts:
                _panel(panel, parts[part], quantity)
    temporary = path.with_suffix(".tmp.png")
    figure.savefig(temporary, dpi=110)
    plt.close(figure)
    temporary.replace(path)


def _panel(panel: Any, record: dict[str, Any], quantity: str) -> None:
    for name in CONTENDERS:
        x, y = points(record["rows"], name, quantity)
        fit = record["lines"][name][quantity]
        ends = np.array([0.0, x.max()])
        panel.plot(ends, fit["slope"] * ends + fit["start"], color=COLORS[name], linewidth=1)
        panel.plot(x, y, "o", color=COLORS[name], label=f"{LABELS[name]}, line R2 = {fit['r2']:.4f}")
    panel.set_xlabel(record["axes"][quantity])
    panel.set_xlim(left=0)
    panel.set_ylim(bottom=0)
    panel.grid(alpha=0.3)
    panel.legend(fontsize=8, loc="upper left")
