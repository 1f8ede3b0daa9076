"""Which inputs carry the batch: found by running the model on other rows of its example, not guessed from sizes.

An input *carries the batch* if its first dimension counts the samples. Then the model, given other rows of all such
inputs, returns those rows of its outputs; a side input (a table of positions, a mask for all samples) stays as it is
and the outputs do too. Several inputs may have the same first size by chance, or 1, so that sets of them are tried,
larger ones first.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from daqconvert.deploy.signature import Arguments, input_names, input_tensors, output_tensors
from daqconvert.errors import ExportError, nearest

TRIALS = 32  # sets of inputs that are tried; a model with so many inputs that this ends the search has the first set
EXACT = 1e-10  # noise over signal below which outputs are the same rows: float32 rounding is far below

Run = Callable[[Arguments], list[Tensor]]


@dataclass(frozen=True)
class Batch:
    """The inputs that carry the batch.

    Attributes:
        places: Their places among the tensors of the arguments.
        size: The size of the batch in the example.
        doubtful: Those of `places` that might as well be the same for every sample: the example has one sample, and
            the model takes it either way.
    """

    places: tuple[int, ...]
    size: int
    doubtful: tuple[int, ...] = ()

    def rows(self, arguments: Arguments, rows: Sequence[int]) -> Arguments:
        """Return the arguments with these rows of every input that carries the batch; the others are as they were."""
        leaves, spec = tree_flatten(arguments)
        tensors = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        for place in self.places:
            leaves[tensors[place]] = leaves[tensors[place]][list(rows)]
        found: Arguments = tree_unflatten(leaves, spec)
        return found

    def other(self, arguments: Arguments) -> Arguments:
        """Return the arguments at another batch size: two rows, or three if the example has two."""
        return self.rows(arguments, other_rows(self.size))

    def several(self, arguments: Arguments) -> Arguments:
        """Return arguments of at least two samples, because torch.export takes a size of 1 for a constant."""
        return self.rows(arguments, range(self.size)) if self.size > 1 else self.rows(arguments, [0, 0])

    def notes(self, model: nn.Module, arguments: Arguments) -> list[str]:
        """Return what a user of the file has to know about its inputs: nothing where there is only one."""
        names, tensors = input_names(model, arguments), input_tensors(arguments)
        if len(names) == 1:
            return []
        fixed = [f"{names[i]} {tuple(t.shape)}" for i, t in enumerate(tensors) if i not in self.places]
        kept = f"; of fixed shape: {', '.join(fixed)}" if fixed else ""
        notes = [f"the batch is the first dimension of {', '.join(names[i] for i in self.places)}{kept}"]
        if self.doubtful:
            which = " or ".join(names[i] for i in self.doubtful)
            rest = [names[i] for i in self.places if i != self.doubtful[-1]]
            notes.append(
                f"from a single sample nobody can tell whether {which} is the same for all samples; if one is, give "
                "an example of two samples or more, or the names of the inputs that count samples, such as "
                f"dynamic_batch={rest!r}"
            )
        return notes


def other_rows(size: int) -> list[int]:
    """Return rows of a batch of that size, in another order and of another number: two, or three of two.

    Example:
        >>> other_rows(1), other_rows(2), other_rows(8)
        ([0, 0], [1, 0, 1], [7, 0])
    """
    return [1, 0, 1] if size == 2 else [size - 1, 0]


def find_batch(model: nn.Module, arguments: Arguments, run: Run, names: Sequence[str] | None = None) -> Batch | None:
    """Return which inputs carry the batch; None if no input has a dimension.

    Args:
        model: The model.
        arguments: An example.
        run: Runs the model and returns its output tensors.
        names: The names of the inputs that carry it, if the user says so: nothing is tried then.

    Raises:
        ExportError: If the example has no sample, a name is not that of an input, or the model runs at no other batch
            size.
    """
    tensors = input_tensors(arguments)
    if names is not None:
        return _named(input_names(model, arguments), tensors, names)
    if not any(t.dim() for t in tensors):
        return None
    first = next(t for t in tensors if t.dim())
    if first.shape[0] == 0:
        raise ExportError("export: example_inputs: expected at least one sample, found a first dimension of 0.")
    search = _Search(arguments, run)
    found = search.best(_candidates(tensors))
    if found is None:
        raise ExportError(
            f"export: {type(model).__name__} runs at no other batch size than that of example_inputs "
            f"({first.shape[0]}): {search.failure}. If its batch size is fixed, pass dynamic_batch=False."
        )
    return found


def open_batch(model: nn.Module, arguments: Arguments, dynamic_batch: bool | Sequence[str]) -> Batch | None:
    """Return the inputs that carry the batch, as the argument `dynamic_batch` of `export` and `program` asks.

    None if the batch shall be fixed, or no input has a dimension. Raises as `find_batch` does.
    """

    def run(given: Arguments) -> list[Tensor]:
        with torch.no_grad():
            return output_tensors(model(*given[0], **given[1]))

    if dynamic_batch is False:
        return None
    names = None if dynamic_batch is True else [dynamic_batch] if isinstance(dynamic_batch, str) else dynamic_batch
    return find_batch(model, arguments, run, names)


def _named(known: list[str], tensors: list[Tensor], names: Sequence[str]) -> Batch:
    for name in names:
        if name not in known:
            raise ExportError(
                f"export: dynamic_batch: {name!r} is no input; the inputs are {', '.join(known)}."
                f"{nearest(name, known)}"
            )
    places = tuple(i for i, name in enumerate(known) if name in names)
    sizes = {known[i]: tensors[i].shape[0] if tensors[i].dim() else None for i in places}
    if len(set(sizes.values())) != 1 or None in sizes.values() or 0 in sizes.values():
        raise ExportError(
            f"export: dynamic_batch: expected inputs of the same first size, one or more, found {sizes}."
        )
    return Batch(places, tensors[places[0]].shape[0])


def _candidates(tensors: list[Tensor]) -> Iterator[Batch]:
    """Yield sets of inputs of the same first size, larger ones first; sizes in the order of the inputs."""
    sizes = dict.fromkeys(t.shape[0] for t in tensors if t.dim() and t.shape[0])
    for size in sizes:
        members = [i for i, t in enumerate(tensors) if t.dim() and t.shape[0] == size]
        subsets = (s for count in range(len(members), 0, -1) for s in itertools.combinations(members, count))
        for places in itertools.islice(subsets, TRIALS):
            yield Batch(places, size)


class _Search:
    """Tries sets of inputs: how well does the model return other rows when it is given other rows of these?"""

    def __init__(self, arguments: Arguments, run: Run) -> None:
        self.arguments, self.run = arguments, run
        self.outputs = run(arguments)
        self.failure = ""

    def best(self, candidates: Iterator[Batch]) -> Batch | None:
        """Return the first set that fits best; None if the model runs with none of them."""
        tried: list[tuple[bool, float, Batch]] = []
        for batch in candidates:
            found = self._try(batch)
            if found is not None:
                tried.append((*found, batch))
                if found[0] and found[1] <= EXACT:
                    break
        if not tried:
            return None
        pool = [entry for entry in tried if entry[0]] or tried  # those with an output that carries the batch
        bar = max(EXACT, 4 * min(error for _, error, _ in pool))
        chosen = next(batch for _, error, batch in pool if error <= bar)
        if chosen.size > 1:
            return chosen
        return Batch(chosen.places, 1, tuple(self._doubtful(chosen, bar)))

    def _try(self, batch: Batch) -> tuple[bool, float] | None:
        """Return whether an output carries the batch, and noise over signal; None if the model does not run."""
        rows = other_rows(batch.size)
        try:
            found = self.run(batch.rows(self.arguments, rows))
        except Exception as error:  # NOTE: the model's own code, on inputs that may not fit together
            said = (str(error).strip().splitlines() or [""])[0][:200]
            self.failure = self.failure or f"{type(error).__name__}: {said}"
            return None
        return _compare(self.outputs, found, batch.size, rows)

    def _doubtful(self, batch: Batch, bar: float) -> Iterator[int]:
        for place in batch.places if 1 < len(batch.places) <= TRIALS else ():
            found = self._try(Batch(tuple(p for p in batch.places if p != place), 1))
            if found is not None and found[0] and found[1] <= bar:
                yield place


def _compare(before: list[Tensor], found: list[Tensor], size: int, rows: list[int]) -> tuple[bool, float]:
    """Return whether an output has other rows, and how far the outputs are from the rows of `before`."""
    carries, signal, noise = False, 0.0, 0.0
    if len(before) != len(found):
        return False, math.inf
    for old, new in zip(before, found, strict=True):
        if old.dim() and old.shape[0] == size and new.shape == (len(rows), *old.shape[1:]):
            carries, old = True, old[rows]
        if old.shape != new.shape:
            return False, math.inf
        wide, other = (torch.view_as_real(t) if t.is_complex() else t.double() for t in (old, new))
        same = (wide == other) | (wide.isnan() & other.isnan())
        noise += float(torch.where(same, 0.0, other - wide).square().sum())
        signal += float(torch.where(wide.isfinite(), wide, 0.0).square().sum())
    error = noise / signal if signal else (0.0 if noise == 0.0 else math.inf)
    return carries, error if error == error else math.inf
