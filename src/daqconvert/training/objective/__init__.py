"""The loss that training minimizes.

    loss = (1 - distill) * hard(z, y) + distill * T^2 * KL(softmax(z_teacher / T) || softmax(z / T))
           + feature_weight * features

`hard` is the cross entropy or the user's `loss_fn`, with mixed targets if inputs are mixed; `T` is the temperature;
`features` is in `features.py`. A part with weight 0 is not computed. The teacher is the user's, or a float copy of the
model as it was before the first step.
"""

from daqconvert.training.objective.loss import Objective
from daqconvert.training.objective.teacher import (
    NO_TEACHER,
    OWN_TEACHER,
    check_teacher,
    is_taught,
    teacher_kind,
)

__all__ = ["NO_TEACHER", "OWN_TEACHER", "Objective", "check_teacher", "is_taught", "teacher_kind"]
