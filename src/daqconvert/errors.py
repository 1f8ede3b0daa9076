"""Every error a user can cause, each with its place, what was expected, what was found, what to type next.

All derive from `DaqError`, so a program can catch one class; the command line turns any of them into
one printed paragraph and exit code 2.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class DaqError(Exception):
    """Base of all errors that daqconvert raises about its input.

    Example:
        >>> issubclass(PolicyError, DaqError) and issubclass(PolicyError, ValueError)
        True
    """


class PolicyError(DaqError, ValueError):
    """A policy, rule, setting or bit-width that cannot be applied."""


class ConversionError(DaqError, ValueError):
    """A model or layer that cannot be converted as asked."""


class CalibrationError(DaqError, ValueError):
    """Calibration data that cannot be used, or a verb that needs calibrated bounds and found none."""


class FrozenError(DaqError, RuntimeError):
    """A verb that needs a trainable model was given a frozen one, or the other way round."""


class ArtifactError(DaqError, ValueError):
    """A saved artifact that is damaged, too new, or does not fit the model."""


class ExportError(DaqError, RuntimeError):
    """A model that could not be exported, or whose export does not agree with it."""


class DataError(DaqError, ValueError):
    """A data set, batch or file that cannot be read as asked."""


class TrainingError(DaqError, RuntimeError):
    """A recipe or training run that cannot go on."""


def nearest(name: str, valid: Iterable[str]) -> str:
    """Return `" Nearest: a, b."` with the valid names closest to `name`, or `""`.

    Example:
        >>> nearest("layer5.*", ["layer4.0.conv1", "fc"])
        ' Nearest: layer4.0.conv1.'
    """
    close = difflib.get_close_matches(name, list(valid), n=3, cutoff=0.3)
    return f" Nearest: {', '.join(close)}." if close else ""
