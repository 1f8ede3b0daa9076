"""Who may teach, and how a checkpoint names the teacher."""

import pytest
from torch import nn

from daqconvert.errors import TrainingError
from daqconvert.training import Recipe
from daqconvert.training.objective import (
    NO_TEACHER,
    OWN_TEACHER,
    check_teacher,
    teacher_kind,
)


def test_who_teaches(make, make_float):
    qmodel, features = make(), Recipe(distill=0.0, features=("4",))
    assert teacher_kind(None, features) == OWN_TEACHER
    assert teacher_kind(None, Recipe(distill=0.0)) == NO_TEACHER
    check_teacher(make_float(), qmodel, features)
    with pytest.raises(TrainingError, match="no effect.*no features"):
        check_teacher(make_float(), qmodel, Recipe(distill=0.0))
    with pytest.raises(TrainingError, match='features: "layer4" matches no module'):
        check_teacher(None, qmodel, Recipe(features=("layer4",)))
    with pytest.raises(TrainingError, match="'4' is a module of the model, but not of the teacher"):
        check_teacher(nn.Sequential(nn.Linear(8, 3)), qmodel, features)
