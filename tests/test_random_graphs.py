"""Random programs of layers, calls with bare parameters, adds, concats and reuse: exact from `quantize` to `load`."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import daqconvert as dq
from daqconvert.models import quantized_sites

WIDTH, SIDE = 4, 5
IMAGE_STEPS = ("conv", "depthwise", "call", "relu", "pool", "norm", "add", "concat", "again")
VECTOR_STEPS = ("linear", "call", "matmul", "einsum", "left", "raw", "relu", "sigmoid", "add", "concat", "again")
Step = tuple[str, int, int]
steps = [
    st.tuples(st.sampled_from(names), st.integers(0, 9), st.integers(0, 9)) for names in (IMAGE_STEPS, VECTOR_STEPS)
]
programs = st.tuples(st.lists(steps[0], max_size=5), st.lists(steps[1], max_size=5))


class Program(nn.Module):
    """Runs a list of steps on images, then one on vectors; every step reads earlier values and leaves one more.

    Args:
        images: Steps, each a name and the numbers of the values that it reads.
        vectors: Steps of the same form that follow after the images are averaged to vectors.
    """

    def __init__(self, images: list[Step], vectors: list[Step]) -> None:
        super().__init__()
        self.images, self.vectors = tuple(images), tuple(vectors)
        self.stem, self.head = nn.Conv2d(3, WIDTH, 3, padding=1), nn.Linear(WIDTH, 2)
        self.layers = nn.ModuleDict()
        for part, program in (("image", images), ("vector", vectors)):
            for number, (kind, _, _) in enumerate(program):
                self.add(kind, f"{part}{number}", part == "image")

    def add(self, kind: str, key: str, image: bool) -> None:
        """Add the layer or parameter of one step."""
        layers = {
            "conv": lambda: nn.Conv2d(WIDTH, WIDTH, 3, padding=1),
            "depthwise": lambda: nn.Conv2d(WIDTH, WIDTH, 3, padding=1, groups=WIDTH, bias=False),
            "norm": lambda: nn.BatchNorm2d(WIDTH),
            "linear": lambda: nn.Linear(WIDTH, WIDTH),
            "raw": lambda: nn.Linear(WIDTH, WIDTH),
            "concat": lambda: nn.Conv2d(2 * WIDTH, WIDTH, 1) if image else nn.Linear(2 * WIDTH, WIDTH),
        }
        if kind in layers:
            self.layers[key] = layers[kind]()
        elif kind in ("call", "matmul", "einsum", "left"):
            shape = (WIDTH, WIDTH, 3, 3) if image else (WIDTH, WIDTH)
            self.register_parameter(f"kernel_{key}", nn.Parameter(torch.randn(shape)))

    def forward(self, x: Tensor) -> Tensor:
        values = [self.stem(x)]
        for number, step in enumerate(self.images):
            values.append(self.step(f"image{number}", step, values))
        values = [values[-1].mean((2, 3))]
        for number, step in enumerate(self.vectors):
            values.append(self.step(f"vector{number}", step, values))
        return self.head(values[-1])

    def step(self, key: str, step: Step, values: list[Tensor]) -> Tensor:
        """Compute one step."""
        kind, first, second = step
        x, y = values[-1 - first % len(values)], values[-1 - second % len(values)]
        match kind:
            case "relu":
                return torch.relu(x)
            case "sigmoid":
                return x.sigmoid()
            case "pool":
                return F.max_pool2d(x, 3, 1, 1)
            case "add":
                return x + y
            case "again":
                return self.again(x, key.startswith("image"))
            case "concat":
                return self.layers[key](torch.cat([x, y], dim=1))
            case "raw":
                return F.linear(x, self.layers[key].weight, self.layers[key].bias)
        if kind in ("conv", "depthwise", "norm", "linear"):
            return self.layers[key](x)
        kernel = getattr(self, f"kernel_{key}")
        if key.startswith("image"):
            return F.conv2d(x, kernel, padding=1)
        if kind == "einsum":
            return torch.einsum("bi,io->bo", x, kernel)
        if kind == "left":
            return (kernel @ x.t()).t()
        return x @ kernel if kind == "matmul" else F.linear(x, kernel)

    def again(self, x: Tensor, image: bool) -> Tensor:
        """Use a layer once more: the stem on images, the head's weight on vectors."""
        if image:
            return self.stem(x[:, :3])
        return F.linear(torch.relu(F.linear(x, self.head.weight)), self.head.weight.t())


@settings(
    max_examples=30, derandomize=True, deadline=None, database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)  # fmt: skip
@given(programs, st.sampled_from([{}, {"w_bits": 4, "a_bits": 4}, {"w_bits": 2, "a_bits": 3}]))
def test_random_programs(program, chosen):
    torch.manual_seed(0)
    model, x = Program(*program).eval(), torch.randn(2, 3, SIDE, SIDE)
    qmodel = dq.quantize(model, **chosen)
    note(str(dq.plan(qmodel)))
    assert not dq.plan(qmodel).skipped
    dq.calibrate(qmodel, [x])

    for training in (True, False):
        assert dq.coverage(qmodel.train(training), x).share == 1.0
    with torch.no_grad(), dq.disabled(qmodel):
        assert torch.equal(qmodel(x), model(x))

    qmodel(x).square().sum().backward()
    for name, parameter in qmodel.named_parameters():
        assert parameter.grad is None or parameter.grad.isfinite().all(), name
    assert all(site.output_scale.grad is not None for site in used(qmodel))

    frozen = dq.freeze(qmodel)
    with torch.no_grad():
        expected = qmodel(x)
        assert torch.equal(frozen(x), expected)
        with tempfile.TemporaryDirectory() as folder:
            dq.save(frozen, Path(folder) / "artifact")
            assert torch.equal(dq.load(Path(folder) / "artifact", model=model)(x), expected)


def used(qmodel):
    """Return the sites of stem and head, which run in every program."""
    names = {"stem", "head"}
    return [site for site in quantized_sites(qmodel).values() if site.layer_name in names]
