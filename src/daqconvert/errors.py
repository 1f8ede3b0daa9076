"""Every error that a user can cause. A message says where it happened, what was expected and found, and what to do.

All classes derive from `DaqError`, so a program can catch them all by `DaqError`. The command line prints any of them
as one paragraph and ends with exit code 2.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence

ROOT = "(root)"
"""How messages and plans write the name of a layer that is the model itself; names that are typed may say so, too."""


class DaqError(Exception):
    """Base of all errors that daqconvert raises about its input.

    Example:
        >>> import daqconvert as dq
        >>> try:
        ...     dq.quantize(nn.Linear(4, 2), w_bits=9)
        ... except dq.DaqError as error:
        ...     print(error)
        arguments: w_bits: expected an integer from 1 to 8, or None (32) for floating point; found 9.
    """


class PolicyError(DaqError, ValueError):
    """A policy, rule, setting or bit-width that cannot be applied.

    Example:
        >>> import daqconvert as dq
        >>> dq.Settings(w_bits=9)
        Traceback (most recent call last):
        daqconvert.errors.PolicyError: w_bits: expected an integer from 1 to 8, or None (32) for floating point;
        found 9.
    """


class ConversionError(DaqError, ValueError):
    """A model or layer that cannot be converted as asked.

    Example:
        >>> import daqconvert as dq
        >>> dq.quantize(nn.ReLU())
        Traceback (most recent call last):
        daqconvert.errors.ConversionError: ReLU: nothing to quantize: 0 convolutions and linears found, all left alone.
        Print daqconvert.plan(model, ...) for the reasons.
    """


class CalibrationError(DaqError, ValueError):
    """Calibration data that cannot be used, or a verb that needs calibrated bounds and found none.

    Example:
        >>> import daqconvert as dq
        >>> dq.calibrate(dq.quantize(nn.Linear(4, 2)), [])
        Traceback (most recent call last):
        daqconvert.errors.CalibrationError: calibrate: expected at least one batch, found none. Is the loader empty?
    """


class FrozenError(DaqError, RuntimeError):
    """A frozen model was given to a verb that needs a trainable one, or the other way round.

    Example:
        >>> import daqconvert as dq
        >>> qmodel = dq.quantize(nn.Linear(4, 2))
        >>> report = dq.calibrate(qmodel, [torch.rand(8, 4)])
        >>> dq.freeze(qmodel).train()(torch.rand(1, 4))
        Traceback (most recent call last):
        daqconvert.errors.FrozenError: (root): a frozen layer holds integer codes and cannot be trained. Call .eval()
        on the model; to train on, go back to the quantized model (or its checkpoint) and freeze it again.
    """


class ArtifactError(DaqError, ValueError):
    """A saved artifact that is damaged, too new, or does not fit the model.

    Example:
        >>> import daqconvert as dq
        >>> dq.load("missing")
        Traceback (most recent call last):
        daqconvert.errors.ArtifactError: missing: not an artifact: no such directory. Make one with
        daqconvert.save(frozen, path).
    """


class ExportError(DaqError, RuntimeError):
    """A model that could not be exported, or whose export does not agree with it.

    Example:
        >>> import daqconvert as dq
        >>> dq.export(nn.Linear(4, 2), "model.onnx", torch.rand(1, 4))
        Traceback (most recent call last):
        daqconvert.errors.ExportError: export: Linear has no frozen layer. Quantize and calibrate it, then call
        daqconvert.freeze(qmodel) and export what that returns.
    """


class DataError(DaqError, ValueError):
    """A data set, batch or file that cannot be read as asked.

    Example:
        >>> import daqconvert as dq
        >>> dq.evaluate(nn.Linear(4, 2), [])
        Traceback (most recent call last):
        daqconvert.errors.DataError: evaluate: loader: expected at least one batch, found none. Is the data set smaller
        than a batch?
    """


class TrainingError(DaqError, RuntimeError):
    """A recipe that contradicts itself, or a training run that cannot go on.

    Example:
        >>> import daqconvert as dq
        >>> dq.Recipe(epochs=0)
        Traceback (most recent call last):
        daqconvert.errors.TrainingError: recipe 'quick': epochs: expected an integer of 1 or more; found 0.
    """


def nearest(name: str, valid: Iterable[str]) -> str:
    """Return `" Nearest: a, b."` with the valid names closest to `name`, or `""` if none is close.

    Example:
        >>> nearest("layer5.*", ["layer4.0.conv1", "fc"])
        ' Nearest: layer4.0.conv1.'
    """
    close = difflib.get_close_matches(name, list(valid), n=3, cutoff=0.3)
    return f" Nearest: {', '.join(close)}." if close else ""


def first_few(problems: Iterable[str], count: int = 3) -> str:
    """Join the first few problems into one text, which says how many more there are."""
    listed = list(problems)
    more = f"; and {len(listed) - count} more" if len(listed) > count else ""
    return "; ".join(listed[:count]) + more


def few_names(names: Sequence[str], count: int = 3) -> str:
    """Return the first few names, and dots where there are more.

    Example:
        >>> few_names(["a", "b", "c", "d"]), few_names(["a"])
        ('a, b, c, ...', 'a')
    """
    return ", ".join(names[:count]) + (", ..." if len(names) > count else "")
