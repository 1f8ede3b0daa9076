"""Training steps: accumulation, precision, Accelerate's global state, compiled models; the model is left clean."""

import json

import pytest
import torch
from accelerate import Accelerator, DistributedType
from accelerate.state import AcceleratorState, GradientState, PartialState
from torch import nn
from torch.utils.data import DataLoader

import daqconvert as dq
from daqconvert.errors import DataError, TrainingError
from daqconvert.training import evaluate, finetune
from daqconvert.training.optim import Optimizers
from daqconvert.training.processes import Processes, launched
from daqconvert.training.recipes import Recipe
from helpers.clusters import Clusters

STATES = (PartialState, AcceleratorState, GradientState)


@pytest.fixture
def plain(make):
    """Make a model without dropout and with frozen statistics, so that the split of a batch does not matter."""

    def build():
        qmodel = make()
        qmodel[3].p = 0.0
        dq.calibrate(qmodel, [torch.stack([x for x, _ in Clusters()])])
        return qmodel

    return build


@pytest.fixture
def accelerator():
    yield lambda **options: Accelerator(cpu=True, **options)
    for state in STATES:
        state._shared_state.clear()


def batches(size):
    return DataLoader(Clusters(), batch_size=size, shuffle=True)


def close(a: nn.Module, b: nn.Module, atol: float = 1e-6) -> bool:
    """Whether models differ by a few roundings of float32 at most, as gradients summed in another order do."""
    return all(torch.allclose(v, b.state_dict()[k], rtol=0, atol=atol) for k, v in a.state_dict().items())


def test_accumulated_batches_are_one_batch(plain):
    whole, parts, steps = plain(), plain(), []
    options = {"epochs": 3, "batch_norm": "freeze", "lr": 0.05, "clip_grad": 0.5}
    one = finetune(whole, batches(16), **options).history
    two = finetune(parts, batches(4), accumulate=4, on_step=steps.append, **options).history
    assert close(whole, parts)
    assert not close(whole, plain())
    assert [row["step"] for row in two] == [row["step"] for row in one] == [3, 6, 9]
    assert [row["lr"] for row in two] == [row["lr"] for row in one]
    assert two[-1]["train_loss"] == pytest.approx(one[-1]["train_loss"], rel=1e-5)
    assert [step.number for step in steps] == list(range(1, 10))
    assert {step.total for step in steps} == {9}
    assert all(step.grad_norm > 0 for step in steps)


def test_the_last_group_of_an_epoch_is_a_mean_as_well(plain):
    """48 samples in batches of 16, two a step: the second step has one batch."""
    seen = []
    finetune(plain(), batches(16), epochs=2, accumulate=2, on_step=seen.append, lr=0.1, distill=0.0)
    assert [(step.number, step.epoch) for step in seen] == [(1, 1), (2, 1), (3, 2), (4, 2)]
    whole, parts = plain(), plain()
    options = {"epochs": 1, "batch_norm": "freeze", "lr": 0.05, "momentum": 0.0, "weight_decay": 0.0}
    one = finetune(whole, [(x, y) for x, y in batches(24)], **options)
    pieces = [(x[i : i + 12], y[i : i + 12]) for x, y in [(x, y) for x, y in batches(24)] for i in (0, 12)]
    assert one.history[0]["step"] == finetune(parts, pieces, accumulate=2, **options).history[0]["step"] == 2


def test_precision_of_the_forward_alone(plain, loader, val_loader):
    qmodel, seen, clean = plain(), [], plain()

    def see(module, args, output):
        if torch.is_grad_enabled() or not module.training:  # calibration sees training mode in float32
            seen.append((module.training, args[0].dtype))

    handle = qmodel[6].register_forward_hook(see)
    before = set(vars(qmodel))
    finetune(qmodel, loader(), val_loader, epochs=1, precision="bf16", distill=0.0)
    handle.remove()
    assert set(seen) == {(True, torch.bfloat16), (False, torch.float32)}
    assert {p.dtype for p in qmodel.parameters()} == {torch.float32}
    assert set(vars(qmodel)) == before
    assert "forward" not in vars(qmodel)
    assert not close(qmodel, clean)


def test_one_precision_after_another_and_nothing_stays(plain, loader):
    for precision in ("bf16", "no", "launcher", "bf16"):
        finetune(plain(), loader(), epochs=1, precision=precision)
        assert [state._shared_state for state in STATES] == [{}, {}, {}]


def test_the_launchers_words_count(plain, loader, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "3")
    seen, steps, qmodel = set(), [], plain()
    qmodel[6].register_forward_hook(lambda module, args, out: seen.add(args[0].dtype))
    finetune(qmodel, loader(), epochs=1, on_step=steps.append, distill=0.0)
    assert (seen, len(steps)) == ({torch.bfloat16}, 1)
    seen.clear()
    finetune(qmodel, loader(), epochs=1, precision="no", distill=0.0)
    assert seen == {torch.float32}


def test_the_callers_accelerator(plain, loader, accelerator):
    own = accelerator(mixed_precision="bf16", gradient_accumulation_steps=3)
    before, seen, steps, qmodel = [dict(state._shared_state) for state in STATES], set(), [], plain()
    qmodel[6].register_forward_hook(lambda module, args, out: seen.add(args[0].dtype))
    finetune(qmodel, loader(), epochs=1, accelerator=own, on_step=steps.append, distill=0.0)
    assert (seen, len(steps)) == ({torch.bfloat16}, 1)
    assert [dict(state._shared_state) for state in STATES] == before
    with pytest.raises(TrainingError, match="accelerator: has mixed_precision='bf16', the recipe precision='no'"):
        finetune(qmodel, loader(), epochs=1, accelerator=own, precision="no")
    with pytest.raises(TrainingError, match="precision='no': AcceleratorState has already been initialized"):
        finetune(qmodel, loader(), epochs=1, precision="no")
    finetune(qmodel, loader(), epochs=1)  # the caller's accelerator still exists, though it was not passed
    assert [dict(state._shared_state) for state in STATES] == before


def test_evaluation_with_an_accelerator_is_evaluation(plain, val_loader, accelerator):
    assert evaluate(plain(), val_loader, accelerator=accelerator()) == evaluate(plain(), val_loader)


def test_half_precision_needs_a_gpu(plain, loader, accelerator):
    with pytest.raises(TrainingError, match='precision="fp16": needs a GPU.*Use "bf16"'):
        finetune(plain(), loader(), epochs=1, precision="fp16")


class Scaled:
    """Stands for an accelerator in fp16; it has torch's own scaler, which works on the CPU as well."""

    num_processes, process_index, gradient_accumulation_steps, mixed_precision = 1, 0, 1, "no"
    device, distributed_type = torch.device("cpu"), DistributedType.NO

    def __init__(self):
        self.scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=2)

    def clip_grad_norm_(self, parameters, most):
        return nn.utils.clip_grad_norm_(parameters, most)


@pytest.mark.parametrize("clip", [None, 0.1])
def test_scaled_gradients(plain, clip):
    """The update is that without a scaler; infinite gradients change no parameter, and halve the scale."""
    updated = []
    for accelerator in (Scaled(), Scaled()):
        qmodel = plain()
        processes, optimizers = Processes(accelerator, qmodel), Optimizers(qmodel, Recipe(), 10)
        if updated:
            accelerator.scaler = None
        optimizers.set_step(0)
        processes.backward(qmodel(torch.ones(2, 8)).square().sum())
        norm = processes.update(optimizers, clip)
        updated.append((qmodel, norm))
    assert close(updated[0][0], updated[1][0])
    assert not close(updated[0][0], plain())
    assert updated[0][1] == pytest.approx(updated[1][1]) if clip else updated[0][1] is None
    qmodel, scaled = plain().eval(), Scaled()  # batch norms stay
    processes, optimizers = Processes(scaled, qmodel), Optimizers(qmodel, Recipe(), 10)
    processes.backward(qmodel(torch.ones(2, 8)).square().sum())
    qmodel[0].weight.grad.fill_(float("inf"))
    processes.update(optimizers, clip)
    assert close(qmodel, plain(), atol=0.0)
    state = processes.scaler_state()
    assert state["scale"] == 4.0
    other = Processes(Scaled(), qmodel)
    other.load_scaler(json.loads(json.dumps(state)))
    assert other.scaler_state() == state


def test_processes_that_accelerate_does_not_know(plain, monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 3)
    told = "there are 3 processes, and Accelerate knows of 1"
    with pytest.raises(TrainingError, match=told), launched(plain(), Recipe()):
        pass


def test_a_compiled_model(plain, loader, val_loader, tmp_path):
    eager, compiled = plain(), plain()
    compiled.compile(backend="eager")
    for qmodel, name in ((eager, "eager"), (compiled, "compiled")):
        finetune(qmodel, loader(), val_loader, epochs=2, lr=0.05, distill=0.0, out_dir=tmp_path / name)
    assert close(eager, compiled, atol=1e-5)
    finetune(plain(), loader(), val_loader, epochs=2, lr=0.05, distill=0.0, out_dir=tmp_path / "compiled", resume=True)


def test_a_float64_model_stays_so(plain, loader):
    qmodel = plain().double()
    data = [(x.double(), y) for x, y in loader()]
    finetune(qmodel, data, epochs=1)
    assert {p.dtype for p in qmodel.parameters()} == {torch.float64}


def test_a_batch_of_size_0_is_refused_by_name():
    qmodel, x, y = dq.quantize(nn.Linear(4, 2)), torch.randn(4, 4), torch.tensor([0, 1, 0, 1])
    with pytest.raises(DataError, match="epoch 1, step 2 of 2: expected a batch with inputs, found one of size 0"):
        finetune(qmodel, [(x, y), (x[:0], y[:0])], epochs=1, progress=False)
