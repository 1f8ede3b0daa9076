"""Which values are proven not to be negative: each proof is held against what the function computes."""

import itertools

import pytest
import torch
from torch import fx, nn
from torch.nn import functional as F
from torch.testing._internal.common_methods_invocations import op_db
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from daqconvert.graph import find_sites
from daqconvert.graph.signs import ALL_OPERANDS, nonnegative_nodes

PROVEN = {
    "relu": lambda x: x.relu(),
    "relu6": F.relu6,
    "sigmoid": torch.sigmoid,
    "hardsigmoid": F.hardsigmoid,
    "softmax": lambda x: x.softmax(-1),
    "abs": abs,
    "clamp": lambda x: x.clamp(0, 6),
    "clamp-above": lambda x: F.relu(x).clamp(max=3),
    "max-pool": lambda x: F.max_pool2d(F.relu(x), 2),
    "avg-pool": lambda x: F.adaptive_avg_pool2d(F.relu(x), 1),
    "cat": lambda x: torch.cat([F.relu(x), torch.sigmoid(x)], dim=1)[:, :4],
    "cat-keyword": lambda x: torch.cat(tensors=[F.relu(x), x.abs()], dim=1)[:, :4],
    "views": lambda x: F.relu(x).flatten(2).transpose(1, 2).permute(0, 2, 1).reshape(1, 4, 8, 8).contiguous(),
    "dropout": lambda x: F.dropout(F.relu(x), training=False),
    "gate": lambda x: F.relu(x) * torch.sigmoid(x),
    "scaled": lambda x: F.relu(x) * 0.5 + 1,
    "chunk": lambda x: F.relu(torch.cat([x, x], 1)).chunk(2, dim=1)[1],
    "pad": lambda x: F.pad(F.relu(x), (1, 1)),
    "interpolate": lambda x: F.interpolate(F.relu(x), scale_factor=2, mode="bilinear"),
    "divisor": lambda x: F.avg_pool2d(F.relu(x), 2, divisor_override=3),
    "softplus": lambda x: F.softplus(x, beta=2.0, threshold=5.0),
    "softplus-module": nn.Softplus(0.5),
    "hardtanh-module": nn.Hardtanh(0.5, 2.0),
    "clip-above": lambda x: F.relu(x).clamp_max(2),
    "clip-below": lambda x: x.clamp_min(0),
    "type-of-itself": lambda x: F.relu(x).to(x.dtype),
    "relu-then-float": lambda x: F.relu(x).float() * 0.5,
    "added": lambda x: F.softmax(x, -1) + torch.sigmoid(x),
    "added-then-scaled": lambda x: (F.softmax(x.float(), -1) + torch.sigmoid(x.float())) * 0.5,
    "result-left": lambda x: (h := x * 1, F.relu(h, inplace=True), h)[-1],
    "changed-copy": lambda x: (h := F.relu(x), h.clone().sub_(1), h)[-1],
}


NOT_PROVEN = {
    "input": lambda x: x,
    "gelu": F.gelu,
    "silu": F.silu,
    "leaky": lambda x: F.leaky_relu(x),
    "tanh": torch.tanh,
    "minus": lambda x: F.relu(x) - F.relu(-x),
    "rsub": lambda x: 1 - F.relu(x),
    "negative-factor": lambda x: F.relu(x) * -0.5,
    "negative-shift": lambda x: F.relu(x) + -1,
    "alpha": lambda x: torch.add(F.relu(x), F.relu(-x), alpha=-1),
    "alpha-method": lambda x: F.relu(x).add(F.relu(-x), alpha=-2),
    "other": lambda x: torch.add(F.relu(x), other=x),
    "cat-one-side": lambda x: torch.cat([F.relu(x), x], dim=1)[:, 4:],
    "cat-keyword": lambda x: torch.cat(tensors=[F.relu(x), x], dim=1)[:, 4:],
    "clamp-below": lambda x: x.clamp(min=-1),
    "clamp-max": lambda x: x.clamp(max=1),
    "clamp-to-negative": lambda x: F.relu(x).clamp(-2, -1),
    "hardtanh": F.hardtanh,
    "bicubic": lambda x: F.interpolate(F.relu(x), scale_factor=2, mode="bicubic"),
    "negative-pad": lambda x: F.pad(F.relu(x), (1, 1), value=-1.0),
    "add-nothing": lambda x: torch.add(x, 0),
    "layer-norm": lambda x: F.layer_norm(F.relu(x), (8,)),
    "in-place": lambda x: (h := F.relu(x), h.sub_(1), h)[-1],
    "in-place-view": lambda x: (h := F.relu(x), h.view(-1).neg_(), h)[-1],
    "view-of-in-place": lambda x: (h := F.relu(x), v := h.flatten(1), h.sub_(1), v.view(1, 4, 8, 8))[-1],
    "in-place-part": lambda x: (h := x * 1, h[:, :2].relu_(), h)[-1],
    "in-place-by-position": lambda x: (h := F.relu(x), F.threshold(h, 0.5, -3.0, True), h)[-1],
    "in-place-by-data": lambda x: (h := F.relu(x), h.data.neg_(), h)[-1],
    "in-place-by-dropout": lambda x: (h := F.relu(x), F.dropout(h, training=False).neg_(), h)[-1],
    "written": lambda x: (h := F.relu(x), h.__setitem__(0, x[0]), h)[-1],
    "out": lambda x: (h := F.relu(x), torch.neg(h, out=h), h)[-1],
    "divisor": lambda x: F.avg_pool2d(F.relu(x), 2, divisor_override=-4),
    "divisor-by-position": lambda x: F.avg_pool2d(F.relu(x), 2, 2, 0, False, True, -4),
    "divisor-3d": lambda x: F.avg_pool3d(F.relu(x)[None], (1, 2, 2), divisor_override=-4)[0],
    "divisor-module": nn.Sequential(nn.ReLU(), nn.AvgPool2d(2, divisor_override=-4)),
    "divisor-module-3d": nn.Sequential(nn.ReLU(), nn.AvgPool3d((1, 2, 2), divisor_override=-4)),
    "window-in-the-padding": lambda x: F.max_pool2d(F.relu(x)[..., :3, :3], 2, 1, 1, 4),
    "window-in-the-padding-module": nn.Sequential(nn.AvgPool2d(3), nn.ReLU(), nn.MaxPool2d(2, 1, 1, 3)),
    "softplus": lambda x: F.softplus(x, beta=-1.0),
    "softplus-by-position": lambda x: F.softplus(x, -1.0),
    "softplus-threshold": lambda x: F.softplus(x, threshold=-20),
    "softplus-module": nn.Softplus(-1.0),
    "softplus-threshold-module": nn.Softplus(1.0, -20.0),
    "crossing-limits": lambda x: x.clamp(min=3, max=-1),
    "hardtanh-module": nn.Hardtanh(-1.0, 6.0),
    "hardtanh-by-position": lambda x: F.hardtanh(x, -3.0, 6.0),
    "threshold-module": nn.Threshold(0.1, -20.0),
    "celu-module": nn.CELU(-2.0),
    "logsigmoid-module": nn.LogSigmoid(),
    "glu-module": nn.GLU(dim=-1),
    "leaky-module": nn.LeakyReLU(0.2),
    "hardtanh-of-relu": nn.Sequential(nn.ReLU(), nn.Hardtanh(-2.0, -1.0)),
    "prelu-module": nn.PReLU(init=0.25),
    "bicubic-module": nn.Sequential(nn.ReLU(), nn.Upsample(scale_factor=2, mode="bicubic")),
    "cube": lambda x: x.pow(3),
    "clip-above": lambda x: x.clamp_max(1),
    "int8-abs": lambda x: torch.full_like(x, -128).to(torch.int8).abs().float(),
    "int8-square": lambda x: (x * 0 + 12).to(torch.int8).square() * 1.0,
    "int8-sum": lambda x: (h := F.relu(x * 0 + 100).to(torch.int8), (h + h).float())[-1],
    "int8-product": lambda x: (h := F.relu(x * 0 + 50).to(torch.int8), (h * 3).to(x.dtype))[-1],
    "int8-conversion": lambda x: F.relu(x * 0 + 200).to(torch.int8).float(),
    "int8-promoted": lambda x: torch.cat([torch.full_like(x, -128).to(torch.int8).abs(), F.relu(x)], 1)[:, :4],
    "int8-sum-type": lambda x: F.relu(x * 0 + 200)[:, None].sum(1, dtype=torch.int8).float(),
    "bits-read-anew": lambda x: F.relu(x * 0 + 1e-42).view(torch.int16).neg().float()[..., :8],
}


class Before(nn.Module):
    """A function, and the convolution whose input it makes."""

    def __init__(self, function):
        super().__init__()
        self.function, self.conv = function, nn.Conv2d(4, 2, 1)

    def forward(self, x):
        return self.conv(self.function(x))


@pytest.mark.parametrize("name", PROVEN)
def test_proven(name):
    model = Before(PROVEN[name])
    assert find_sites(model).sites[0].nonnegative
    assert PROVEN[name](torch.randn(1, 4, 8, 8) * 3).min() >= 0  # and it is true


@pytest.mark.parametrize("name", NOT_PROVEN)
def test_not_proven(name):
    model = Before(NOT_PROVEN[name])
    assert not find_sites(model).sites[0].nonnegative
    assert NOT_PROVEN[name](torch.randn(1, 4, 8, 8) * 3).min() < 0  # rightly so


def test_a_hook_or_a_forward_of_its_own_may_change_what_a_module_computes():
    def shifted(*args):
        return args[-1] - 1 if isinstance(args[-1], torch.Tensor) else (args[-1][0] - 1,)

    after, before, whole, own = (nn.Sequential(nn.ReLU(), nn.Conv2d(4, 2, 1)) for _ in range(4))
    after[0].register_forward_hook(shifted)
    before[1].register_forward_pre_hook(shifted)
    whole[0].forward = lambda x: x
    nn.utils.prune.identity(own[1], "weight")  # a hook that computes the weight leaves the input alone
    assert [find_sites(model).sites[0].nonnegative for model in (after, before, whole, own)] == [False] * 3 + [True]


def traced(function, leaves, spec, before, after):
    """The graph of `after(function(...))`, where `before` prepares every tensor."""
    graph = fx.Graph()
    tracer = fx.proxy.GraphAppendingTracer(graph)
    given = [before(fx.Proxy(graph.placeholder(f"x{i}"), tracer)) if is_tensor(leaf) else leaf
             for i, leaf in enumerate(leaves)]  # fmt: skip
    x, args, kwargs = tree_unflatten(given, spec)
    out = function(x, *args, **kwargs)
    graph.output(tracer.create_arg(after(out) if isinstance(out, fx.Proxy) else out))
    return graph


def is_tensor(value):
    return isinstance(value, torch.Tensor)


class Checked(fx.Interpreter):
    """Runs a graph and keeps the nodes that are proven non-negative and are not."""

    def __init__(self, graph, proven):
        super().__init__(fx.GraphModule({}, graph))
        self.proven, self.wrong = {node.name for node in proven}, []

    def run_node(self, node):
        value = super().run_node(node)
        if node.name in self.proven:
            tensors = [t for t in tree_leaves(value) if is_tensor(t) and t.is_floating_point() and t.numel()]
            self.wrong += [f"{node.target}: {t.min().item()}" for t in tensors if (t < 0).any()]
        return value


def negated(leaves):
    """The arguments themselves, and with one positive number of them negated."""
    yield leaves
    for i, leaf in enumerate(leaves):
        if isinstance(leaf, (int, float)) and not isinstance(leaf, bool) and leaf > 0:
            yield [*leaves[:i], -leaf, *leaves[i + 1 :]]


WAYS = [
    (torch.float32, lambda x: x, lambda x: x),
    (torch.float32, torch.relu, lambda x: x),
    (torch.int8, lambda x: x, lambda x: x.float()),
    (torch.int8, torch.relu, lambda x: x * 0.5),
]
"""Type of the samples, what prepares each tensor, and what is done with the result."""


def check_operator(op, most):
    """Check every node that is proven for the samples of an operator; return how many results are proven."""
    found = 0
    for dtype, before, after in WAYS:
        if dtype not in op.dtypes:
            continue
        for sample in itertools.islice(op.sample_inputs("cpu", dtype), most):
            whole, spec = tree_flatten((sample.input, sample.args, sample.kwargs))
            for leaves in negated(whole) if any(map(is_tensor, whole)) else ():
                try:
                    graph = traced(op.op, leaves, spec, before, after)
                except Exception:  # fx cannot follow it
                    continue
                proven = nonnegative_nodes(graph, {})
                checked = Checked(graph, proven)
                try:
                    checked.run(*[t.detach().clone() for t in leaves if is_tensor(t)])
                except Exception:  # torch refuses these arguments
                    continue
                assert not checked.wrong, (op.name, checked.wrong, [leaf for leaf in leaves if not is_tensor(leaf)])
                last = list(graph.nodes)[-2]
                found += last in proven and last.target is not torch.relu
    return found


NAMED = {"abs", "relu", "sigmoid", "exp", "square", "softplus", "softmax", "avg_pool2d", "avg_pool3d", "max_pool2d"}
NAMED |= {"clamp", "hardtanh", "pad", "interpolate", "mean", "sum", "amax"} | ALL_OPERANDS
CATALOGUE = [op for op in op_db if op.name.rpartition(".")[2] in NAMED]
OTHERS = [op for op in op_db if op not in CATALOGUE]


@pytest.mark.filterwarnings("ignore")  # torch warns of what some of its samples do
def test_what_is_proven_of_torchs_own_samples_is_true():
    torch.manual_seed(0)
    assert sum(check_operator(op, most=12) for op in CATALOGUE) > 150


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_what_is_proven_of_all_other_operators_is_true():
    torch.manual_seed(0)
    assert sum(check_operator(op, most=40) for op in (*OTHERS, *CATALOGUE)) > 500


def test_a_class_or_function_of_the_user_with_a_known_name_proves_nothing():
    class ReLU(nn.Module):
        def forward(self, x):
            return x - x.mean() if x.sum() > 0 else x

    model = nn.Sequential(nn.Linear(4, 4), ReLU(), nn.Linear(4, 2))
    assert not any(site.nonnegative for site in find_sites(model).sites)
