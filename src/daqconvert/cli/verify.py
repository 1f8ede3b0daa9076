"""`daqconvert verify`: a run's float, trained, frozen and exported model side by side, or any two models or files."""

from __future__ import annotations

import itertools
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import nn

from daqconvert.artifact import load, read_manifest
from daqconvert.artifact.manifest import MANIFEST
from daqconvert.cli import options as o
from daqconvert.cli import rundir
from daqconvert.cli.job import DEMO_MODEL, Job
from daqconvert.cli.output import Output, say
from daqconvert.cli.sources import (
    MODEL,
    RUN,
    data_changes,
    example_image,
    kind_of,
    load_artifact,
    loaders_of,
    open_named,
    refuse,
)
from daqconvert.deploy.comparing.export_report import db_text
from daqconvert.deploy.comparing.verify_report import VerifyReport, plot_reports, share_text
from daqconvert.deploy.comparing.verifying import Model, Pair, verify_all
from daqconvert.deploy.onnx.runtime import PROGRAM, OnnxModel, program_shapes
from daqconvert.errors import DataError, ExportError
from daqconvert.models import copy_model
from daqconvert.report.tables import render, simple_table

Source = Annotated[
    str, typer.Argument(help=f"A run directory; or an artifact, an ONNX file, a .pt2 program, or a model ({o.FORMS}).")
]
Other = Annotated[
    str | None, typer.Argument(help="What the first is compared with, unless that is a run.", show_default=False)
]
Plot = Annotated[Path | None, o.option("--plot", "Draw SQNR by depth into this .png, .svg or .pdf.")]
Images = Annotated[int, o.option("--images", "Images to compare on. Default: 256.")]
IMAGES, BATCH = 256, 8  # small batches: the outputs of all layers of all models are held at once
FILE = "exported file"


@dataclass(frozen=True)
class Compared:
    """What is compared, and on what.

    Attributes:
        models: The models, by the word that tables have for each.
        pairs: What is compared: the words of a reference and a candidate.
        batches: Batches of images.
        data: What the images are, in words.
    """

    models: dict[str, Model]
    pairs: list[Pair]
    batches: Any
    data: str


def verify_command(
    *, source: Source, other: Other = None, code_model: o.CodeModel = None, weights: o.ModelOptions,
    data: Annotated[o.DataOptions, o.Without("val")], images: Images = IMAGES, plot: Plot = None,
    as_json: o.Json = False,
) -> None:  # fmt: skip
    """Compare models on held-out images: top-1, codes, the SQNR of every layer, and where they first differ.

    Of a run: each stage - float, trained, frozen, exported - with the one before, and the last with float. Of two
    artifacts, ONNX files or models: the second with the first; without data of their own, on random images.
    """
    with Output(as_json).capturing() as output:
        size = data.batch_size or BATCH
        _check(images, size)
        name = DEMO_MODEL if other is None else next((t for t in (source, other) if _kind(t) == MODEL), None)
        job = o.job_from(name or DEMO_MODEL, weights, data)
        if name is None or other is None:
            refuse("run" if other is None else "pair of files", weights)
        if other is None:
            found = _stages(source, code_model, job, size)
        else:
            found = _two(source, other, code_model, job, size, images)
        reports = verify_all(found.models, found.pairs, _first(found.batches, images))
        if plot is not None:
            plot_reports(reports, plot, f"{source}, {reports[0].samples} images of {found.data}")
        document = {"target": source, "data": found.data, "comparisons": [report.to_dict() for report in reports]}
        output.show(_text(f"{source} on {found.data}", reports), document)


def _check(*numbers: int) -> None:
    if min(numbers) < 1:
        raise DataError("--images and --batch-size: expected 1 or more.")


def _kind(source: str) -> str:
    """Return the kind of a source: `"run"`, `"artifact"`, `"model"`, or `FILE`."""
    return FILE if source.lower().endswith((".onnx", PROGRAM)) else kind_of(source)


def _stages(source: str, typed: str | None, job: Job, size: int) -> Compared:
    """Return the models of a run, in the order in which they were made, and its held-out images."""
    if _kind(source) != RUN:
        raise ExportError(
            f"{source} is no run directory. Say what to compare it with: "
            f"daqconvert verify {shlex.quote(source)} OTHER."
        )
    path = Path(source)
    config, opened = rundir.open_run(path, typed, size, data_changes(job))
    plain = copy_model(opened.model)
    models: dict[str, Model] = {"float": plain}
    if (path / rundir.BEST).is_file():
        models["trained"] = rundir.quantized_model(path, config, opened)
    if (path / rundir.ARTIFACT / MANIFEST).is_file():
        models["frozen"] = load(path / rundir.ARTIFACT, model=copy_model(plain))
    if (path / rundir.ONNX).is_file():
        models["exported"] = path / rundir.ONNX
    for stage, file in {"trained": rundir.BEST, "frozen": rundir.ARTIFACT, "exported": rundir.ONNX}.items():
        if stage not in models:
            say(f"{path} has no {file}: nothing to compare for {stage!r}.")
    names = list(models)
    if len(names) < 2:
        raise ExportError(f"{path}: nothing to compare with its float model yet.")
    pairs = list(itertools.pairwise(names))
    if len(names) > 2:
        pairs.append((names[0], names[-1]))
    return Compared(models, pairs, opened.loaders.val, opened.loaders.description)


def _two(source: str, other: str, typed: str | None, job: Job, size: int, images: int) -> Compared:
    """Return two models or files, and images that fit them."""
    kinds = {source: _kind(source), other: _kind(other)}
    if source == other or RUN in kinds.values() or list(kinds.values()) == [MODEL, MODEL]:
        raise ExportError("expected two different ones: artifacts or ONNX files, or one of these and a model's name.")
    built: dict[str, nn.Module] = {}
    loaders = None
    for name, kind in kinds.items():
        if kind == MODEL:
            opened = open_named(job, size)
            built[name], loaders = opened.model, opened.loaders
        elif kind != FILE:
            built[name] = load_artifact(Path(name), typed)
            if job.data is not None and loaders is None:
                loaders = loaders_of(Path(name), built[name], job, size)
    models: dict[str, Model] = {name: built.get(name, Path(name)) for name in kinds}
    if loaders is not None:
        return Compared(models, [(source, other)], loaders.val, loaders.description)
    if job.data is not None:
        raise DataError("--data: two ONNX files do not say how images are normalized. Compare one with its artifact.")
    shape = _shape(kinds, built, job)
    about = f"random images of {'x'.join(map(str, shape))}"
    return Compared(models, [(source, other)], _random(shape, size, images), about)


def _shape(kinds: dict[str, str], built: dict[str, nn.Module], job: Job) -> tuple[int, ...]:
    """Return the size of an image: that of an exported file, else as typed, else that of an artifact's model."""
    for name in [name for name, kind in kinds.items() if kind == FILE]:
        shapes = program_shapes(Path(name)) if name.lower().endswith(PROGRAM) else OnnxModel(name).input_shapes
        size = [length for length in shapes[0][1:] if isinstance(length, int)]
        if len(shapes) == 1 and len(size) == len(shapes[0]) - 1:
            return tuple(size)
    for name, model in built.items():
        example = example_image(model, str(read_manifest(Path(name)).source or ""), job.input_size)
        if example is not None:
            return tuple(example.shape[1:])
    raise DataError("The size of the images is not known. Give --input-size.")


def _random(shape: Sequence[int], size: int, images: int) -> Iterator[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    for start in range(0, images, size):
        yield torch.randn(min(size, images - start), *shape, generator=generator)


def _first(batches: Any, images: int) -> Iterator[torch.Tensor]:
    """Yield the batches up to a number of images; the last batch may be cut."""
    left = images
    for batch in batches:
        found = (batch if isinstance(batch, torch.Tensor) else batch[0])[:left]
        yield found
        left -= len(found)
        if left <= 0:
            return


def _text(title: str, reports: Sequence[VerifyReport]) -> str:
    """Return a table of the comparisons, one of the layers, and where each pair first differs."""
    rows = [
        (
            f"{report.candidate} / {report.reference}", report.samples,
            "-" if report.agreement is None else share_text(report.agreement),
            "-" if report.code_agreement is None else share_text(report.code_agreement), db_text(report.sqnr),
        )
        for report in reports
    ]  # fmt: skip
    head = render(simple_table("", ("compared", "images", "same top-1", "same codes", "SQNR of output"), rows))
    where = [f"{report.candidate} / {report.reference}: {report.where()}" for report in reports]
    return "\n".join([title, head, "", _layers(reports), "", *where])


def _layers(reports: Sequence[VerifyReport]) -> str:
    columns, cells = ["layer"], []
    for report in reports:
        found = {row.name: row for row in report.layers}
        columns.append(f"{report.candidate} / {report.reference}")
        cells.append({name: "-" if row.sqnr is None else db_text(row.sqnr) for name, row in found.items()})
        if report.codes:
            columns.append("other codes")
            cells.append({name: str(row.differing) if row.codes else "-" for name, row in found.items()})
    names = dict.fromkeys(row.name for report in reports for row in report.layers)
    rows = [(name or "(root)", *(column.get(name, "-") for column in cells)) for name in names]
    return render(simple_table("", columns, rows)) if rows else "No layer could be read in both."
