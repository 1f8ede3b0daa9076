"""Runs of earlier versions, whose recipes had fewer fields."""

from __future__ import annotations

from collections.abc import Mapping
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


def completed(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a run's recipe with those that it was written before.

    Args:
        fields: As they were written.

    Example:
        >>> completed({"final_a_sigma": 2.0})["final_sigma_bits"], completed({})["final_sigma_bits"]
        (2, 1)
    """
    found = {**BEFORE, **fields}
    if not (found["final_w_sigma"] or found["final_a_sigma"]):  # nothing sharpened: today's default is as true
        found["final_sigma_bits"] = fields.get("final_sigma_bits", 1)
    return found
