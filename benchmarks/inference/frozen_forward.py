"""What does a frozen model cost in torch? Time of a forward beside the float model's, and memory between forwards.

Before anything is timed, every element of the frozen model's output is compared with that of `qmodel.eval()`:
contiguous and channels_last, with weights decoded in each forward and kept (`daqconvert.cache_weights`). Each
contender runs in its own process, because one contender's use of the allocator would affect the time of the next. They
take turns; of the two forwards in a turn the second is timed. Batch 32, evaluation, `no_grad`, random weights:

    python benchmarks/inference/frozen_forward.py --threads 2 --rounds 9
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # `benchmarks` is a package there

import daqconvert as dq
from benchmarks import common

CASES: dict[str, dict[str, Any]] = {
    "resnet18 64 px W4A4": {"network": "resnet18", "pixels": 64, "bits": 4},
    "resnet18 128 px W4A4": {"network": "resnet18", "pixels": 128, "bits": 4},
    "resnet18 224 px W4A4": {"network": "resnet18", "pixels": 224, "bits": 4},
    "deit_tiny 224 px W8A8": {"network": "deit_tiny_patch16_224", "pixels": 224, "bits": 8},
}
CONTENDERS = ("float", "frozen", "cached")
BATCH, TARGET = 32, 1.3


def main() -> None:
    """Run every case and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--case", choices=CASES, action="append", help="only this one; may be given again")
    parser.add_argument("--work", choices=CONTENDERS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.work:
        work(args.work, args.case[0])
        return
    results = {name: race(name, args.threads, args.rounds) for name in args.case or CASES}
    path = common.write("frozen_forward", {"batch": BATCH, "target": TARGET, "rounds": args.rounds, "cases": results})
    print(f"wrote {path.name}")


def race(case: str, threads: int, rounds: int) -> dict[str, Any]:
    """Let the contenders of one case take turns; return ratios of minima and medians, and memory between forwards."""
    command = [sys.executable, __file__, "--threads", str(threads), "--case", case, "--work"]
    workers = {
        name: subprocess.Popen([*command, name], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for name in CONTENDERS
    }
    try:
        facts = {name: json.loads(ask(worker)) for name, worker in workers.items()}
        times: dict[str, list[float]] = {name: [] for name in CONTENDERS}
        for _ in range(rounds):
            for name, worker in workers.items():
                assert worker.stdin is not None
                worker.stdin.write("run\n")
                worker.stdin.flush()
                times[name].append(float(ask(worker)))
    finally:
        for worker in workers.values():
            worker.kill()
            worker.wait()
    result: dict[str, Any] = {"float seconds": round(min(times["float"]), 4)}
    for name in CONTENDERS[1:]:
        result[name] = {
            "time / float, minima": round(min(times[name]) / min(times["float"]), 3),
            "time / float, medians": round(statistics.median(times[name]) / statistics.median(times["float"]), 3),
            **facts[name],
        }
    print(case, json.dumps(result, indent=1))
    return result


def ask(worker: subprocess.Popen[str]) -> str:
    """Return the next line that a worker prints."""
    assert worker.stdout is not None
    line = worker.stdout.readline()
    if not line:
        raise SystemExit(f"a worker ended: {worker.args}")
    return line


def work(contender: str, case: str) -> None:
    """Build one contender, check it, print what it holds, and run one forward for each line that is read."""
    model, x, facts = build(contender, **CASES[case])
    print(json.dumps(facts), flush=True)
    with torch.no_grad():
        for _ in sys.stdin:
            model(x)
            start = time.perf_counter()
            model(x)
            print(time.perf_counter() - start, flush=True)


def build(contender: str, network: str, pixels: int, bits: int) -> tuple[nn.Module, Tensor, dict[str, Any]]:
    """Return a contender, the batch, and what was found about it."""
    torch.manual_seed(0)
    model = timm.create_model(network).eval()
    x = torch.randn(BATCH, 3, pixels, pixels)
    if contender == "float":
        return model, x, {}
    qmodel = dq.quantize(model, w_bits=bits, a_bits=bits)
    dq.calibrate(qmodel, [x[:8]])
    frozen = dq.freeze(qmodel.eval())
    kept = dq.cache_weights(frozen) if contender == "cached" else 0
    last = x[:4].to(memory_format=torch.channels_last)
    with torch.no_grad():
        same = torch.equal(frozen(x), qmodel(x)) and torch.equal(frozen(last), qmodel(last))
    if not same:
        raise SystemExit(f"{network}: the frozen model does not compute what the quantized one does")
    coded = sum(t.numel() for name, t in frozen.named_buffers() if name.endswith("weight_codes"))
    everything = sum(t.nbytes for t in model.state_dict().values())
    target = coded + everything - 4 * coded  # a byte for each weight with codes, plus the float rest
    del model, qmodel, last
    facts = {
        "identical to qmodel.eval()": same,
        "bytes at rest": at_rest(x),
        "int8 codes and float rest": target,
        "kept by cache_weights": kept,
    }
    return frozen, x, facts


def at_rest(*aside: Tensor) -> int:
    """Return the bytes of all tensors alive in this process, except the given ones."""
    gc.collect()
    found = [t for t in gc.get_objects() if isinstance(t, Tensor)]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in found}
    for tensor in aside:
        storages.pop(tensor.untyped_storage().data_ptr(), None)
    return sum(storages.values())


if __name__ == "__main__":
    main()
