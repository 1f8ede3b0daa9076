from __future__ import annotations

import pytest
import torch

from daqconvert.data.images import MEAN, STD, load_digits
from daqconvert.errors import DataError

pytest.importorskip("sklearn")


def test_splits_are_disjoint_complete_and_stratified():
    digits = load_digits()
    assert (len(digits.train_rows), len(digits.val_rows)) == (1347, 450)
    assert sorted(digits.train_rows + digits.val_rows) == list(range(1797))
    whole = torch.cat([digits.train_labels, digits.val_labels]).bincount(minlength=10) / 1797
    held = digits.val_labels.bincount(minlength=10) / 450
    assert (whole - held).abs().max() < 1 / 450


def test_same_seed_same_split_other_seed_other_split():
    first, again, other = load_digits(), load_digits(), load_digits(seed=1)
    assert first.val_rows == again.val_rows
    assert torch.equal(first.train_images, again.train_images)
    assert first.val_rows != other.val_rows
    assert set(first.val_rows) & set(other.train_rows)


def test_pixels_are_the_scans():
    from sklearn import datasets

    digits = load_digits(size=8)
    scans = torch.from_numpy(datasets.load_digits().images).float()
    restored = (digits.val_images[:, 0] * STD + MEAN) * 16
    assert torch.allclose(restored, scans[list(digits.val_rows)], atol=1e-4)
    assert digits.train_images.mean().abs() < 0.01


def test_enlarging_keeps_the_mean_and_repeats_channels():
    small, large = load_digits(size=8), load_digits(size=32, channels=3)
    assert large.val_images.shape == (450, 3, 32, 32)
    assert large.val_images.is_contiguous()
    assert torch.equal(large.val_images[:, 0], large.val_images[:, 2])
    assert torch.allclose(small.val_images.mean(), large.val_images.mean(), atol=0.02)
    assert abs(large.train_images.std() - 1) < 0.02


@pytest.mark.parametrize("size", [0, 4, 12, 30])
def test_sizes_that_are_no_multiple(size):
    with pytest.raises(DataError, match="multiples of 8"):
        load_digits(size=size)
