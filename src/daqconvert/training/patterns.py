"""Names and patterns in a recipe: which names of a model they match, and an error where they match none."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from daqconvert.errors import PolicyError, TrainingError, nearest
from daqconvert.policy.rules import check_pattern, name_level


def matching(patterns: Iterable[str], names: Sequence[str], field: str, what: str) -> list[str]:
    """Return the names that at least one pattern matches, in the order of `names`.

    Patterns are dotted names, globs (`*` is any text, dots included), or `re:` and a regular expression. For the
    message, `field` is the recipe's field that has the patterns, and `what` is what the names belong to: "parameter".

    Raises:
        TrainingError: If a pattern matches no name; the message proposes the nearest one.

    Example:
        >>> matching(["*.bias"], ["0.weight", "0.bias", "2.bias"], "no_decay", "parameter")
        ['0.bias', '2.bias']
    """
    found: set[str] = set()
    for pattern in patterns:
        try:
            check_pattern(pattern, field)
        except PolicyError as error:
            raise TrainingError(str(error)) from None
        meant = [name for name in names if name_level(pattern, name) is not None]
        if not meant:
            raise TrainingError(f'{field}: "{pattern}" matches no {what}.{nearest(pattern, names)}')
        found.update(meant)
    return [name for name in names if name in found]
