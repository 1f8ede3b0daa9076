"""Trains a small network in a process that is killed again and again, and lets the last one finish.

`python killed_runs.py FOLDER KILLS EPOCHS SEED` writes `FOLDER/whole`, a run without interruption, and `FOLDER/parts`,
the killed one, and prints one line of JSON: the steps in the checkpoint that each killed process left. Processes are
forked, so that they start quickly; for that the parent has one thread and has computed nothing.
"""

import importlib
import json
import os
import random
import shutil
import signal
import sys
import time
import traceback
from pathlib import Path

import torch

from daqconvert.errors import TrainingError
from daqconvert.training import finetune
from daqconvert.training.checkpoint import read_checkpoint
from helpers.clusters import make_loader, quantized_model

IMPORTED = ("accelerate", "timm.optim", "timm.utils", "matplotlib.figure", "torch.utils.tensorboard")  # before a fork
OPTIONS = {
    "lr": 0.05, "ema": 0.9, "checkpoint_steps": 2, "clip_grad": 1.0, "oscillation": "freeze", "accumulate": 2,
    "progress": False,
}  # fmt: skip


def train(out: Path, workers: int, epochs: int) -> None:
    noisy = {"noise": 0.3, "num_workers": workers}
    train_loader, val_loader = make_loader(**noisy), make_loader(**noisy)
    finetune(quantized_model(), train_loader, val_loader, out_dir=out, resume=True, epochs=epochs, **OPTIONS)


def in_child(out: Path, workers: int, epochs: int) -> int:
    child = os.fork()
    if child == 0:
        code = 1
        try:
            train(out, workers, epochs)
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return child


def steps_of(out: Path) -> int:
    try:
        return read_checkpoint(out / "last.safetensors").meta["position"]["number"]
    except TrainingError:
        return -1  # killed before there was a checkpoint


def main(folder: Path, kills: int, epochs: int, seed: int) -> None:
    chosen, whole, parts = random.Random(seed), folder / "whole", folder / "parts"
    for name in IMPORTED:
        importlib.import_module(name)
    started = time.perf_counter()
    assert os.waitpid(in_child(whole, 0, epochs), 0)[1] == 0
    most, killed = time.perf_counter() - started, []
    while len(killed) < kills:
        child = in_child(parts, chosen.choice((0, 2)), epochs)
        time.sleep(chosen.uniform(0.0, 3 * most / kills))
        ended, status = os.waitpid(child, os.WNOHANG)
        if not ended:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            killed.append(steps_of(parts))
        else:  # it ended before it was killed, as it may when the machine gets less busy: start over, kill sooner
            assert status == 0
            shutil.rmtree(parts)
            killed.clear()
            most /= 2
    assert os.waitpid(in_child(parts, 1, epochs), 0)[1] == 0
    print(json.dumps(killed))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), *map(int, sys.argv[2:]))
