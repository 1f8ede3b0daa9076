"""The solver against its definition: after each column the columns left are the exact minimum of the error."""

import pytest
import torch

from daqconvert.posttraining.gptq import BLOCK, output_error, second_order_levels


def problem(groups=2, rows=3, inputs=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(groups, inputs, inputs, generator=generator, dtype=torch.float64)
    x = mixing @ torch.randn(groups, inputs, 4 * inputs, generator=generator, dtype=torch.float64)
    weight = torch.randn(groups, rows, inputs, generator=generator, dtype=torch.float64)
    step = 0.3 + torch.rand(groups, rows, generator=generator, dtype=torch.float64)
    return weight, x @ x.mT, step


def nearest(steps):
    return steps.round().clamp(-3, 3)


def by_definition(weight, own, step, damping):
    """One row at a time, columns by the size of their input: solve for what is left, round the next, and so on."""
    found = torch.empty_like(weight)
    for g, (rows, moments) in enumerate(zip(weight, own, strict=True)):
        order = moments.diagonal().argsort(descending=True, stable=True)
        moments = moments + damping * moments.diagonal().mean() * torch.eye(len(moments), dtype=moments.dtype)
        for r, row in enumerate(rows):
            fixed, values = [], []
            for i in range(len(row)):
                rest = order[i:]
                now = row[rest]
                if fixed:
                    missed = torch.stack(values) * step[g, r] - row[fixed]
                    now = now - torch.linalg.solve(moments[rest][:, rest], moments[rest][:, fixed] @ missed)
                fixed.append(int(order[i]))
                values.append(nearest(now[0] / step[g, r]))
            found[g, r, fixed] = torch.stack(values)
    return found


@pytest.mark.parametrize("inputs", [1, 5, BLOCK + 9])
def test_equals_the_definition(inputs):
    weight, own, step = problem(inputs=inputs, rows=2)
    found = second_order_levels(weight, own, step, nearest, damping=0.01)
    assert torch.equal(found, by_definition(weight, own, step, 0.01))


def test_outputs_are_nearer_than_with_the_nearest_levels():
    weight, own, step = problem(groups=1, rows=64, inputs=32)
    scale = step[:, :, None] / 4
    found = second_order_levels(weight, own, step / 4, torch.round, damping=0.01) * scale
    plain = (weight / scale).round() * scale
    assert output_error(found, weight, own) < 0.5 * output_error(plain, weight, own)


def test_independent_inputs_have_the_nearest_levels():
    weight, own, step = problem()
    alone = torch.diag_embed(own.diagonal(dim1=1, dim2=2))
    expected = nearest(weight / step[:, :, None])
    assert torch.equal(second_order_levels(weight, alone, step, nearest, damping=0.0), expected)


def test_inputs_that_are_always_zero_change_nothing_else():
    weight, own, step = problem(inputs=6)
    own[:, :, 2] = own[:, 2, :] = 0.0
    rest = [0, 1, 3, 4, 5]
    small = second_order_levels(weight[:, :, rest], own[:, rest][:, :, rest], step, nearest, damping=0.012)
    found = second_order_levels(weight, own, step, nearest, damping=0.0144)  # the same ridge: the mean is 5 / 6 of it
    assert torch.equal(found[:, :, rest], small)
    assert torch.equal(found[:, :, 2], nearest(weight[:, :, 2] / step))
    own.zero_()
    everything = second_order_levels(weight, own, step, nearest, damping=0.01)
    assert torch.equal(everything, nearest(weight / step[:, :, None]))
    assert output_error(everything, weight, own) == 0.0
