"""The options that commands share, in groups, and how the values that users type are read.

A group is a dataclass: each field is an option, named like its flag (`w_bits` is `--w-bits`). A command has parameters
for its groups. Typer knows no groups, so `grouped` makes an option of each field and calls the command with instances:

    def freeze_command(*, source: Source, data: Annotated[o.DataOptions, o.Without("val")], as_json: o.Json = False)
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import json
import re
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import typer

from daqconvert.cli.job import Job
from daqconvert.errors import DataError, PolicyError, TrainingError
from daqconvert.policy.arguments import build
from daqconvert.spec import Policy, Settings
from daqconvert.training.recipes import parse_overrides
from daqconvert.training.recipes.recipe import FIELDS

DEFAULT_BITS = 4
SETTINGS = frozenset(item.name for item in dataclasses.fields(Settings))
FORMS = "timm name, torchvision:NAME, hf-hub:ORG/NAME or module:function"


def option(flag: str, text: str) -> Any:
    """Return typer's declaration of an option: its flag as typed, and its text on the help page."""
    return typer.Option(flag, help=text, show_default=False)


ModelArg = Annotated[list[str] | None, option("--model-arg", "KEY=VALUE for the builder; repeatable.")]
CodeModel = Annotated[
    str | None, option("--model", "The run's model, where it is a module:function: typed again to allow it.")
]
InputSize = Annotated[int | None, option("--input-size", "Height and width of the images.")]
Json = Annotated[bool, option("--json", "Print one JSON document on standard output, and nothing else there.")]
Overwrite = Annotated[bool, option("--overwrite", "Replace what is there.")]


@dataclass(frozen=True)
class ModelOptions:
    """The weights of a model by name, and the arguments of its builder."""

    pretrained: Annotated[bool, option("--pretrained", "Download (or take from the cache) published weights.")] = False
    checkpoint: Annotated[Path | None, option("--checkpoint", "File of float weights: .safetensors or torch.")] = None
    model_arg: ModelArg = None


@dataclass(frozen=True)
class DataOptions:
    """The images that a model is trained, calibrated or measured on."""

    data: Annotated[
        str | None,
        option("--data", "Folder of images, .parquet file or timm data set name. Default: scikit-learn's digits."),
    ] = None
    val: Annotated[
        Path | None,
        option("--val", "Folder or .parquet file to evaluate on, all of it; then all of --data is trained on."),
    ] = None
    holdout: Annotated[
        float | None,
        option(
            "--holdout", "Share (below 1) or number (1 or more) of the images that are held out. Default: a tenth."
        ),
    ] = None
    data_root: Annotated[Path | None, option("--data-root", "Where a timm data set lies. Default: data.")] = None
    download: Annotated[bool, option("--download", "Allow a timm data set to be downloaded.")] = False
    input_size: InputSize = None
    num_classes: Annotated[int | None, option("--num-classes", "Number of classes, where the data does not say.")] = (
        None
    )
    classes: Annotated[
        Path | None,
        option(
            "--classes",
            "Text file of class names, one a line, in the order of the model's outputs. Default: "
            "those of the run or artifact, or of the published weights, else the data's own order.",
        ),
    ] = None
    batch_size: Annotated[
        int | None, option("--batch-size", "Images a batch. Default: the recipe's; eval takes 64, verify 8.")
    ] = None
    workers: Annotated[int, option("--workers", "Processes that decode images.")] = 0


@dataclass(frozen=True)
class PolicyOptions:
    """Which layers get how many bits."""

    policy: Annotated[str | None, option("--policy", "A policy file (TOML).")] = None
    preset: Annotated[str | None, option("--preset", "A preset, such as paper-w1a1.")] = None
    w_bits: Annotated[
        str | None,
        option("--w-bits", "Bits of the weights, 1 to 8, or float. Default: 4, or what --policy or --preset says."),
    ] = None
    a_bits: Annotated[
        str | None,
        option("--a-bits", "Bits of the inputs, 1 to 8, or float. Default: 4, or what --policy or --preset says."),
    ] = None
    first: Annotated[str | None, option("--first", "First layers: W,A bits or float. Default: 8,8.")] = None
    last: Annotated[str | None, option("--last", "Last layers: W,A bits or float. Default: 8,8.")] = None
    include: Annotated[
        list[str] | None, option("--include", "The only layers to convert: a name or pattern; repeatable.")
    ] = None
    exclude: Annotated[
        list[str] | None, option("--exclude", "Layers to leave alone: a name or pattern; repeatable.")
    ] = None
    bits: Annotated[
        list[str] | None, option("--bits", "LAYER=W/A, or LAYER=BITS for both, as layer4.*=2 or fc=float; repeatable.")
    ] = None
    attention: Annotated[
        str | None,
        option("--attention", "Bits of both operands of attention products. Default: left in floating point."),
    ] = None
    share_inputs: Annotated[
        bool, option("--share-inputs", "One input quantizer for layers that read the same tensor at the same bits.")
    ] = False
    target: Annotated[
        str | None,
        option("--target", "The runtime to quantize for, as tensorrt or litert: integers in the form it needs."),
    ] = None
    set: Annotated[
        list[str] | None, option("--set", "KEY=VALUE of any other setting, as granularity=tensor; repeatable.")
    ] = None

    def read(self) -> Policy | None:
        """Return the policy that these options ask for, or None if they say nothing.

        Raises:
            PolicyError: If one of them cannot be read; names the option.

        Example:
            >>> asked = PolicyOptions(w_bits="2", first="float", set=["rounding=ste"]).read()
            >>> asked.default.w_bits, asked.default.a_bits, asked.first, asked.default.rounding
            (2, 4, None, 'ste')
        """
        found: dict[str, Any] = {"policy": self.policy, "preset": self.preset, "exclude": self.exclude or None}
        found |= {"include": self.include or None, "bits": layer_bits(self.bits) or None}
        found |= {"share_inputs": self.share_inputs or None, "target": self.target}
        found = {key: value for key, value in found.items() if value is not None}
        for key, text in (("w_bits", self.w_bits), ("a_bits", self.a_bits), ("attention", self.attention)):
            if text is not None:
                found[key] = _bits(text, f"--{key.replace('_', '-')}")
        for key, text in (("first", self.first), ("last", self.last)):
            if text is not None:
                found[key] = _position(text, f"--{key}")
        found |= pairs(self.set, "--set")
        if not found:
            return None
        if not {"policy", "preset"} & found.keys():  # the option that was not given keeps its default
            found = {"w_bits": DEFAULT_BITS, "a_bits": DEFAULT_BITS} | found
        return build(**found)


class Without:
    """Says which options of a group a command does not have: `Annotated[o.DataOptions, o.Without("val")]`."""

    def __init__(self, *names: str) -> None:
        self.names = names


@dataclass(frozen=True)
class RecipeOptions:
    """How a model is trained: a recipe, and what is changed in it."""

    recipe: Annotated[
        str | None, option("--recipe", "A name that daqconvert recipes shows, or a TOML file. Default: quick.")
    ] = None
    epochs: Annotated[int | None, option("--epochs", "Epochs of finetuning.")] = None
    lr: Annotated[float | None, option("--lr", "Learning rate of the weights.")] = None
    quantizer_lr: Annotated[float | None, option("--quantizer-lr", "Learning rate of the quantizers.")] = None
    distill: Annotated[float | None, option("--distill", "Weight of distillation, 0 to 1.")] = None
    seed: Annotated[int | None, option("--seed", "Seed of everything random.")] = None
    with_: Annotated[
        list[str] | None,
        option("--with", "FIELD=VALUE of any field of the recipe, as clip_grad=1; repeatable."),
    ] = None

    def changes(self, batch_size: int | None = None) -> dict[str, Any]:
        """Return the fields of the recipe that the user changed, by `--with` and by options of their own.

        Raises:
            TrainingError: If one of them is no field, cannot be read, or is given in both ways.

        Example:
            >>> RecipeOptions(with_=["clip_grad=1", "mixup=0.2"], epochs=3).changes()
            {'clip_grad': 1.0, 'mixup': 0.2, 'epochs': 3}
        """
        try:
            found = parse_overrides(self.with_ or [])
        except TrainingError as error:
            raise TrainingError(str(error).replace("override", "--with", 1)) from None
        own = given(self) | ({} if batch_size is None else {"batch_size": batch_size})
        own = {name: value for name, value in own.items() if name not in ("recipe", "with_")}
        for name in found.keys() & own.keys():
            raise TrainingError(f"--{name.replace('_', '-')} and --with {name}: give one of them.")
        return found | own


def grouped(command: Callable[..., None]) -> Callable[..., None]:
    """Return a command as typer reads it: each group among its parameters is replaced by the group's fields.

    Example:
        >>> def command(*, name: str, data: Annotated[DataOptions, Without("val", "holdout")]) -> None:
        ...     print(name, data.workers)
        >>> list(inspect.signature(grouped(command)).parameters)[:4]
        ['name', 'data', 'data_root', 'download']
    """
    signature = inspect.signature(command, eval_str=True)
    parameters: list[inspect.Parameter] = []
    groups: dict[str, tuple[Any, list[str]]] = {}
    for parameter in signature.parameters.values():
        annotation = parameter.annotation
        group, *marks = get_args(annotation) if get_origin(annotation) is Annotated else (annotation,)
        if not dataclasses.is_dataclass(group):
            parameters.append(parameter)
            continue
        absent = [name for mark in marks if isinstance(mark, Without) for name in mark.names]
        hints = get_type_hints(group, include_extras=True)
        fields = [item for item in dataclasses.fields(group) if item.name not in absent]
        groups[parameter.name] = group, [item.name for item in fields]
        parameters += [
            parameter.replace(name=item.name, default=item.default, annotation=hints[item.name]) for item in fields
        ]

    @functools.wraps(command)
    def run(**typed: Any) -> None:
        made = {name: group(**{key: typed.pop(key) for key in keys}) for name, (group, keys) in groups.items()}
        command(**typed, **made)

    run.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    return run


def given(group: Any) -> dict[str, Any]:
    """Return the options of a group that the user gave: those whose value is not the default.

    Example:
        >>> given(DataOptions(data="photos", workers=0))
        {'data': 'photos'}
    """
    found = {item.name: (getattr(group, item.name), item.default) for item in dataclasses.fields(group)}
    return {name: value for name, (value, default) in found.items() if value not in (default, [])}


def as_options(said: str) -> str:
    """Return an error of the library in the words of the command line: options instead of Python's arguments.

    Example:
        >>> as_options('Pass overwrite=True, or exclude=["head.fc"], or w_bits=4, normalize=False or clip_grad=1.0.')
        'Pass --overwrite, or --exclude head.fc, or --w-bits 4, --set normalize=false or --with clip_grad=1.0.'
        >>> as_options("recipe 'quick': momentum: expected a number of 0 or more and below 1; found 2.")
        '--with momentum: expected a number of 0 or more and below 1; found 2.'
    """
    named = NAMED.sub(lambda found: f"{_flag(found[1])}:", said, count=1).replace("or None (32)", "or float (32)")
    named = re.sub("^arguments: ", "options: ", named)
    named = named.replace("pass dynamic_batch=False", "export it in Python, with dynamic_batch=False")  # no option
    return OUT_DIR.sub("--out", ARGUMENT.sub(_as_option, named))


NAMED = re.compile(r"^(?:arguments:?|recipe '[^']*':) (\w+):")
# an argument stands between blanks or brackets, with a comma or full stop; `runs/lr=0.1` and `lr=0.1/best` are paths
ARGUMENT = re.compile(
    r"(?<![^\s(])(--[\w-]+ '?)?([a-z]\w*)=(\[[^\]]*\]|\"[^\"]*\"|'[^']*'|[\w+-]+(?:\.\w+)*)(?![\w/=]|[.,][\w/])"
)
OUT_DIR = re.compile(r"(?<![\w/.-])out_dir(?![\w/-])")
FLAGS = ("resume", "overwrite", "share_inputs", "pretrained")
VALUES = frozenset(item.name for group in (PolicyOptions, RecipeOptions) for item in dataclasses.fields(group))


def _as_option(found: re.Match[str]) -> str:
    typed, name, value = found[1], found[2], found[3].strip("\"'")
    flag = _flag(name)
    if typed:  # `--with clip_grad=1` is an option already
        return found[0]
    if name in FLAGS:
        return flag if value == "True" else f"no {flag}"
    if name in ("include", "exclude"):
        return " ".join(
            f"{flag} {shlex.quote(item.strip(chr(34) + chr(39)))}" for item in value.strip("[]").split(", ")
        )
    plain = {"True": "true", "False": "false", "None": "float"}.get(value, value)
    if name in VALUES | FIELDS.keys() | SETTINGS:
        return f"{flag}{' ' if name in VALUES else '='}{plain}"
    return found[0]


def _flag(name: str) -> str:
    """Return the option by which a field of a policy or a recipe is set."""
    if name in VALUES | {"include", "exclude", *FLAGS}:
        return f"--{name.replace('_', '-')}"
    return f"--with {name}" if name in FIELDS else f"--set {name}"


def default_policy() -> Policy:
    """Return the policy without any option: 4 bits for weights and inputs, 8 for first and last layers."""
    return build(w_bits=DEFAULT_BITS, a_bits=DEFAULT_BITS)


def layer_bits(texts: list[str] | None) -> dict[str, Any]:
    """Return `["layer4.*=2", "fc=8/float"]` as `{"layer4.*": 2, "fc": (8, None)}`.

    Raises:
        PolicyError: If one of them is not of that form.

    Example:
        >>> layer_bits(["layer4.*=2", "fc=8/float", "head=float"])
        {'layer4.*': 2, 'fc': (8, None), 'head': None}
    """
    found: dict[str, Any] = {}
    for text in texts or []:
        name, equals, value = text.rpartition("=")
        parts = value.split("/")
        if not equals or len(parts) > 2:
            raise PolicyError(f"--bits {text!r}: expected LAYER=W/A such as fc=8/8, or LAYER=BITS for both.")
        bits = tuple(_bits(part, f"--bits {name}=") for part in parts)
        found[name] = bits if len(bits) == 2 else bits[0]
    return found


def _bits(text: str, option: str) -> int | None:
    if text.strip().lower() in ("float", "none", "32"):
        return None
    try:
        return int(text)
    except ValueError:
        raise PolicyError(f"{option} {text!r}: expected 1 to 8, or float.") from None


def _position(text: str, option: str) -> tuple[int | None, ...] | None:
    if text.strip().lower() in ("float", "none"):
        return None
    bits = tuple(_bits(part, option) for part in text.split(","))
    if len(bits) != 2:
        raise PolicyError(f"{option} {text!r}: expected W,A bits such as 8,8, or float.")
    return bits


def pairs(texts: list[str] | None, option: str) -> dict[str, Any]:
    """Return `["a=1", "b=x"]` as `{"a": 1, "b": "x"}`; values are read as JSON where they are JSON.

    Raises:
        PolicyError: If one of them has no `=`.

    Example:
        >>> pairs(["depth=3", "name=a", "flag=true"], "--set")
        {'depth': 3, 'name': 'a', 'flag': True}
    """
    found: dict[str, Any] = {}
    for text in texts or []:
        key, equals, value = text.partition("=")
        if not key or not equals:
            raise PolicyError(f"{option} {text!r}: expected KEY=VALUE.")
        try:
            found[key.strip().replace("-", "_")] = json.loads(value)
        except json.JSONDecodeError:
            found[key.strip().replace("-", "_")] = value
    return found


def job_from(source: str | None, weights: ModelOptions, data: DataOptions, seed: int | None = None) -> Job:
    """Return the job that a model's name and the options on its weights and data describe."""
    return Job(
        model=source,
        model_args=pairs(weights.model_arg, "--model-arg"),
        pretrained=weights.pretrained,
        checkpoint=_text(weights.checkpoint),
        data=data.data,
        val=_text(data.val),
        holdout=holdout_value(data.holdout),
        data_root=_text(data.data_root),
        download=data.download,
        input_size=data.input_size,
        num_classes=data.num_classes,
        classes=_text(data.classes),
        workers=data.workers,
        seed=seed or 0,
    )


def _text(path: Path | None) -> str | None:
    return None if path is None else str(path)


def holdout_value(value: float | None) -> float | int | None:
    """Return a share as it is and a number of images as an integer.

    Raises:
        DataError: If it is negative, or neither a share nor a whole number.

    Example:
        >>> holdout_value(0.1), holdout_value(500.0)
        (0.1, 500)
    """
    if value is None or 0 < value < 1:
        return value
    if not value >= 1 or value != int(value):
        raise DataError(f"--holdout {value:g}: expected a share below 1, or a number of images.")
    return int(value)
