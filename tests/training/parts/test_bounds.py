import pytest
import torch

import daqconvert as dq
from daqconvert.errors import TrainingError
from daqconvert.training.optim import parameter_groups


@pytest.mark.parametrize("optimizer", ["adam", "sgd", "lamb"])
def test_bounds_stay_where_they_are_from_their_step_on(make, loader, optimizer):
    qmodel, seen = make(), []
    dq.finetune(
        qmodel, loader(), epochs=2, freeze_bounds_at=0.5, quantizer_lr=0.01, quantizer_optimizer=optimizer,
        quantizer_weight_decay=0.1, clip_grad=1.0, progress=False,
        on_step=lambda step: seen.append({k: v.detach().clone() for k, v in qmodel.state_dict().items()}),
    )  # fmt: skip
    groups = parameter_groups(qmodel)

    def moved(group, i):
        return [k for k in groups[group] if not torch.equal(seen[i][k], seen[i - 1][k])]

    assert [bool(moved("quantizers", i)) for i in range(1, 6)] == [True, True, False, False, False]
    assert all(moved("weights", i) for i in range(1, 6))


@pytest.mark.parametrize("field", ["freeze_bounds_at", "batch_norm_freeze_at"])
def test_a_share_of_an_unknown_length_is_an_error(make, loader, field):
    class Stream:
        def __iter__(self):
            return iter(loader())

    with pytest.raises(TrainingError, match=f"{field}: is a share of the run, and train_loader has no length"):
        dq.finetune(make(), Stream(), epochs=1, schedule="constant", progress=False, **{field: 0.5})
