"""Does a run survive faults? 20 SIGKILLs at random moments against none: are weights and history the same?

ResNet-20 at W2A2 on generated images of 16 x 16, with distillation, an average of the weights, frozen oscillating
weights, dropout, and augmentation from torch, numpy and `random`; 0, 1 or 2 workers, chosen anew at each start. The
moments are drawn evenly over the time that a start may take, loading and calibration included:

    python benchmarks/faults.py
"""

from __future__ import annotations

import argparse
import importlib
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # `benchmarks` is a package there

import daqconvert as dq
from benchmarks import common
from benchmarks.networks.resnet20 import ResNet20
from daqconvert.errors import TrainingError
from daqconvert.training.checkpoint import Checkpoint, read_checkpoint

IMAGES, SIZE, BATCH, CLASSES = 320, 16, 32, 10
IMPORTED = ("accelerate", "timm.optim", "timm.utils", "matplotlib.figure", "torch.utils.tensorboard")  # before a fork
TIMES = ("seconds", "images_per_second")
OPTIONS: dict[str, Any] = {
    "lr": 0.02, "ema": 0.99, "oscillation": "freeze", "checkpoint_steps": 4, "keep": 3, "progress": False,
}  # fmt: skip


class Images(Dataset[tuple[Tensor, int]]):
    """Ten patterns, shifted, flipped and with noise, from three random generators."""

    def __init__(self) -> None:
        self.patterns = torch.randn(CLASSES, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
        self.augment = v2.Compose([v2.RandomCrop(SIZE, padding=2), v2.RandomHorizontalFlip()])

    def __len__(self) -> int:
        return IMAGES

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image = self.augment(self.patterns[index % CLASSES]) * random.uniform(0.5, 1.5)
        return image + torch.from_numpy(np.random.randn(3, SIZE, SIZE)).float(), index % CLASSES


def main() -> None:
    """Train untouched, train killed, compare, write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        result = compared(Path(folder), args.kills, args.epochs, args.seed)
    print(f"{result['kills']} kills, identical: {result['identical']}")
    if not result["identical"]:
        raise SystemExit(f"differs: {result['differs']}")
    print(f"wrote {common.write('faults', result).name}")


def compared(folder: Path, kills: int, epochs: int, seed: int) -> dict[str, Any]:
    """Return what was found in one run that nobody touched and one that was killed."""
    for name in IMPORTED:
        importlib.import_module(name)
    started = time.perf_counter()
    assert os.waitpid(start(folder / "whole", 0, epochs), 0)[1] == 0
    seconds = time.perf_counter() - started
    killed = kill(folder / "parts", kills, epochs, seconds, random.Random(seed))
    assert os.waitpid(start(folder / "parts", 0, epochs), 0)[1] == 0
    names = ("last.safetensors", "best.safetensors")
    pairs = [tuple(read_checkpoint(folder / run / name) for run in ("whole", "parts")) for name in names]
    differs = [f"{name}: {key}" for name, pair in zip(names, pairs, strict=True) for key in differences(*pair)]
    last = pairs[0][0]
    return {
        "kills": len(killed), "identical": not differs, "differs": differs, "epochs": epochs,
        "steps": last.meta["position"]["number"], "steps_in_the_checkpoint_after_each_kill": killed,
        "tensors_compared": sum(len(pair[0].tensors) for pair in pairs),
        "bytes_compared": sum(t.numel() * t.element_size() for pair in pairs for t in pair[0].tensors.values()),
        "seconds_untouched": round(seconds, 1), "options": OPTIONS,
    }  # fmt: skip


def kill(out: Path, kills: int, epochs: int, seconds: float, chosen: random.Random) -> list[int]:
    """Start and kill a run; return how many steps its checkpoint held each time, -1 before there was one."""
    found: list[int] = []
    while len(found) < kills:
        child = start(out, chosen.choice((0, 1, 2)), epochs)
        time.sleep(chosen.uniform(0.0, 3 * seconds / kills))
        if os.waitpid(child, os.WNOHANG)[0] != 0:
            raise SystemExit(f"the run ended after {len(found)} kills: give it more --epochs")
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        try:
            found.append(read_checkpoint(out / "last.safetensors").meta["position"]["number"])
        except TrainingError:
            found.append(-1)
        print(f"killed {len(found)} of {kills}: step {found[-1]}", flush=True)
    return found


def start(out: Path, workers: int, epochs: int) -> int:
    """Train in a process of its own and return its id."""
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


def train(out: Path, workers: int, epochs: int) -> None:
    torch.manual_seed(0)
    network = ResNet20()
    network.linear = nn.Sequential(nn.Dropout(0.1), network.linear)
    qmodel = dq.quantize(network, w_bits=2, a_bits=2, example_inputs=torch.zeros(1, 3, SIZE, SIZE))
    loaders = [
        DataLoader(Images(), batch_size=BATCH, shuffle=shuffle, num_workers=workers) for shuffle in (True, False)
    ]
    dq.finetune(qmodel, *loaders, out_dir=out, resume=True, epochs=epochs, **OPTIONS)


def differences(first: Checkpoint, second: Checkpoint) -> list[str]:
    """Names of tensors that are not identical, bit for bit, and `history` where what was measured is not."""
    keys = sorted(first.tensors.keys() | second.tensors.keys())
    differ = [k for k in keys if not torch.equal(first.tensors.get(k, NONE), second.tensors.get(k, NONE))]
    rows = [[{k: v for k, v in row.items() if k not in TIMES} for row in c.meta["history"]] for c in (first, second)]
    return differ + ["history"] * (rows[0] != rows[1])


NONE = torch.empty(0, 0, 0)

if __name__ == "__main__":
    main()
