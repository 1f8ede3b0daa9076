"""When something of a run begins or ends: shares of its steps."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from daqconvert.errors import TrainingError

if TYPE_CHECKING:
    from daqconvert.training.engine import Run


def steps_until(run: Run, share: float, field: str) -> int:
    """Return how many optimizer steps lie before a share of a run: `floor(share * total)`, all of them at share 1.

    Args:
        run: The run.
        share: From 0 to 1.
        field: Of the recipe, for the message.

    Raises:
        TrainingError: If the length of the run is unknown.
    """
    total = run.total_steps
    if not total:
        raise TrainingError(
            f"{field}: is a share of the run, and train_loader has no length, so nobody knows when that is. Give the "
            f"loader a __len__, or leave {field} out."
        )
    return math.floor(share * total + 1e-9)  # 0.3 * 10 is 3 steps, whatever 0.3 is in binary
