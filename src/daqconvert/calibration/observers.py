"""Observers of inputs (range, moments, histogram), and the methods that choose bounds from what was observed.

The histogram has a power-of-two number of equal bins over `[-limit, limit]`. When a value passes the limit, the limit
doubles and pairs of bins merge. Merging loses no counts, so one pass over the data is enough.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

BINS = 8192
COARSE = 8  # number of bins that are merged into one for the first, coarse search for the least error
LARGEST = torch.finfo(torch.float32).max
SAMPLE = 1 << 18  # at most this many elements of a batch enter the histogram; range and moments use all elements


class InputObserver:
    """Observes the input of one site over any number of batches.

    The arguments choose what is recorded in addition to the range: `std` the standard deviation of the first batch
    (which takes two more passes over it), `histogram` the histogram, `mean` the mean absolute value.

    Attributes:
        minimum: Smallest value seen.
        maximum: Largest value seen.
        first_std: Standard deviation of the first batch; the paper starts `upper` at three times this.
        finite: Whether all values seen were finite in float32.
        limit: The histogram covers `[-limit, limit]`; 0 until a value other than 0 is seen.
        histogram: Estimated number of values in each bin, `(BINS,)`, float64.

    Example:
        >>> observer = InputObserver()
        >>> observer.observe(torch.tensor([-1.0, 0.0, 2.0]))
        >>> observer.minimum, observer.maximum
        (-1.0, 2.0)
    """

    def __init__(self, std: bool = True, histogram: bool = True, mean: bool = False) -> None:
        self._std, self._histogram, self._mean = std, histogram, mean
        self._sum, self._count = 0.0, 0
        self.minimum, self.maximum = math.inf, -math.inf
        self.first_std: float | None = None
        self.limit = 0.0
        self.finite = True
        self.histogram = torch.zeros(BINS, dtype=torch.float64)

    @property
    def seen(self) -> bool:
        """Whether any value was observed."""
        return self.maximum >= self.minimum

    @property
    def mean(self) -> float:
        """Mean absolute value of all values seen."""
        return self._sum / max(self._count, 1)

    @torch.no_grad()
    def observe(self, x: Tensor) -> None:
        """Observe one batch, of any shape and floating dtype."""
        if x.numel() == 0:
            return
        low, high = torch.stack(torch.aminmax(x)).tolist()
        if not (low >= -LARGEST and high <= LARGEST):
            self.finite = False
            return
        self.minimum, self.maximum = min(self.minimum, low), max(self.maximum, high)
        flat = x.detach().flatten()
        if self._std and self.first_std is None:
            self.first_std = float(flat.float().std()) if flat.numel() > 1 else abs(float(flat[0]))
        if self._mean:
            self._sum, self._count = self._sum + float(flat.float().abs().double().sum()), self._count + flat.numel()
        self._grow(max(abs(low), abs(high)))
        if self._histogram and self.limit > 0:
            stride = -(-flat.numel() // SAMPLE) | 1  # odd, so that it does not stay in one channel or one column
            sample = flat[::stride]
            self.histogram += self._counts(sample.float()).double().cpu() * (flat.numel() / sample.numel())

    def _counts(self, sample: Tensor) -> Tensor:
        """Return the number of values in each bin; the last bin includes `limit` itself.

        The counts are those of `torch.histc`, in a third of its time.
        """
        # both factors are powers of two, so only the addition rounds
        place = sample.mul(1.0 / self.limit).add_(1.0).mul_(BINS / 2)
        return torch.bincount(place.int().clamp_(max=BINS - 1), minlength=BINS)

    def centers(self) -> Tensor:
        """Return the middle of each bin, `(BINS,)`, float64."""
        width = 2.0 * self.limit / BINS
        return (torch.arange(BINS, dtype=torch.float64) + 0.5) * width - self.limit

    def _grow(self, top: float) -> None:
        if top == 0.0:
            return
        if self.limit == 0.0:
            self.limit = 2.0 ** max(math.ceil(math.log2(top)), -126)  # its reciprocal has to be a normal float32
        while top > self.limit:
            inner = self.histogram.reshape(-1, 2).sum(dim=1)
            self.histogram = torch.nn.functional.pad(inner, (BINS // 4, BINS // 4))
            self.limit *= 2.0


def minmax_bounds(observer: InputObserver, bits: int, signed: bool) -> tuple[float, float]:
    """Return the range seen, extended to include 0."""
    return (min(observer.minimum, 0.0) if signed else 0.0), max(observer.maximum, 0.0)


def percentile_bounds(
    observer: InputObserver, bits: int, signed: bool, percentile: float = 99.99
) -> tuple[float, float]:
    """Return the bounds that leave `100 - percentile` per cent of the values outside, half at each end if signed."""
    cumulative = observer.histogram.cumsum(0) / observer.histogram.sum()
    tail = (1.0 - percentile / 100.0) / (2.0 if signed else 1.0)
    centers = observer.centers()
    high = float(centers[min(int((cumulative < 1.0 - tail).sum()), BINS - 1)])
    low = float(centers[min(int((cumulative <= tail).sum()), BINS - 1)])
    least, most = minmax_bounds(observer, bits, signed)
    return max(min(low, 0.0), least), min(max(high, 0.0), most)


def std_bounds(observer: InputObserver, bits: int, signed: bool) -> tuple[float, float]:
    """Return the paper's initial bounds: 3 standard deviations of the first batch, in both directions if signed.

    If the first batch was constant, these bounds would be an empty range, so the range seen is returned.
    """
    width = 3.0 * (observer.first_std or 0.0)
    if width == 0.0:
        return minmax_bounds(observer, bits, signed)
    return (-width if signed else 0.0), width


def minimum_error_bounds(observer: InputObserver, bits: int, signed: bool) -> tuple[float, float]:
    """Return the bounds with the least squared rounding error on the histogram.

    The search first tries all pairs of a coarse grid of bounds on a merged histogram. Then it moves one bound at a
    time, in steps that get finer.
    """
    low, high = minmax_bounds(observer, bits, signed)
    merged = observer.histogram.reshape(-1, COARSE).sum(dim=1), observer.centers().reshape(-1, COARSE).mean(dim=1)
    lows = low * torch.logspace(-2.0, 0.0, 10 if low < 0.0 else 1, dtype=torch.float64)
    highs = high * torch.logspace(-2.0, 0.0, 30 if low < 0.0 else 60, dtype=torch.float64)
    pairs = torch.cartesian_prod(lows, highs)
    best = _least(*_used(*merged, signed), pairs[:, 0], pairs[:, 1], bits)
    values, weights = _used(observer.histogram, observer.centers(), signed)
    for width in (0.5, 0.2, 0.1, 0.04):
        around = torch.linspace(1.0 - width, 1.0 + width, 21, dtype=torch.float64)
        low_now, high_now = best
        best = _least(values, weights, torch.full_like(around, low_now), high_now * around, bits)
        if signed:
            low_now, high_now = best
            best = _least(values, weights, low_now * around, torch.full_like(around, high_now), bits)
    return max(best[0], low) if signed else 0.0, min(best[1], high)


def symmetric_bounds(observer: InputObserver, bits: int) -> tuple[float, float]:
    """Return the bounds of least squared error on the histogram among those of symmetric inputs.

    They are `-2**(bits - 1) * s` and `(2**(bits - 1) - 1) * s`, so there is one number to search: parts of
    the largest value seen, first coarse, then finer around the best.
    """
    half = 2 ** (bits - 1)
    low, high = minmax_bounds(observer, bits, True)
    most = max(high, -low * (half - 1) / half)
    values, weights = _used(observer.histogram, observer.centers(), True)
    found = most
    highs = most * torch.logspace(-2.0, 0.0, 60, dtype=torch.float64)
    for width in (0.1, 0.03, 0.01):
        found = min(_least(values, weights, highs * (-half / (half - 1)), highs, bits)[1], most)
        highs = found * torch.linspace(1.0 - width, 1.0 + width, 21, dtype=torch.float64)
    found = min(_least(values, weights, highs * (-half / (half - 1)), highs, bits)[1], most)
    return -found * half / (half - 1), found


def _used(histogram: Tensor, centers: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
    """Return the centers and counts of the bins that are not empty; negative centers become 0 if not `signed`."""
    used = histogram > 0
    values = centers[used]
    return (values if signed else values.clamp(min=0.0)), histogram[used]


def _least(values: Tensor, weights: Tensor, lows: Tensor, highs: Tensor, bits: int) -> tuple[float, float]:
    """Return the candidate pair of bounds with the least weighted squared error."""
    n = 2**bits - 1
    scale = ((highs - lows) / n).clamp(min=1e-30)[:, None]
    zero_point = torch.round(-lows[:, None] / scale).clamp(0, n)
    codes = (values / scale).round_()
    torch.minimum(torch.maximum(codes, -zero_point, out=codes), n - zero_point, out=codes)
    errors = codes.mul_(scale).sub_(values).square_().mul_(weights).sum(dim=1)
    index = int(errors.argmin())
    return float(lows[index]), float(highs[index])


Bounds = Callable[[InputObserver, int, bool], tuple[float, float]]


def error_bounds(observer: InputObserver, bits: int, signed: bool) -> tuple[float, float]:
    """Return the bounds of least squared error; at 1 bit, the paper's 3 standard deviations.

    At 1 bit the bounds of least error put the upper level inside the bulk of the values. Values above it get no
    gradient, and training from there ends several points of accuracy lower.
    """
    return std_bounds(observer, bits, signed) if bits == 1 else minimum_error_bounds(observer, bits, signed)


def observer_for(method: str, bits: int, by_mean: bool = False) -> InputObserver:
    """Return an observer that records only what a method (a key of `METHODS`) needs at this number of bits.

    With `by_mean` (LSQ) it records the mean absolute value, whatever the method.
    """
    of_std = not by_mean and (method == "std" or (method == "mse" and bits == 1))
    return InputObserver(of_std, histogram=not (by_mean or of_std or method == "minmax"), mean=by_mean)


METHODS: dict[str, Bounds] = {
    "mse": error_bounds,
    "minmax": minmax_bounds,
    "percentile": percentile_bounds,
    "std": std_bounds,
}
