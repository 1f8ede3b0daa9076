"""Signals end a run after the step in progress, with a checkpoint; SIGUSR1 writes one and training goes on."""

import os
import signal
import threading

import pytest
import torch

from daqconvert.errors import TrainingError
from daqconvert.training import finetune
from daqconvert.training.checkpoint import read_checkpoint
from daqconvert.training.signals import NAMES, listening
from helpers.checkpoints import same

OPTIONS = {"epochs": 3, "lr": 0.05}


def at_step(number, what):
    """Send signals to this process after a step."""

    def on_step(step):
        if step.number == number:
            for name in what:
                os.kill(os.getpid(), getattr(signal, name))

    return on_step


@pytest.fixture
def handlers():
    """Give Ctrl-C its usual handler, which a shell takes from what it starts in the background; none may be left."""
    outer = signal.signal(signal.SIGINT, signal.default_int_handler)
    before = [signal.getsignal(getattr(signal, name)) for name in NAMES]
    yield
    after = [signal.getsignal(getattr(signal, name)) for name in NAMES]
    signal.signal(signal.SIGINT, outer)
    assert after == before


@pytest.mark.parametrize(
    ("names", "error", "told", "workers"),
    [
        (["SIGTERM"], TrainingError, r"SIGTERM: training stopped; .*last.safetensors holds the state after epoch 2, "
         r"step 1. Go on with resume=True", 2),
        (["SIGTERM", "SIGUSR1", "SIGINT"], KeyboardInterrupt, "SIGINT: training stopped.*epoch 2, step 1", 0),
    ],
    ids=["SIGTERM", "all"],
)  # fmt: skip
def test_a_run_that_is_stopped_goes_on(make, loader, val_loader, tmp_path, handlers, names, error, told, workers):
    noisy = {"noise": 0.3, "num_workers": workers}
    finetune(make(), loader(**noisy), val_loader, out_dir=tmp_path / "whole", **OPTIONS)
    qmodel, stop = make(), at_step(4, names)
    with pytest.raises(error, match=told):
        finetune(qmodel, loader(**noisy), val_loader, out_dir=tmp_path / "parts", on_step=stop, **OPTIONS)
    assert not qmodel.training
    position = read_checkpoint(tmp_path / "parts" / "last.safetensors").meta["position"]
    assert (position["number"], position["epoch"], position["batches"]) == (4, 2, 1)
    finetune(make(), loader(**noisy), val_loader, out_dir=tmp_path / "parts", resume=True, **OPTIONS)
    for name in ("last.safetensors", "best.safetensors"):
        assert same(tmp_path / "whole" / name, tmp_path / "parts" / name)


def test_a_second_interrupt_does_not_wait(make, loader, tmp_path, handlers):
    stop = at_step(4, ["SIGINT", "SIGINT"])
    with pytest.raises(KeyboardInterrupt) as caught:
        finetune(make(), loader(), out_dir=tmp_path, on_step=stop, **OPTIONS)
    assert str(caught.value) == ""  # Python's own
    assert read_checkpoint(tmp_path / "last.safetensors").meta["epochs_done"] == 1


def test_a_checkpoint_on_demand(make, loader, tmp_path, handlers):
    seen = []

    def on_step(step):
        seen.append(read_checkpoint(tmp_path / "last.safetensors").meta["position"]["number"])
        at_step(4, ["SIGUSR1"])(step)

    result = finetune(make(), loader(), out_dir=tmp_path, on_step=on_step, **OPTIONS)
    assert seen == [0, 0, 0, 3, 4, 4, 6, 6, 6]  # before step 5 there is one of step 4
    assert result.epochs == 3


def test_a_signal_during_the_evaluation(make, loader, val_loader, tmp_path, handlers):
    class Ending(list):
        passes = 0

        def __iter__(self):
            self.passes += 1
            for i, batch in enumerate(super().__iter__()):
                if (self.passes, i) == (3, 1):  # the first is a look at the first batch
                    os.kill(os.getpid(), signal.SIGTERM)
                yield batch

    finetune(make(), loader(), val_loader, out_dir=tmp_path / "whole", **OPTIONS)
    with pytest.raises(TrainingError, match="SIGTERM.*epoch 2, step 3"):
        finetune(make(), loader(), Ending(val_loader), out_dir=tmp_path / "parts", **OPTIONS)
    finetune(make(), loader(), val_loader, out_dir=tmp_path / "parts", resume=True, **OPTIONS)
    assert same(tmp_path / "whole" / "last.safetensors", tmp_path / "parts" / "last.safetensors")


def test_without_a_directory_nothing_is_kept(make, loader, handlers):
    with pytest.raises(TrainingError, match="SIGTERM: training stopped; no out_dir was given, so nothing is kept"):
        finetune(make(), loader(), on_step=at_step(1, ["SIGTERM"]), **OPTIONS)


def test_the_callers_own_handlers_stay(handlers):
    mine = signal.signal(signal.SIGTERM, lambda number, frame: None)
    ignored = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with listening() as signals:
            signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGINT)
        assert signals.came == [0, 0, 0]
    finally:
        signal.signal(signal.SIGTERM, mine)
        signal.signal(signal.SIGINT, ignored)


def test_another_thread_listens_to_nothing(make, loader, handlers):
    found = []
    threads = torch.get_num_threads()
    run = lambda: found.append(finetune(make(), loader(), epochs=1).epochs)  # noqa: E731
    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert found == [1]
    assert torch.get_num_threads() == threads
