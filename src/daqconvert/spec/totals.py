"""The sizes of a whole plan: `Totals`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from daqconvert.spec.row import PlanRow


@dataclass(frozen=True)
class Totals:
    """Sums over the rows of a plan; unknown values are left out, and `unknown_macs` and `unknown_bytes` count them.

    Attributes:
        sites: Number of sites.
        converted: Number of quantized sites.
        params: Number of elements of the sites' parameters, and of parameters and buffers outside the sites.
        macs: Multiply-accumulates at batch size 1; None if all are unknown.
        bops: Bit operations, `MACs * w_bits * a_bits`; None if all are unknown.
        float_bops: Bit operations with 32 bits everywhere; None if all are unknown.
        bytes: Bytes of all parameters at the planned bits, float32 outside the sites.
        float_bytes: Bytes of all parameters in float32.
        scale_bytes: Bytes of scales and zero points, which `bytes` does not include.
        unknown_macs: Number of sites whose MACs are unknown.
        unknown_bytes: Number of sites whose size is unknown.

    Example:
        >>> Totals.of((), other_params=3).bytes
        12
    """

    sites: int
    converted: int
    params: int
    macs: int | None
    bops: int | None
    float_bops: int | None
    bytes: int
    float_bytes: int
    scale_bytes: int
    unknown_macs: int
    unknown_bytes: int

    @classmethod
    def of(cls, rows: Sequence[PlanRow], other_params: int) -> Totals:
        """Return the sums of these rows.

        Args:
            rows: Rows of a plan.
            other_params: Number of elements of the parameters and buffers outside the sites.
        """
        scale_bytes = sum(row.scale_bytes for row in rows)
        rows = [row for row in rows if not row.site.is_output]
        return cls(
            sites=len(rows),
            converted=sum(row.converted for row in rows),
            params=sum(row.site.params for row in rows) + other_params,
            macs=_known(row.site.macs for row in rows),
            bops=_known(row.bops for row in rows),
            float_bops=_known(row.float_bops for row in rows),
            bytes=(_known(row.weight_bytes for row in rows) or 0) + 4 * other_params,
            float_bytes=(_known(row.float_bytes for row in rows) or 0) + 4 * other_params,
            scale_bytes=scale_bytes,
            unknown_macs=sum(row.site.macs is None for row in rows),
            unknown_bytes=sum(row.float_bytes is None for row in rows),
        )


def _known(values: Iterable[int | None]) -> int | None:
    """Return the sum of the known values; None if no value is known."""
    known = [value for value in values if value is not None]
    return sum(known) if known else None
