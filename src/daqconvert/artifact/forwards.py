"""Which code an artifact relies on: a hash of every forward that was rewritten when the model was quantized.

The artifact holds no code. Where a library's own forward multiplies, that forward is rewritten again when the artifact
is loaded, from the library as it is then; one that has changed since may compute something else.
"""

from __future__ import annotations

import hashlib
import inspect
import textwrap
from collections.abc import Mapping

from torch import nn

from daqconvert.errors import ArtifactError
from daqconvert.graph.rewrite import Rewritten


def forward_hashes(model: nn.Module) -> dict[str, str]:
    """Return the SHA-256 of the source of each rewritten forward, by the full name of its class, sorted.

    A class whose source cannot be had (typed into an interpreter) is left out.

    Args:
        model: Frozen.
    """
    classes = {_original(type(m)) for m in model.modules() if isinstance(m, Rewritten)}
    found = {}
    for cls in classes:
        try:
            source = textwrap.dedent(inspect.getsource(cls.forward))
        except (OSError, TypeError):
            continue
        found[f"{cls.__module__}.{cls.__qualname__}"] = hashlib.sha256(source.encode()).hexdigest()
    return dict(sorted(found.items()))


def check_forwards(model: nn.Module, stored: Mapping[str, str], where: str) -> None:
    """Raise if a forward that is rewritten here is not the one that was saved.

    Args:
        model: Frozen, its forwards rewritten.
        stored: From the artifact.
        where: The artifact, for messages.

    Raises:
        ArtifactError: Naming the class and its library.
    """
    for name, digest in forward_hashes(model).items():
        if stored.get(name) != digest:
            library = name.partition(".")[0]
            what = "has another forward here" if name in stored else "is not among those that were rewritten then"
            raise ArtifactError(
                f"{where}: forwards: {name} {what}: {library} has changed since the artifact was saved, and may "
                f"compute something else. Install the {library} it was made with, or freeze and save the model again."
            )


def _original(cls: type[nn.Module]) -> type[nn.Module]:
    found: type[nn.Module] = getattr(cls, "original", cls)
    return found
