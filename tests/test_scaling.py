"""The work of `quantize` and `calibrate` is linear in the size of the model, and `quantize` makes one copy of it.

Work is counted in calls, not in seconds, so it is the same on every machine. A count that is linear in the depth grows
twice as much from 12 to 24 blocks as from 6 to 12; one with a quadratic part grows more.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torch.nn import functional as F

import daqconvert as dq
from daqconvert.graph.sites import _behind
from helpers.memory import in_tensors, size

WIDTH = 16
IMAGE = torch.zeros(1, 3, 32, 32)
ROWS = torch.zeros(2, WIDTH)
STRAIGHT = 2.02  # 2 is linear; the rest allows for what Python caches

Run = Callable[[int], Callable[[], Any]]
"""Depth -> what is run."""

# ------------------------------------------------------------------------------------------------------------- calls


def calls(run: Callable[[], Any]) -> int:
    """Number of calls of Python functions and of C functions."""
    count = 0

    def note(frame: Any, event: str, argument: Any) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    before = sys.getprofile()
    gc.collect()  # what earlier tests left is finalized now, not while calls are counted
    gc.disable()
    sys.setprofile(note)
    try:
        run()
    finally:
        sys.setprofile(before)
        gc.enable()
    return count


def growth(run: Run, without: Run | None = None) -> float:
    """How much more the calls grow from 12 to 24 blocks than from 6 to 12.

    Args:
        run: Depth -> what is counted.
        without: Depth -> a part of it that does not count: what torch does.
    """
    run(2)()  # what is computed once a process
    few, more, most = (calls(run(depth)) - (calls(without(depth)) if without else 0) for depth in (6, 12, 24))
    return (most - more) / (more - few)


class Functional(nn.Module):
    """Multiplies by a parameter of its own, by a layer's weight, and by a table of constants."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(WIDTH, WIDTH) / WIDTH)
        self.fc = nn.Linear(WIDTH, WIDTH)
        self.register_buffer("table", torch.arange(WIDTH).float())

    def forward(self, x):
        return F.linear(F.linear(x, self.kernel) + self.table.view(-1) * 2, self.fc.weight)


class Untraceable(nn.Module):
    """Branches on values, so that fx cannot trace it, and uses the weights of layers in its own calls."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.other = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.kernel = nn.Parameter(torch.randn(WIDTH, WIDTH) / WIDTH)

    def forward(self, x):
        return self.fc(x) @ self.kernel if x.sum() > 0 else F.linear(x, self.other.weight)


def vit(depth: int) -> nn.Module:
    return VisionTransformer(
        img_size=32, patch_size=16, embed_dim=WIDTH, depth=depth, num_heads=2, num_classes=4, init_values=0.1
    )


def attention(depth: int) -> nn.Module:
    return nn.Sequential(*(nn.TransformerEncoderLayer(WIDTH, 2, WIDTH, batch_first=True) for _ in range(depth)))


def chain(block: Callable[[], nn.Module]) -> Callable[[int], nn.Module]:
    return lambda depth: nn.Sequential(*(block() for _ in range(depth)))


def conv() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU())


def in_place() -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(inplace=True))


MODELS = {
    "vit": (vit, IMAGE),
    "in place": (chain(in_place), ROWS),
    "convolutions": (chain(conv), IMAGE),
    "attention": (attention, ROWS[None]),
    "functional": (chain(Functional), ROWS),
    "untraceable": (chain(Untraceable), ROWS),
}


@pytest.mark.parametrize("kind", MODELS)
def test_the_work_of_quantize_is_a_straight_line_in_the_depth(kind):
    make, inputs = MODELS[kind]

    def run(depth):
        model = make(depth).eval()
        return lambda: dq.quantize(model, w_bits=4, a_bits=4, example_inputs=inputs)

    assert growth(run) < STRAIGHT


@pytest.mark.parametrize("kind", ["bits", "exclude", "include", "toml"])
def test_a_policy_with_a_line_for_every_layer_takes_no_longer(kind, tmp_path):
    def run(depth):
        model = chain(lambda: nn.Linear(WIDTH, WIDTH))(depth)
        names = [str(i) for i in range(depth)]
        if kind == "toml":
            path = tmp_path / f"{depth}.toml"
            path.write_text(dq.plan(model, bits={name: 2 + i % 5 for i, name in enumerate(names)}).to_toml())
            return lambda: dq.plan(model, policy=path)
        given = {name: 2 + i % 5 for i, name in enumerate(names)} if kind == "bits" else names[:-1]
        return lambda: dq.plan(model, **{kind: given})

    assert growth(run) < STRAIGHT


@pytest.mark.parametrize("kind", MODELS)
def test_the_work_of_calibrate_is_a_straight_line_in_the_depth(kind):
    make, inputs = MODELS[kind]

    def run(depth):
        qmodel = dq.quantize(make(depth).eval(), w_bits=4, a_bits=4)
        return lambda: dq.calibrate(qmodel, [inputs, inputs])

    assert growth(run) < STRAIGHT


def test_the_work_of_load_float_is_a_straight_line_in_the_depth():
    def of(load):
        def run(depth):
            model = vit(depth)
            qmodel, state = dq.quantize(model), model.state_dict()
            return lambda: load(qmodel, state)

        return run

    assert growth(of(dq.load_float), of(lambda qmodel, state: qmodel.load_state_dict(state, strict=False))) < STRAIGHT


def test_a_network_may_be_deeper_than_pythons_recursion():
    """Each activation changes its input in place, so that every node is asked what it is."""
    depth = sys.getrecursionlimit()
    model = nn.Sequential(*(m for _ in range(depth) for m in (nn.Linear(2, 2), nn.ReLU(inplace=True))))
    plan = dq.plan(model, w_bits=4, a_bits=4)
    assert (plan.order, len(plan)) == ("fx", depth)
    assert [row.signed for row in plan] == [None] + [False] * (depth - 1)


def test_late_names_stand_behind_the_last_of_their_module():
    """The fast way must give the same order as searching the list for each name."""

    def plainly(order: list[str], late: list[tuple[str, str]]) -> list[str]:
        order = list(order)
        for name, module in late:
            inside = [i for i, other in enumerate(order) if other.startswith(f"{module}." if module else "")]
            order.insert(inside[-1] + 1 if inside else len(order), name)
        return order

    draw = torch.Generator().manual_seed(0)

    def number(below: int) -> int:
        return int(torch.randint(below, (), generator=draw))

    for _ in range(200):
        paths = [".".join("ab"[number(2)] for _ in range(number(4))) for _ in range(12)]
        names = [f"{path}.{i}".lstrip(".") for i, path in enumerate(paths)]
        known = number(8)
        late = list(zip(names, paths, strict=True))[known:]
        assert _behind(names[:known], late) == plainly(names[:known], late)
    assert _behind([""], [("w", "")]) == ["", "w"]


# ------------------------------------------------------------------------------------------------------------ memory


@pytest.mark.parametrize("bits", [1, 4, 8])
def test_quantize_makes_one_copy_and_little_besides(bits):
    """Finding sites copies no parameter, and what is computed for one layer is not kept."""
    model = chain(lambda: nn.Linear(512, 512))(20)
    copy = size(model.state_dict().values())
    assert in_tensors(lambda: dq.plan(model))[0] < 0.01 * copy
    most, left = in_tensors(lambda: dq.quantize(model, w_bits=bits, a_bits=4, first=None, last=None))
    assert copy <= left < 1.02 * copy
    assert most < 1.15 * copy


class Buffered(Functional):
    """With a large buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("cache", torch.zeros(1 << 18))


def test_what_quantize_looks_at_is_gone_when_it_returns():
    """Buffers are copied before tracing, because code may write into them; the copy is freed without the collector."""
    model = chain(Buffered)(4)
    copy = size(model.state_dict().values())
    most, left = in_tensors(lambda: dq.plan(model))
    assert most < 1.1 * copy
    assert left < 0.02 * copy
    most, left = in_tensors(lambda: dq.quantize(model))
    assert most < 2.1 * copy
    assert left < 1.02 * copy


def test_the_memory_of_calibrate_does_not_grow_with_batches_or_images():
    model = chain(conv)(4)
    qmodel = dq.quantize(model)

    def most(count: int, images: int) -> int:
        batches = [torch.randn(images, 3, 96, 96) for _ in range(count)]
        with torch.no_grad():
            plain = in_tensors(lambda: [model(batch) for batch in batches[:1]])[0]
        return in_tensors(lambda: dq.calibrate(qmodel, batches))[0] - plain

    few = most(1, 16)
    assert most(4, 16) < 1.1 * few + 1e5
    assert most(1, 64) < 1.5 * few + 1e5  # at most a copy of the sample: no copy of the input
