"""The options that commands share, and the readers of their values."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from daqconvert.cli.job import Job
from daqconvert.errors import DataError, PolicyError, TrainingError
from daqconvert.policy.arguments import build
from daqconvert.spec import Policy
from daqconvert.training.recipes import parse_overrides

DEFAULT_BITS = 4


def option(flag: str, text: str) -> Any:
    """Return typer's declaration of an option.

    Args:
        flag: As typed, with its dashes.
        text: For the help page.
    """
    return typer.Option(flag, help=text, show_default=False)


FORMS = "timm name, torchvision:NAME, hf-hub:ORG/NAME or module:function"
Pretrained = Annotated[bool, option("--pretrained", "Download (or take from the cache) published weights.")]
Checkpoint = Annotated[Path | None, option("--checkpoint", "File of float weights: .safetensors or torch.")]
ModelArgs = Annotated[list[str] | None, option("--model-arg", "KEY=VALUE for the builder; repeatable.")]
CodeModel = Annotated[
    str | None, option("--model", "The run's model, where it is a module:function: typed again to allow it.")
]

Data = Annotated[
    str | None,
    option("--data", "Folder of images, .parquet file or timm data set name. Default: scikit-learn's digits."),
]
Val = Annotated[
    Path | None,
    option("--val", "Folder or .parquet file to evaluate on, all of it; then all of --data is trained on."),
]
Holdout = Annotated[float | None, option("--holdout", "Share (below 1) or number of images held out.")]
DataRoot = Annotated[Path | None, option("--data-root", "Where a timm data set lies. Default: data.")]
Download = Annotated[bool, option("--download", "Allow a timm data set to be downloaded.")]
InputSize = Annotated[int | None, option("--input-size", "Height and width of the images.")]
NumClasses = Annotated[int | None, option("--num-classes", "Number of classes, where the data does not say.")]
BatchSize = Annotated[int | None, option("--batch-size", "Images a batch. Default: the recipe's.")]
Workers = Annotated[int, option("--workers", "Processes that decode images.")]

PolicyFile = Annotated[str | None, option("--policy", "A policy file (TOML).")]
Preset = Annotated[str | None, option("--preset", "A preset, such as paper-w1a1.")]
WBits = Annotated[
    str | None, option("--w-bits", "Bits of the weights, 1 to 8, or float. Default: 4, or 8 beside --a-bits.")
]
ABits = Annotated[
    str | None, option("--a-bits", "Bits of the inputs, 1 to 8, or float. Default: 4, or 8 beside --w-bits.")
]
First = Annotated[str | None, option("--first", "First layers: W,A bits or float. Default: 8,8.")]
Last = Annotated[str | None, option("--last", "Last layers: W,A bits or float. Default: 8,8.")]
Exclude = Annotated[list[str] | None, option("--exclude", "Layers to leave alone: a name or pattern; repeatable.")]
Include = Annotated[
    list[str] | None, option("--include", "The only layers to convert: a name or pattern; repeatable.")
]
Bits = Annotated[
    list[str] | None, option("--bits", "LAYER=W/A, or LAYER=BITS for both, as layer4.*=2 or fc=float; repeatable.")
]
Attention = Annotated[
    str | None, option("--attention", "Bits of both operands of attention products. Default: left in floating point.")
]
ShareInputs = Annotated[
    bool, option("--share-inputs", "One input quantizer for layers that read the same tensor at the same bits.")
]
Setting = Annotated[
    list[str] | None, option("--set", "KEY=VALUE of any other setting, as granularity=tensor; repeatable.")
]

RecipeName = Annotated[
    str | None, option("--recipe", "A name that daqconvert recipes shows, or a TOML file. Default: quick.")
]
With = Annotated[
    list[str] | None, option("--with", "FIELD=VALUE of any field of the recipe, as clip_grad=1; repeatable.")
]
Epochs = Annotated[int | None, option("--epochs", "Epochs of finetuning.")]
Rate = Annotated[float | None, option("--lr", "Learning rate of the weights.")]
QuantizerRate = Annotated[float | None, option("--quantizer-lr", "Learning rate of the quantizers.")]
Distill = Annotated[float | None, option("--distill", "Weight of distillation, 0 to 1.")]
Seed = Annotated[int | None, option("--seed", "Seed of everything random.")]

Json = Annotated[bool, option("--json", "Print one JSON document on standard output, and nothing else there.")]
Overwrite = Annotated[bool, option("--overwrite", "Replace what is there.")]


def pairs(texts: list[str] | None, option: str) -> dict[str, Any]:
    """Return `["a=1", "b=x"]` as `{"a": 1, "b": "x"}`; values are read as JSON where they are JSON.

    Args:
        texts: What the user typed.
        option: Name of the option, for the error.

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


def recipe_changes(fields: list[str] | None, **named: Any) -> dict[str, Any]:
    """Return the fields of the recipe that the user changed, by `--with` and by options of their own.

    Args:
        fields: FIELD=VALUE as typed.
        **named: Of options of their own; None where it was not given.

    Raises:
        TrainingError: If one of them is no field, cannot be read, or is given in both ways.

    Example:
        >>> recipe_changes(["clip_grad=1", "mixup=0.2"], epochs=3, lr=None)
        {'clip_grad': 1.0, 'mixup': 0.2, 'epochs': 3}
    """
    try:
        found = parse_overrides(fields or [])
    except TrainingError as error:
        raise TrainingError(str(error).replace("override", "--with", 1)) from None
    given = {name: value for name, value in named.items() if value is not None}
    for name in found.keys() & given.keys():
        raise TrainingError(f"--{name.replace('_', '-')} and --with {name}: give one of them.")
    return found | given


def read_policy(
    policy: str | None = None, preset: str | None = None, w_bits: str | None = None, a_bits: str | None = None,
    first: str | None = None, last: str | None = None, exclude: list[str] | None = None,
    settings: list[str] | None = None, include: list[str] | None = None, bits: list[str] | None = None,
    attention: str | None = None, share_inputs: bool = False,
) -> Policy | None:  # fmt: skip
    """Return the policy that these options ask for, or None if they say nothing.

    Args:
        policy: Path of a policy file.
        preset: Name of a preset.
        w_bits: Bits of the weights as typed.
        a_bits: Bits of the inputs as typed.
        first: First layers as typed.
        last: Last layers as typed.
        exclude: Layers to leave alone.
        settings: KEY=VALUE of other settings.
        include: The only layers to convert.
        bits: LAYER=W/A as typed.
        attention: Bits of attention products as typed.
        share_inputs: Whether layers that read the same tensor share its quantizer.

    Raises:
        PolicyError: If one of them cannot be read; names the option.

    Example:
        >>> asked = read_policy(w_bits="2", first="float", settings=["rounding=ste"])
        >>> asked.default.w_bits, asked.first, asked.default.rounding
        (2, None, 'ste')
    """
    found: dict[str, Any] = {"policy": policy, "preset": preset, "exclude": exclude or None}
    found |= {"include": include or None, "bits": layer_bits(bits) or None, "share_inputs": share_inputs or None}
    found = {key: value for key, value in found.items() if value is not None}
    for key, text in (("w_bits", w_bits), ("a_bits", a_bits), ("attention", attention)):
        if text is not None:
            found[key] = _bits(text, f"--{key.replace('_', '-')}")
    for key, text in (("first", first), ("last", last)):
        if text is not None:
            found[key] = _position(text, f"--{key}")
    found |= pairs(settings, "--set")
    if not {"policy", "preset", "w_bits", "a_bits"} & found.keys():
        found |= {"w_bits": DEFAULT_BITS, "a_bits": DEFAULT_BITS} if found else {}
    return build(**found) if found else None


def layer_bits(texts: list[str] | None) -> dict[str, Any]:
    """Return `["layer4.*=2", "fc=8/float"]` as `{"layer4.*": 2, "fc": (8, None)}`.

    Args:
        texts: What the user typed.

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


def default_policy() -> Policy:
    """Return the policy where no option says anything: 4 bits for weights and inputs, 8 for first and last layers."""
    return build(w_bits=DEFAULT_BITS, a_bits=DEFAULT_BITS)


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


def job_from(
    model: str | None, model_arg: list[str] | None, pretrained: bool, checkpoint: Path | None, data: str | None,
    holdout: float | None, data_root: Path | None, download: bool, input_size: int | None, num_classes: int | None,
    workers: int, seed: int | None = None, val: Path | None = None,
) -> Job:  # fmt: skip
    """Return the job that the options name; arguments are those of `Job`, as typed."""
    return Job(
        model=model,
        model_args=pairs(model_arg, "--model-arg"),
        pretrained=pretrained,
        checkpoint=None if checkpoint is None else str(checkpoint),
        data=data,
        val=None if val is None else str(val),
        holdout=holdout_value(holdout),
        data_root=None if data_root is None else str(data_root),
        download=download,
        input_size=input_size,
        num_classes=num_classes,
        workers=workers,
        seed=seed or 0,
    )


def holdout_value(value: float | None) -> float | int | None:
    """Return a share as it is and a number of images as an integer.

    Args:
        value: What the user typed.

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
