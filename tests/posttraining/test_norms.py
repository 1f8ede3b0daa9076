"""Statistics of batch norms, estimated anew."""

import torch
from torch import nn

from daqconvert.posttraining import batch_norms, reestimate


def test_statistics_are_means_over_batches_of_the_weights_as_they_are():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Dropout(0.5), nn.BatchNorm1d(4), nn.Linear(4, 4), nn.BatchNorm1d(4, momentum=0.3)).train()
    batches = [torch.randn(8, 4) + i for i in range(3)]
    reestimate(model, [((x,), {}) for x in batches])
    first, second = batch_norms(model)
    inner = []
    for x in batches:
        normed = (x - x.mean(0)) / (x.var(0, unbiased=False) + first.eps).sqrt()
        inner.append(model[2](normed * first.weight + first.bias))
    for norm, seen in ((first, batches), (second, inner)):
        torch.testing.assert_close(norm.running_mean, torch.stack([x.mean(0) for x in seen]).mean(0))
        torch.testing.assert_close(norm.running_var, torch.stack([x.var(0) for x in seen]).mean(0))
    assert (first.momentum, second.momentum) == (0.1, 0.3)
    assert all(module.training for module in model.modules())


def test_empty_batches_do_not_count():
    norm, x = nn.BatchNorm1d(2), torch.tensor([[1.0, 2.0], [3.0, 6.0]])
    reestimate(norm, [((torch.zeros(0, 2),), {}), ((x,), {}), ((torch.zeros(0, 2),), {})])
    assert norm.running_mean.tolist() == [2.0, 4.0] and norm.running_var.tolist() == [2.0, 8.0]
    assert not norm._forward_pre_hooks
