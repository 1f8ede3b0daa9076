"""Codes of an operand give the operand back."""

from __future__ import annotations

import torch

from daqconvert.functional.codes import expand_input, expand_weight
from daqconvert.functional.input_operator import InputGrid, quantize_input
from daqconvert.functional.weight_operator import WeightGrid, quantize_weight
from helpers.operators import ROUNDINGS


def test_codes_give_the_operand_back():
    x, weight = torch.randn(7, 33), torch.randn(4, 3, 2)
    bounds = InputGrid(torch.tensor(-1.0), torch.tensor(2.0), 5, ROUNDINGS["ste"])
    operand, codes, _, zero_point = quantize_input(x, bounds, True)
    assert torch.equal(expand_input(codes, zero_point), operand)
    view = (1, 1, 4, 6)
    weight_grid = WeightGrid(None, torch.ones(4), None, None, view, 3, "midrise", ROUNDINGS["ste"])
    operand, codes = quantize_weight(weight, weight_grid)
    assert torch.equal(expand_weight(codes, view, None, torch.float32), operand)
    scale = torch.rand(4)
    assert torch.equal(expand_weight(codes, view, scale, torch.float32), operand * scale.reshape(4, 1, 1))
    again, known = quantize_weight(weight, weight_grid, codes.codes)
    assert torch.equal(again, operand) and known.codes is codes.codes
