"""Groups of options: what typer reads, and what a command gets."""

import dataclasses
import inspect
from pathlib import Path
from typing import Annotated, get_type_hints

import pytest
import typer
from typer.testing import CliRunner

from daqconvert.cli import options as o

GROUPS = (o.ModelOptions, o.DataOptions, o.PolicyOptions, o.RecipeOptions)


@pytest.mark.parametrize("group", GROUPS)
def test_a_field_is_named_like_its_flag(group):
    """Errors say `--w-bits` of the field `w_bits`."""
    for name, hint in get_type_hints(group, include_extras=True).items():
        assert hint.__metadata__[0].default == f"--{name.removesuffix('_').replace('_', '-')}"


def test_a_command_gets_its_groups():
    seen = {}

    def command(
        *,
        source: Annotated[str, typer.Argument()],
        weights: o.ModelOptions,
        data: Annotated[o.DataOptions, o.Without("val", "batch_size")],
        as_json: o.Json = False,
    ) -> None:
        seen.update(source=source, weights=weights, data=data, as_json=as_json)

    app = typer.Typer()
    app.command()(o.grouped(command))
    typed = ["net", "--pretrained", "--model-arg", "a=1", "--model-arg", "b=2", "--workers", "3", "--data-root", "x"]
    assert CliRunner().invoke(app, typed).exit_code == 0
    assert seen["weights"] == o.ModelOptions(pretrained=True, model_arg=["a=1", "b=2"])
    assert seen["data"] == o.DataOptions(workers=3, data_root=Path("x"))
    assert (seen["source"], seen["as_json"]) == ("net", False)
    assert CliRunner().invoke(app, ["net", "--val", "folder"]).exit_code == 2
    names = [field.name for field in dataclasses.fields(o.DataOptions) if field.name not in ("val", "batch_size")]
    read = list(inspect.signature(o.grouped(command)).parameters)
    assert read == ["source", "pretrained", "checkpoint", "model_arg", *names, "as_json"]


def test_an_option_twice_is_a_mistake():
    def command(*, data: o.DataOptions, workers: int = 0) -> None: ...

    with pytest.raises(ValueError, match="duplicate parameter name: 'workers'"):
        o.grouped(command)


@pytest.mark.parametrize(
    ("typed", "bits"),
    [
        ({"w_bits": "2"}, (2, 4)),
        ({"a_bits": "2"}, (4, 2)),
        ({"w_bits": "2", "a_bits": "3"}, (2, 3)),
        ({"w_bits": "float"}, (None, 4)),
        ({"exclude": ["a"]}, (4, 4)),
        ({"bits": ["a=3"]}, (4, 4)),
        ({"preset": "paper-w1a1", "a_bits": "2"}, (1, 2)),
        ({"policy": "p.toml", "w_bits": "2"}, (2, 5)),
    ],
    ids=str,
)
def test_one_width_that_is_given_does_not_change_the_other(tmp_path, monkeypatch, typed, bits):
    monkeypatch.chdir(tmp_path)
    Path("p.toml").write_text("[default]\nw_bits = 3\na_bits = 5\n")
    policy = o.PolicyOptions(**{**typed, **({"policy": Path("p.toml")} if "policy" in typed else {})}).read()
    assert (policy.default.w_bits, policy.default.a_bits) == bits


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        ('"a" and "b": exclude=["a", "b c"].', '"a" and "b": --exclude a --exclude \'b c\'.'),
        (
            "Pass resume=True to go on, overwrite=True to start again.",
            "Pass --resume to go on, --overwrite to start again.",
        ),
        ('Set granularity="tensor" or gptq=4.', "Set --set granularity=tensor or --with gptq=4."),
        ("arguments: w_bits: expected a number or None (32)", "--w-bits: expected a number or float (32)"),
        ("recipe 'quick': lr: expected", "--lr: expected"),
        (
            "Give --model-arg num_classes=3, --with lr=2 or --with 'lr=2'.",
            "Give --model-arg num_classes=3, --with lr=2 or --with 'lr=2'.",
        ),
        ("out_dir runs/a: exists", "--out runs/a: exists"),
        ("runs/w_bits=2,lr=0.1 exists. Pass overwrite=True.", "runs/w_bits=2,lr=0.1 exists. Pass --overwrite."),
        ("lr=0.1/best: no run", "lr=0.1/best: no run"),
        ("my_out_dir/x: no file", "my_out_dir/x: no file"),
        (
            "If its batch size is fixed, pass dynamic_batch=False.",
            "If its batch size is fixed, export it in Python, with dynamic_batch=False.",
        ),
        ("x == y, a=b, dtype=float32", "x == y, a=b, dtype=float32"),
    ],
)
def test_errors_speak_of_options(said, shown):
    assert o.as_options(said) == shown
