"""How large are the ONNX file and the artifact of ResNet-18 at 1 to 4 bits, relative to the planned bits?

The planned size counts each weight at its planned bits, and 4 bytes for every other number of the float model's state
dict (batch norm, biases, counters). Scales, zero points, names, nodes and the plan are overhead. First and last layers
have 8 bits, as by default; weights are random. Both files are read back first: the artifact must load to the same
output, and the ONNX file must agree in ONNX Runtime.

    PYTHONPATH=src python benchmarks/inference/size.py [--bits 1 2 3 4] [--deploy float] [--explain]

`--explain` also says what the bytes of each file are.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torchvision.models import resnet18

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # `benchmarks` is a package there

import daqconvert as dq
from benchmarks import common
from daqconvert.convert import current_plan
from daqconvert.report.tables import render, simple_table

RESULT = "size"
ONNX_TARGET, ARTIFACT_TARGET = 1.05, 1.02
COLUMNS = ("bits", "planned", "ONNX file", "/ planned", "target", "met", "artifact", "/ planned", "target", "met")


def planned_bytes(model: nn.Module, bits: dict[str, int]) -> int:
    """Return the bytes of a float model's state dict with these weights at these bits, all else at 4 bytes a number.

    Args:
        model: The float model.
        bits: Planned bits, by name of the parameter.
    """
    state = model.state_dict()
    unknown = bits.keys() - state.keys()
    if unknown:
        raise SystemExit(f"{sorted(unknown)[0]} is no parameter of the float model")
    total = sum(value.numel() * bits.get(name, 32) for name, value in state.items())
    return -(-total // 8)


def distinct(model: nn.Module) -> nn.Module:
    """Return the model with random batch norms: new ones are equal, and the exporter stores equal tensors once."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight.data, module.running_var):
                tensor.uniform_(0.5, 1.5)
            for tensor in (module.bias.data, module.running_mean):
                tensor.normal_(0.0, 0.1)
    return model


def folder_bytes(path: Path) -> int:
    """Return the bytes of all files in a folder."""
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def measure(bits: int, deploy: str, explain: bool) -> dict[str, Any]:
    """Return the sizes at one width."""
    torch.manual_seed(0)
    model = distinct(resnet18(weights=None)).eval()
    images = torch.randn(2, 3, 224, 224)
    word = {"deploy": deploy} if deploy != "float" else {}
    qmodel = dq.quantize(model, w_bits=bits, a_bits=4, **word)
    dq.calibrate(qmodel, [images])
    frozen = dq.freeze(qmodel)
    rows = [row for row in current_plan(qmodel) if row.settings and row.settings.w_bits]
    planned = planned_bytes(model, {f"{row.name}.weight": row.settings.w_bits for row in rows})
    with tempfile.TemporaryDirectory() as folder:
        onnx, artifact = Path(folder) / "model.onnx", Path(folder) / "artifact"
        report = dq.export(frozen, onnx, images[:1])
        dq.save(frozen, artifact, source="torchvision:resnet18")
        with torch.no_grad():
            same = torch.equal(dq.load(artifact)(images), frozen(images))
        if not (same and report.agrees):
            raise SystemExit(f"W{bits}: loaded artifact identical: {same}; ONNX file agrees: {report.agrees}")
        sizes = {"onnx_bytes": onnx.stat().st_size, "artifact_bytes": folder_bytes(artifact)}
        parts = {"onnx_parts": onnx_parts(onnx), "artifact_parts": artifact_parts(artifact)} if explain else {}
    return {
        "planned_bytes": planned, **sizes, "onnx_ratio": round(sizes["onnx_bytes"] / planned, 4),
        "artifact_ratio": round(sizes["artifact_bytes"] / planned, 4), "layers": len(rows), **parts,
    }  # fmt: skip


def onnx_parts(path: Path) -> dict[str, int]:
    """Return the bytes of an ONNX file by kind: initializers by the last part of their name, nodes by operator."""
    import onnx

    model = onnx.load(path)
    found: Counter[str] = Counter()
    for tensor in model.graph.initializer:
        kind = "daq.*" if tensor.name.startswith("daq.") else tensor.name.rpartition(".")[2]
        found[f"{kind}: data"] += len(tensor.raw_data)
        found[f"{kind}: names and shapes"] += tensor.ByteSize() - len(tensor.raw_data)
    for node in model.graph.node:
        found[f"node {node.op_type}"] += node.ByteSize()
    for entry in model.metadata_props:
        found[f"metadata {entry.key}"] += entry.ByteSize()
    found["rest"] = path.stat().st_size - sum(found.values())
    return dict(found.most_common())


def artifact_parts(path: Path) -> dict[str, int]:
    """Return the bytes of an artifact by file, and of its tensors by the last part of their name."""
    from safetensors import safe_open

    found: Counter[str] = Counter()
    for file in sorted(file for file in path.rglob("*") if file.is_file()):
        if file.suffix != ".safetensors":
            found[file.name] += file.stat().st_size
            continue
        with safe_open(file, "pt") as tensors:
            named = {name: tensors.get_tensor(name).nbytes for name in tensors.keys()}  # noqa: SIM118 # no iterator
        for name, size in named.items():
            found[f"tensors {name.rpartition('.')[2]}"] += size
        found[f"{file.name}: header"] += file.stat().st_size - sum(named.values())
    return dict(found.most_common())


def table(results: dict[str, dict[str, Any]]) -> str:
    """Return the table of all widths."""
    rows = []
    for name, one in results.items():
        cells: list[str] = [name, f"{one['planned_bytes']:,}"]
        for key, target in (("onnx", ONNX_TARGET), ("artifact", ARTIFACT_TARGET)):
            ratio = one[f"{key}_ratio"]
            met = "yes" if ratio <= target else "NO"
            cells += [f"{one[f'{key}_bytes']:,}", f"{ratio:.4f}", f"<= {target:.2f}", met]
        rows.append(cells)
    return render(simple_table("", COLUMNS, rows))


def main() -> None:
    """Measure, write the results, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bits", type=int, nargs="+", default=[1, 2, 3, 4], choices=range(1, 9), metavar="BITS")
    parser.add_argument("--deploy", choices=("integer", "float"), default="integer")
    parser.add_argument("--explain", action="store_true")
    args = parser.parse_args()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        results = {f"W{bits}": measure(bits, args.deploy, args.explain) for bits in args.bits}
    targets = {"onnx": ONNX_TARGET, "artifact": ARTIFACT_TARGET}
    common.write(RESULT, {"network": "resnet18", "deploy": args.deploy, "targets": targets, "results": results})
    text = table(results)
    head = (
        "# Size of ResNet-18 beside its planned bits\n\n"
        "Made by `benchmarks/inference/size.py`, which says what is counted; "
        f"deployment: {args.deploy}; sizes in bytes.\n\n"
    )
    (common.RESULTS / f"{RESULT}.md").write_text(f"{head}{text}\n")
    print(text)
    for name, one in results.items() if args.explain else ():
        for key in ("onnx_parts", "artifact_parts"):
            print(f"\n{name}, {key.partition('_')[0]}:")
            print("\n".join(f"  {what:40} {size:>10,}" for what, size in one[key].items()))


if __name__ == "__main__":
    main()
