"""A decorated forward: its products are found, and what the decorator does to gradients and precision stays."""

from __future__ import annotations

import functools
import types

import pytest
import torch
from torch import nn

import daqconvert as dq


def wrapping(function):
    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        return function(*args, **kwargs) * 2.0

    return wrapper


def nameless(function):
    def wrapper(*args, **kwargs):
        return function(*args, **kwargs)

    return wrapper


class Descriptor:
    def __init__(self, function):
        functools.update_wrapper(self, function)
        self.function = function

    def __get__(self, instance, owner=None):
        return self if instance is None else types.MethodType(self.function, instance)

    def __call__(self, *args, **kwargs):
        return self.function(*args, **kwargs)


DECORATORS = {
    "no_grad": torch.no_grad(),
    "no_grad without brackets": torch.no_grad,
    "enable_grad": torch.enable_grad(),
    "set_grad_enabled": lambda function: torch.set_grad_enabled(False)(function),
    "inference_mode": torch.inference_mode(),
    "autocast": torch.autocast("cpu", dtype=torch.bfloat16),
    "no autocast": torch.autocast("cpu", enabled=False),
    "disable": torch.compiler.disable,
    "ignore": torch.jit.ignore,
    "wraps": wrapping,
    "without wraps": nameless,
    "two": lambda function: torch.no_grad()(wrapping(nameless(function))),
}


def decorated(decorator) -> nn.Module:
    class Projected(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.proj = nn.Linear(8, 8), nn.Parameter(torch.randn(8, 8))

        @decorator
        def forward(self, x):
            return torch.relu(self.fc(x)) @ self.proj

    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), Projected(), nn.Linear(8, 2))


@pytest.mark.parametrize("decorator", DECORATORS.values(), ids=DECORATORS.keys())
def test_a_decorated_forward_is_converted_and_keeps_what_its_decorator_does(decorator):
    model, x = decorated(decorator)[:2], torch.randn(4, 8)
    qmodel = dq.quantize(model)
    assert [row.name for row in dq.plan(qmodel).converted] == ["0", "1.fc", "1.proj"]
    dq.calibrate(qmodel, [x], progress=False)
    with dq.disabled(qmodel):
        assert torch.equal(qmodel(x), model(x))
    y, expected = qmodel(x), model(x)
    assert (y.dtype, y.requires_grad, y.is_inference()) == (
        expected.dtype,
        expected.requires_grad,
        expected.is_inference(),
    )
    assert torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu") and not torch.is_inference_mode_enabled()
    assert 0 < (y.float() - expected.float()).norm() < 0.05 * expected.float().norm()
    assert torch.equal(dq.freeze(qmodel)(x), qmodel.eval()(x))


class Parts(nn.Module):
    """Each product in a context of its own."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (nn.Parameter(torch.randn(8, 8)) for _ in range(3))
        self.fails = False

    def forward(self, x, fail=False):
        with torch.no_grad():
            y = x @ self.a
            with torch.enable_grad():
                y = y + x @ self.b
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = y + x @ self.c
            if fail:
                y = y + torch.ones(3)
        return y


def test_contexts_inside_a_forward_stay_where_they_are():
    model, x = Parts(), torch.randn(4, 8)
    qmodel = dq.quantize(model)
    dq.calibrate(qmodel, [x], progress=False)
    with dq.disabled(qmodel):
        assert torch.equal(qmodel(x), model(x))
    qmodel(x).sum().backward()
    assert qmodel.a.grad is None and qmodel.b.grad.any() and qmodel.c.grad.any()
    compiled = torch.compile(qmodel, backend="eager")
    with torch.no_grad():
        assert torch.equal(compiled(x), qmodel(x))


def test_an_error_leaves_no_context_behind():
    qmodel = dq.quantize(Parts())
    dq.calibrate(qmodel, [torch.randn(4, 8)], progress=False)
    with pytest.raises(RuntimeError):
        qmodel(torch.randn(4, 7))
    assert torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu")


def test_a_switch_without_a_context_is_not_followed():
    class Switches(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.proj = nn.Linear(8, 8), nn.Parameter(torch.randn(8, 8))

        def forward(self, x):
            before = torch.is_grad_enabled()
            torch._C._set_grad_enabled(False)
            y = self.fc(x) @ self.proj
            torch._C._set_grad_enabled(before)
            return y

    plan = dq.plan(Switches())
    assert "without a `with` statement" in plan["proj"].reason and torch.is_grad_enabled()


def test_what_cannot_be_followed_is_listed():
    for decorator in (functools.lru_cache, Descriptor):
        assert "torch.fx cannot follow" in dq.plan(decorated(decorator))["1.proj"].reason
    replaced = decorated(lambda function: function)
    replaced[1].__dict__["forward"] = types.MethodType(lambda self, x: x @ self.proj, replaced[1])
    assert "replaced on the object itself" in dq.plan(replaced)["1.proj"].reason


class Encoder(nn.Module):
    """Methods that multiply: one that the forward calls, one that computes the same site, one that nobody calls."""

    def __init__(self):
        super().__init__()
        self.fc, self.head = nn.Linear(8, 8), nn.Linear(8, 2)
        self.proj, self.text = nn.Parameter(torch.randn(8, 8)), nn.Parameter(torch.randn(8, 8))

    def forward_features(self, x, scale=None):
        y = torch.relu(self.fc(x)) @ self.proj
        return y if scale is None else y * scale

    @torch.no_grad()
    def encode(self, x):
        return torch.nn.functional.normalize(self.fc(x) @ self.proj)

    def encode_text(self, x):
        return x @ self.text

    def branches(self, x):
        return x @ self.proj if x.sum() > 0 else x

    def both(self, x):
        return self.encode(x), self.forward_features(x)

    def forward(self, x):
        return self.head(self.forward_features(x))


def test_other_methods_are_rewritten_too(tmp_path):
    torch.manual_seed(0)
    model, x = Encoder().eval(), torch.randn(16, 8)
    qmodel = dq.quantize(model, w_bits=2, a_bits=2, first=(2, 2), last=(2, 2)).eval()
    dq.calibrate(qmodel, [x], progress=False)
    assert [row.name for row in dq.plan(qmodel).converted] == ["fc", "proj", "head"]
    seen = {}
    qmodel.head.register_forward_pre_hook(lambda module, args: seen.update(x=args[0]))
    qmodel(x)
    assert torch.equal(qmodel.forward_features(x), seen["x"])
    assert torch.equal(qmodel.forward_features(x, scale=3.0), seen["x"] * 3.0)
    assert not torch.equal(qmodel.encode(x), model.encode(x)) and not qmodel.encode(x).requires_grad
    assert torch.equal(qmodel.both(x)[1], seen["x"])
    with dq.disabled(qmodel):
        for name in ("forward_features", "encode", "encode_text"):
            assert torch.equal(getattr(qmodel, name)(x), getattr(model, name)(x))
    frozen = dq.freeze(qmodel)
    dq.save(frozen, tmp_path / "artifact")
    for made in (frozen, dq.load(tmp_path / "artifact", model=model)):
        for name in ("forward_features", "encode", "encode_text"):
            assert torch.equal(getattr(made, name)(x), getattr(qmodel, name)(x)), name


def test_what_only_another_method_multiplies_by_is_listed():
    plan = dq.plan(Encoder())
    assert "encode_text" in plan["text"].reason and "calibration would see nothing" in plan["text"].reason
    assert torch.equal(dq.quantize(Encoder()).proj.new_zeros(1), torch.zeros(1))


def test_a_method_that_has_another_input_takes_no_sign_from_the_forward():
    class Signed(nn.Module):
        def __init__(self):
            super().__init__()
            self.kernel = nn.Parameter(torch.randn(8, 8))

        def encode(self, x):
            return nn.functional.linear(x, self.kernel)

        def forward(self, x):
            return nn.functional.linear(torch.relu(x), self.kernel)

    assert [row.site.nonnegative for row in dq.plan(Signed())] == [False]


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.proj, self.head = nn.Parameter(torch.randn(8, 8)), nn.Linear(8, 2)

    def encode(self, x):
        return x @ self.proj

    def forward(self, x):
        return self.head(x @ self.proj)


class Reaching(Plain):
    """Has methods that reach the product by a private method or by `super()`, and one that keeps what it computes."""

    def _inner(self, x):
        return x @ self.proj

    def reach(self, x):
        return self._inner(x) * 2.0

    def encode(self, x):
        return super().encode(x) * 3.0

    def remember(self, x):
        self.kept = self._inner(x)


def test_methods_that_reach_a_product_by_private_ones_or_super_are_rewritten():
    torch.manual_seed(0)
    model, x = Reaching().eval(), torch.randn(64, 8)
    qmodel = dq.quantize(model, w_bits=8, a_bits=8)
    dq.calibrate(qmodel, [x])
    frozen = dq.freeze(qmodel)
    for name in ("reach", "encode"):
        expected, found = getattr(model, name)(x), getattr(qmodel.eval(), name)(x)
        assert 0 < (found - expected).abs().max() < 0.1 * expected.abs().max(), name
        assert torch.equal(getattr(frozen, name)(x), found)
    qmodel.remember(x)  # a graph would not set the attribute
    assert torch.equal(qmodel.kept, x @ qmodel.proj)


def test_an_argument_that_only_a_decorator_takes_is_refused():
    def amplifying(function):
        @functools.wraps(function)
        def wrapper(self, x, gain=2.0):
            return function(self, x) * gain

        return wrapper

    model, x = decorated(amplifying)[1].eval(), torch.randn(4, 8)
    qmodel = dq.quantize(model, w_bits=8, a_bits=8)
    dq.calibrate(qmodel, [x])
    torch.testing.assert_close(qmodel(x), model(x), atol=0.3, rtol=0.1)
    with pytest.raises(dq.ConversionError, match=r"^\(root\): expected the arguments x, .*found \['gain'\]"):
        qmodel(x, gain=5.0)
