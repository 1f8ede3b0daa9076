"""`daqconvert bench`: latency and size of a run's models, float and quantized, in torch and in ONNX Runtime."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn

from daqconvert.artifact import load
from daqconvert.artifact.manifest import MANIFEST
from daqconvert.cli import options as o
from daqconvert.cli import rundir
from daqconvert.cli.job import Opened
from daqconvert.cli.output import Output, say
from daqconvert.cli.rundir import size_of
from daqconvert.cli.sources import EVAL_BATCH, RUN, kind_of
from daqconvert.deploy.comparing.timing import REPEATS, ROUNDS, Call, Opener, Timing, onnx_opener, time_in_turns
from daqconvert.errors import ExportError
from daqconvert.report.progress import progress
from daqconvert.report.tables import render, simple_table
from daqconvert.sources import build_model, load_checkpoint

Source = Annotated[str, typer.Argument(help="A run directory, as daqconvert finetune makes one.")]
Batch = Annotated[int, o.option("--batch", "Images a call. Default: 1.")]
Threads = Annotated[int | None, o.option("--threads", "Threads of each contender. Default: torch's, all cores.")]
Rounds = Annotated[int, o.option("--rounds", f"Turns of each contender. Default: {ROUNDS}.")]
Repeats = Annotated[int, o.option("--repeats", f"Timed calls in a turn. Default: {REPEATS}.")]

FILES = {
    "torch": rundir.FLOAT, "float_onnx": rundir.FLOAT_ONNX, "frozen": rundir.ARTIFACT, "onnx": rundir.ONNX
}  # fmt: skip
NAMES = {  # key of `FILES`: what the model is, its runtime, and the key of the float model to compare with
    "torch": ("float", "PyTorch", "torch"),
    "float_onnx": ("float", "ONNX Runtime", "float_onnx"),
    "frozen": ("{bits}, frozen", "PyTorch", "torch"),
    "onnx": ("{bits}", "ONNX Runtime", "float_onnx"),
}


def bench_command(
    source: Source, code_model: o.CodeModel = None, batch: Batch = 1, threads: Threads = None,
    rounds: Rounds = ROUNDS, repeats: Repeats = REPEATS, as_json: o.Json = False,
) -> None:  # fmt: skip
    """Take the time (median and 95th percentile of a call) and the size of a run's models.

    Each model has a process of its own, and they take turns; images are random ones of the run's size.
    """
    threads = torch.get_num_threads() if threads is None else threads
    with Output(as_json).capturing() as output:
        _check(source, batch=batch, threads=threads, rounds=rounds, repeats=repeats)
        path = Path(source)
        config, opened = rundir.open_run(path, code_model, EVAL_BATCH)
        images = torch.rand(batch, *opened.example.shape[1:], generator=torch.Generator().manual_seed(0))
        times = _times(path, opened, images, threads, rounds, repeats)
        document = {
            "run": source, "model": str(config.job.source), "bits": config.plan.label, "batch": batch,
            "input": list(images.shape[1:]), "threads": threads, "rounds": rounds, "repeats": repeats,
            "models": _rows(path, times),
        }  # fmt: skip
        output.show(bench_text(document), document)


def _check(source: str, **numbers: int) -> None:
    for name, value in numbers.items():
        if value < 1:
            raise ExportError(f"--{name} {value}: expected 1 or more.")
    if kind_of(source) != RUN:
        raise ExportError(f"{source}: expected a run directory. daqconvert finetune --out FOLDER makes one.")


def _times(path: Path, opened: Opened, images: Tensor, threads: int, rounds: int, repeats: int) -> dict[str, Timing]:
    openers = run_openers(path, opened, images)
    for key in [key for key in FILES if key not in openers]:
        code = ["--model", str(opened.source)] if opened.source.kind == "import" else []
        making = {"frozen": "freeze", "onnx": "export"}.get(key)
        command = shlex.join(["daqconvert", making, str(path), *code]) if making else ""
        say(f"{path} has no {FILES[key]}: not timed." + f" {command} makes it." * bool(command))
    with progress(len(openers) * (rounds + 1), "taking times") as bar:
        return time_in_turns(openers, threads, rounds, repeats, tick=lambda name: bar.advance(1, of=name))


def _rows(path: Path, times: Mapping[str, Timing]) -> dict[str, dict[str, Any]]:
    """Return file, size and times of each model, also relative to the float model in the same runtime."""
    sizes = {key: size_of(path / FILES[key]) for key in times}
    rows = {}
    for key, timing in times.items():
        base = NAMES[key][2]
        there = base in times
        rows[key] = {
            "runtime": NAMES[key][1], "file": FILES[key], "bytes": sizes[key], "median_s": timing.median,
            "p95_s": timing.p95, "rounds_s": list(timing.rounds),
            "bytes_of_float": sizes[key] / sizes[base] if there else None,
            "time_of_float": timing.median / times[base].median if there else None,
        }  # fmt: skip
    return rows


def bench_text(document: Mapping[str, Any]) -> str:
    """Return the document of `daqconvert bench --json` as text: what was timed, and the table."""
    rows = [
        (
            NAMES[key][0].format(bits=document["bits"]), row["runtime"], row["file"],
            f"{row['bytes'] / 1000:.1f} kB", _ratio(row["bytes_of_float"]),
            f"{1000 * row['median_s']:.2f} ms", f"{1000 * row['p95_s']:.2f} ms", _ratio(row["time_of_float"]),
        )
        for key, row in document["models"].items()
    ]  # fmt: skip
    columns = ("model", "runtime", "file", "size", "of float", "median", "p95", "of float")
    images = "x".join(map(str, (document["batch"], *document["input"])))
    title = f"{document['run']}: {document['model']}, {images} a call, {document['threads']} threads"
    return f"{title}, {document['rounds']} rounds of {document['repeats']}\n{render(simple_table('', columns, rows))}"


def _ratio(value: float | None) -> str | None:
    return None if value is None else f"{value:.3f}"


def run_openers(path: Path, opened: Opened, images: Tensor) -> dict[str, Opener]:
    """Return, by key of `FILES`, how another process opens each model of a run whose file is there.

    The images are the argument of a timed call.
    """
    model = str(opened.source), opened.model_args
    array = images.cpu().numpy()
    plain = partial(_open_float, model, path / rundir.FLOAT, array)
    if opened.source.kind == "hf-hub":  # even its configuration is a download: no other process can build it
        plain = partial(_call, opened.model.cpu(), array)
    there: dict[str, Opener] = {
        "torch": plain,
        "float_onnx": onnx_opener(path / rundir.FLOAT_ONNX, images.cpu()),
        "frozen": partial(_open_frozen, model, path / rundir.ARTIFACT, array),
        "onnx": onnx_opener(path / rundir.ONNX, images.cpu()),
    }
    is_there = {key: (path / name / MANIFEST if key == "frozen" else path / name) for key, name in FILES.items()}
    return {key: opener for key, opener in there.items() if is_there[key].is_file()}


def _open_float(model: tuple[str, dict[str, Any]], weights: Path, array: Any, threads: int) -> Call:
    built = build_model(model[0], **model[1])
    load_checkpoint(built, weights)
    return _call(built, array)


def _open_frozen(model: tuple[str, dict[str, Any]], artifact: Path, array: Any, threads: int) -> Call:
    return _call(load(artifact, model=build_model(model[0], **model[1])), array)


def _call(model: nn.Module, array: Any, threads: int = 1) -> Call:
    return partial(model.eval(), torch.from_numpy(array))
