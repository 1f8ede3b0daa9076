"""Runs of earlier versions, whose recipes had fewer fields."""

from __future__ import annotations

from typing import Any

BEFORE: dict[str, Any] = {
    "final_w_sigma": 0.0,
    "final_a_sigma": 0.0,
    "final_sigma_bits": 2,
    "gptq": 0,
    "lr_unit": "absolute",
    "reconstruct": 0,
    "reconstruct_batches": 32,
}
"""What a run had that was written before a field was there."""
