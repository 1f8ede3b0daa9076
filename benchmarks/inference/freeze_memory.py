"""How much memory do `freeze` and `save` need? Peak resident memory over the bytes of the float state dict.

A fresh process imports everything and does the same with a tiny network, so that all code is loaded. It builds the
quantized model (random weights, bounds from one image), deletes the float one, resets the counter of the peak, and
runs `freeze` and `save`; then the artifact is loaded again and compared. The ratio includes the quantized model
itself, 1.0, and what its quantizers keep of their weights, but not the code:

    python benchmarks/inference/freeze_memory.py
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # `benchmarks` is a package there

import daqconvert as dq
from benchmarks import common

NETWORK, TARGET = "vit_large_patch16_224", 1.3
BITS = ((4, 4), (8, 8), (1, 8))


def main() -> None:
    """Measure each width in a process of its own and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", default=NETWORK)
    parser.add_argument("--work", type=int, nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        print(json.dumps(measure(args.network, *args.work)))
        return
    results = {}
    for w_bits, a_bits in BITS:
        command = [sys.executable, __file__, "--network", args.network, "--work", str(w_bits), str(a_bits)]
        said = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        results[f"W{w_bits}A{a_bits}"] = json.loads(said.splitlines()[-1])
        print(f"W{w_bits}A{a_bits}", json.dumps(results[f"W{w_bits}A{a_bits}"], indent=1))
    path = common.write("freeze_memory", {"network": args.network, "target": TARGET, "widths": results})
    print(f"wrote {path.name}")


def resident(peak: bool = False) -> int:
    """Return the resident bytes of this process, now or at the peak."""
    key = "VmHWM:" if peak else "VmRSS:"
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024


def calibrated(network: str, w_bits: int, a_bits: int) -> tuple[nn.Module, Tensor]:
    """Return a quantized network that has computed already, and an image for it."""
    model = timm.create_model(network).eval()
    qmodel = dq.quantize(model, w_bits=w_bits, a_bits=a_bits)
    x = torch.randn(1, *model.default_cfg["input_size"])
    dq.calibrate(qmodel, [x], method="minmax")
    qmodel.eval()
    with torch.no_grad():
        qmodel(x)
    return qmodel, x


def is_float(name: str) -> bool:
    """Whether a key of the quantized model's state dict is one of the float model's."""
    return "quantizer." not in name and not name.endswith("output_scale")


def measure(network: str, w_bits: int, a_bits: int) -> dict[str, Any]:
    """Freeze and save one model; return the peak over the bytes of its float state dict, after checking the files."""
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        tiny, _ = calibrated("test_vit", 8, 8)
        dq.save(dq.freeze(tiny), Path(folder) / "artifact", source="timm:test_vit")
    del tiny
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    start = resident()
    qmodel, x = calibrated(network, w_bits, a_bits)
    size = sum(t.nbytes for name, t in qmodel.state_dict().items() if is_float(name))
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # memory that is left over from building does not count
    before = resident()
    Path("/proc/self/clear_refs").write_text("5")  # the peak from here on
    frozen = dq.freeze(qmodel)
    after_freeze = resident(peak=True)
    with tempfile.TemporaryDirectory() as folder:
        artifact = dq.save(frozen, Path(folder) / "artifact", source=f"timm:{network}")
        after_save = resident(peak=True)
        stored = sum(file.stat().st_size for file in artifact.iterdir())
        with torch.no_grad():
            expected = qmodel(x)
            same = torch.equal(frozen(x), expected) and torch.equal(dq.load(artifact)(x), expected)
    if not same:
        raise SystemExit(f"{network}: frozen, or saved and loaded, it does not compute what the quantized one does")
    return {
        "float state dict, bytes": size,
        "code alone, bytes": start,
        "quantized model / float": round((before - start) / size, 3),
        "peak of freeze / float": round((after_freeze - start) / size, 3),
        "peak of freeze and save / float": round((after_save - start) / size, 3),
        "artifact / float": round(stored / size, 4),
        "saved and loaded identical": same,
    }


if __name__ == "__main__":
    main()
