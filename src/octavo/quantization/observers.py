"""Streaming histograms: everything a range search needs to know of values too many to keep."""

from __future__ import annotations

import math

import torch

from octavo.errors import OctavoError
from octavo.quantization.grid import LOWEST_EXPONENT, coarsen, count, exponent_of
from octavo.quantization.ranges import BINS, Ends, search_histogram
from octavo.quantization.specs import QParams, QuantSpec

_CHUNK = 1 << 15  # values counted at a time: stays in the cache and on one thread


class HistogramObserver:
    """Counts values in 8192 equal bins about 0, in fixed memory, whatever their number.

    Bin k of -4096..4095 holds the values with `floor(x / 2^e) = k`. The exponent e is the smallest with which
    all values so far fit; when it grows, neighbouring bins are added in pairs, which is exact because a
    product with a power of two and `floor` are. The state therefore depends on the values alone: not on their
    order, on how they came in batches, or on which observer saw them before a `merge`.

    >>> first, second, both = HistogramObserver(), HistogramObserver(), HistogramObserver()
    >>> a, b = torch.linspace(-1, 2, 500), torch.linspace(0, 9, 500)
    >>> first.observe(a), second.observe(b), both.observe(torch.cat([b, a]))
    (None, None, None)
    >>> first.merge(second)
    >>> all(torch.equal(value, both.state()[name]) for name, value in first.state().items())
    True
    >>> both.qparams(QuantSpec(symmetric=False), "minmax")
    QParams(scale=tensor(0.0392), zero_point=tensor(25, dtype=torch.int32))
    """

    def __init__(self) -> None:
        self.counts = torch.zeros(BINS, dtype=torch.int64)
        self.exponent = LOWEST_EXPONENT
        self.low = math.inf
        self.high = -math.inf

    def observe(self, x: torch.Tensor) -> None:
        """Count the values of `x`: float, any shape, any device. Raises `OctavoError` on NaN or infinity.

        On an error nothing has been counted.
        """
        if x.numel() == 0:
            return
        flat = _flat(x.detach()).float()  # as they are counted
        low, high = (end.item() for end in flat.aminmax())
        if not (math.isfinite(low) and math.isfinite(high)):
            raise OctavoError(
                "observed values hold NaN or infinity: the full-precision network overflows, or is handed them (by "
                "a text encoder, say)"
            )
        self._widen(low, high)
        for chunk in flat.split(_CHUNK if flat.device.type == "cpu" else flat.numel()):
            self.counts += count(chunk, self.exponent, BINS).to(self.counts.device)

    def merge(self, other: HistogramObserver) -> None:
        """Add what `other` has counted; `other` is not changed. The same bits as from one stream."""
        if other.low > other.high:
            return
        self._widen(other.low, other.high)
        self.counts += coarsen(other.counts, self.exponent - other.exponent)

    def qparams(self, spec: QuantSpec, metric: str = "mse", ends: Ends = "separate") -> QParams:
        """The best of the 100 candidate ranges for the values seen; arguments as for `search_values`.

        The candidates start from the exact minimum and maximum. Within a bin the values are taken to be even.
        Raises `OctavoError` when nothing was observed.
        """
        if self.low > self.high:
            raise OctavoError("range search: nothing was observed; the layer never ran during calibration")
        low, high = torch.tensor(self.low), torch.tensor(self.high)
        return search_histogram(self.counts, self.exponent, low, high, spec, metric, ends)

    def state(self) -> dict[str, torch.Tensor]:
        """All that was observed: `counts` int64 [8192], `exponent` int64 [], `range` float64 [2]."""
        return {
            "counts": self.counts.clone(),
            "exponent": torch.tensor(self.exponent),
            "range": torch.tensor([self.low, self.high], dtype=torch.float64),
        }

    def load_state(self, state: dict[str, torch.Tensor]) -> None:
        """Take over what `state()` returned. Raises `OctavoError` when it cannot be such a state."""
        try:
            counts, exponent, ends = state["counts"], int(state["exponent"]), state["range"].tolist()
        except (KeyError, ValueError, RuntimeError) as error:
            raise OctavoError(f"observer state: {error} is absent or malformed") from error
        if counts.shape != (BINS,) or counts.dtype != torch.int64 or state["range"].shape != (2,):
            raise OctavoError(f"observer state: it must hold {BINS} int64 counts and a range of two values")
        low, high = ends
        seen = low <= high
        fitting = exponent_of(low, high, BINS) if seen and math.isfinite(high - low) else LOWEST_EXPONENT
        if bool((counts < 0).any()) or bool(counts.any()) != seen or exponent != fitting:
            raise OctavoError("observer state: counts, exponent and range contradict each other")
        self.counts, self.exponent, self.low, self.high = counts.clone(), exponent, low, high

    def _widen(self, low: float, high: float) -> None:
        self.low, self.high = min(self.low, low), max(self.high, high)
        exponent = exponent_of(self.low, self.high, BINS)
        self.counts, self.exponent = coarsen(self.counts, exponent - self.exponent), exponent


def _flat(x: torch.Tensor) -> torch.Tensor:
    """One dimension, in the order of the memory, so that channels_last tensors are not copied."""
    strides = x.stride()
    return x.permute(sorted(range(x.ndim), key=lambda dim: -strides[dim])).reshape(-1)
