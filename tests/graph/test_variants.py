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
