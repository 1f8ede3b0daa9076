"""Epochs: what a loader gives is a function of (seed, epoch, index), whichever worker loads it, wherever it starts."""

import copy

import numpy as np
import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, IterableDataset, RandomSampler, Subset

from daqconvert.seeding import preserved_random_state
from daqconvert.training import finetune
from daqconvert.training.batching.epochs import Epochs
from daqconvert.training.looping import groups_of
from helpers.clusters import Breaking, Clusters


@pytest.fixture(autouse=True)
def preserved():
    with preserved_random_state():
        yield


def read(loader, epoch=1, skip=0, seed=0, **options):
    torch.rand(3)  # random numbers drawn before must not matter
    return [x for x, _ in Epochs(loader, seed, **options).batches(epoch, skip)]


def same(a, b) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


PERSISTENT = {"num_workers": 1, "persistent_workers": True, "prefetch_factor": 3}


OWN = {"generator": torch.Generator()}


@pytest.mark.parametrize("options", [{"num_workers": 2}, PERSISTENT, OWN], ids=["two", "kept", "own"])
def test_workers_do_not_matter(loader, options):
    alone, others = read(loader(noise=1.0)), read(loader(noise=1.0, **options))
    if "generator" not in options:  # a generator of its own gives another order, which the seed decides too
        assert same(alone, others)
    assert same(others, read(loader(noise=1.0, **options)))


def test_epoch_and_seed_matter(loader):
    first = read(loader(noise=1.0, shuffle=False))
    assert not same(first, read(loader(noise=1.0, shuffle=False), epoch=2))
    assert not same(first, read(loader(noise=1.0, shuffle=False), seed=1))
    orders = [read(loader(), epoch=epoch) for epoch in (1, 2)]
    assert not same(*orders)
    assert same([torch.cat(order).sort(0).values for order in orders[:1]], [torch.cat(orders[1]).sort(0).values])


def test_persistent_workers_follow_the_epochs(loader):
    persistent, fresh = Epochs(loader(noise=1.0, **PERSISTENT), 0), Epochs(loader(noise=1.0), 0)
    list(zip(range(1), persistent.batches(0), strict=False))  # left in the middle, as calibration does
    for epoch in (1, 2):
        found, expected = ([x for x, _ in epochs.batches(epoch)] for epochs in (persistent, fresh))
        assert same(found, expected)


class Told(Clusters):
    """A data set whose samples are the epoch that `set_epoch` set."""

    epoch = -1

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __getitem__(self, index):
        return torch.tensor(self.epoch), self.labels[index]


def test_workers_that_persist_are_told_the_epoch():
    epochs = Epochs(DataLoader(Told(), batch_size=16, **PERSISTENT), 0)
    assert [{int(v) for x, _ in epochs.batches(epoch) for v in x} for epoch in (1, 2)] == [{1}, {2}]


def own_batches():
    return DataLoader(Clusters(noise=1.0), batch_sampler=BatchSampler(RandomSampler(range(48)), 20, drop_last=True))


class Stream(IterableDataset):
    def __iter__(self):
        return iter([(torch.randn(8) + float(np.random.randn()), torch.tensor(i % 3)) for i in range(48)])


def single():
    return DataLoader([(torch.full((2,), float(i)), i) for i in range(7)], batch_size=None, shuffle=True)


LOADERS = {
    "plain": lambda: DataLoader(Clusters(noise=1.0), batch_size=10, shuffle=True),
    "workers": lambda: DataLoader(Clusters(noise=1.0), batch_size=10, shuffle=True, num_workers=2),
    "subset": lambda: DataLoader(Subset(Clusters(noise=1.0), range(30)), batch_size=10, shuffle=True),
    "batch sampler": own_batches,
    "no batching": single,
    "own class": lambda: Breaking(Clusters(noise=1.0), batch_size=10, shuffle=True),
    "own class with workers": lambda: Breaking(Clusters(noise=1.0), batch_size=10, shuffle=True, num_workers=2),
    "stream": lambda: DataLoader(Stream(), batch_size=10),
    "list": lambda: list(DataLoader(Clusters(), batch_size=10)),
}


@pytest.mark.parametrize("make_one", LOADERS.values(), ids=LOADERS)
def test_the_rest_of_an_epoch_is_the_rest(make_one):
    loader = make_one()
    whole = read(loader)
    assert 2 <= len(whole) <= 7
    for skip in (1, len(whole) - 1, len(whole)):
        assert same(read(make_one(), skip=skip), whole[skip:])


@pytest.mark.parametrize("make_one", LOADERS.values(), ids=LOADERS)
@pytest.mark.parametrize("count", [2, 3])
def test_processes_share_an_epoch(make_one, count):
    whole = read(make_one())
    shares = [read(make_one(), index=i, count=count) for i in range(count)]
    assert len({len(share) for share in shares}) == 1  # all processes take the same number of steps
    found = [shares[i % count][i // count] for i in range(len(whole))]
    assert same(found, whole)
    once = [read(make_one(), index=i, count=count, even=False) for i in range(count)]
    assert sum(map(len, once)) == len(whole)
    assert same([once[i % count][i // count] for i in range(len(whole))], whole)
    for i, share in enumerate(shares):
        assert same(read(make_one(), skip=1, index=i, count=count), share[1:])
        if make_one is not LOADERS["stream"]:
            assert len(Epochs(make_one(), 0, i, count)) == len(share)
            assert len(Epochs(make_one(), 0, i, count, even=False)) == len(once[i])


def test_what_is_shared_already_is_not_shared_again():
    data = Clusters()
    loaders = [DataLoader(data, batch_size=8, sampler=DistributedSampler(data, 2, rank)) for rank in (0, 1)]
    shares = [read(loader, index=rank, count=2) for rank, loader in enumerate(loaders)]
    assert [len(share) for share in shares] == [3, 3]
    seen = torch.cat([*shares[0], *shares[1]])
    assert len(seen.unique(dim=0)) == len(data)


def test_the_users_loader_is_left_as_it_was(loader):
    mine = loader(noise=1.0, num_workers=2, persistent_workers=True)
    before = dict(vars(mine))
    read(mine)
    assert dict(vars(mine)) == before


def test_a_collate_function_and_workers_of_the_user():
    started = []

    class Marked(DataLoader):
        pass

    def collate(samples):
        return torch.stack([x for x, _ in samples]) + torch.rand(1), None

    plain = DataLoader(Clusters(), batch_size=16, collate_fn=collate, worker_init_fn=started.append)
    workers = Marked(Clusters(), batch_size=16, collate_fn=collate, num_workers=2, worker_init_fn=started.append)
    assert same(read(plain), read(workers))  # its random numbers follow the batch's last sample


def test_resumed_in_the_middle_with_other_workers(make, loader, tmp_path):
    """The weights after the run do not depend on which worker loaded a sample, nor does anything else."""
    options = {"epochs": 2, "lr": 0.05, "checkpoint_steps": 1}
    finetune(make(), loader(noise=0.5), out_dir=tmp_path / "whole", **options)

    class Stopped(Exception):
        pass

    def stop(step):
        if step.number == 5:
            raise Stopped

    with pytest.raises(Stopped):
        finetune(make(), loader(noise=0.5, num_workers=1), out_dir=tmp_path / "parts", on_step=stop, **options)
    qmodel, whole = make(), make()
    finetune(qmodel, loader(noise=0.5, num_workers=2), out_dir=tmp_path / "parts", resume=True, **options)
    finetune(whole, loader(), out_dir=tmp_path / "whole", resume=True, **options)
    state = copy.copy(whole.state_dict())
    assert all(torch.equal(value, state[key]) for key, value in qmodel.state_dict().items())


def test_groups():
    assert list(groups_of(iter(range(5)), 2)) == [[0, 1], [2, 3], [4]]
    assert list(groups_of([], 2)) == []
