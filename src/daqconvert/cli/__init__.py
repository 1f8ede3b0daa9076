"""The command line: one file per command, and `main`.

Exit codes: 0 done, 1 done but an ONNX file disagrees with its model, 2 a mistake of the user's (one paragraph on
standard error), 130 interrupted by Ctrl-C, 141 what reads the output closed it, 143 a run that SIGTERM stopped.
"""

from __future__ import annotations

import platform
import sys
from collections.abc import Callable
from typing import Annotated

import torch
import typer

from daqconvert.cli.bench import bench_command
from daqconvert.cli.evaluate import evaluate_command
from daqconvert.cli.export import export_command
from daqconvert.cli.finetune import finetune_command
from daqconvert.cli.freeze import freeze_command
from daqconvert.cli.inspect import inspect_command
from daqconvert.cli.options import grouped
from daqconvert.cli.output import guarded, writing
from daqconvert.cli.plan import plan_command
from daqconvert.cli.recipes import recipes_command
from daqconvert.cli.verify import verify_command
from daqconvert.version import __version__

__all__ = ["app", "main"]

app = typer.Typer(
    name="daqconvert",
    help="Convert PyTorch models to distance-aware quantized layers at 1 to 8 bits; train, freeze and deploy them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
COMMANDS: dict[str, Callable[..., None]] = {
    "plan": plan_command,
    "finetune": finetune_command,
    "eval": evaluate_command,
    "freeze": freeze_command,
    "export": export_command,
    "inspect": inspect_command,
    "recipes": recipes_command,
    "verify": verify_command,
    "bench": bench_command,
}
for name, command in COMMANDS.items():
    app.command(name)(guarded(grouped(command)))


def _print_versions(asked: bool) -> None:
    if asked:
        print(f"daqconvert {__version__} (torch {torch.__version__}, Python {platform.python_version()})")
        raise typer.Exit


Version = Annotated[
    bool, typer.Option("--version", is_eager=True, callback=_print_versions, help="Print versions, and end.")
]


@app.callback()
def _own_options(*, version: Version = False) -> None: ...


def main() -> None:
    """Run the command that `sys.argv` names."""
    try:
        with writing(sys.stdout):
            try:
                app(prog_name="daqconvert")
            finally:
                if sys.stdout is not None:  # closed by the caller
                    sys.stdout.flush()
    except typer.Exit as ending:
        sys.exit(ending.exit_code)
