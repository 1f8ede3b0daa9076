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
    sharpened = fields.get("final_w_sigma") or fields.get("final_a_sigma")
    bits = {} if sharpened else {"final_sigma_bits": 1}  # where nothing sharpened, today's default is as true
    return {**BEFORE, **bits, **fields}
