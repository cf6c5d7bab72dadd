"""Errors of a network's output on reused and forecast deep features, watched while it samples."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from octavo.diffusion.reuse.weights import output_weights
from octavo.runtimes.calls import take_apart
from octavo.runtimes.drop_in import answered
from octavo.runtimes.reuse.execute import forecast
from octavo.runtimes.reuse.networks import DEEP

Whole = tuple[int, ...]
"""The last whole steps, ascending."""


@dataclass
class ForecastErrors:
    """In place of the denoiser's `forward`: evaluates the whole network, and the outer part on all forecasts.

    whole, outer  the two networks (`octavo.runtimes.reuse.networks`), in torch or in an engine.
    order         of the forecast.
    max_age       the most steps that features may serve after the one that computed them.
    floats        the networks are handed float32 tensors, as engines want; else those of the sampler's own dtypes.
    errors        errors[whole, m]: the square of the weighted errors of all steps after the last of `whole` up to m,
                  summed first over those steps, then over images and numbers. See `measure_reuse`.
    numbers       how many images' numbers went in.

    Call `begin` before each batch of images is sampled, and `end` after it.
    """

    whole: Any
    outer: Any
    denoiser: Any
    order: int
    max_age: int
    floats: bool = True
    errors: dict[tuple[Whole, int], float] = field(default_factory=dict)
    numbers: int = 0

    def __post_init__(self) -> None:
        self.forward = type(self.denoiser).forward.__get__(self.denoiser)
        self.seconds: dict[str, list[float]] = {"whole": [], "outer": []}

    def __deepcopy__(self, memo: dict[int, Any]) -> ForecastErrors:
        return self

    def begin(self, scheduler: Any) -> None:
        self.scheduler = scheduler
        self.timesteps: list[float] = []
        self._place = 0
        # By place among the calls at one timestep:
        self._kept: list[dict[int, torch.Tensor]] = []  # deep features of each step
        self._differences: list[
            dict[Whole, torch.Tensor]
        ] = []  # of this step, from each choice of whole steps
        self._sums: list[dict[Whole, torch.Tensor]] = []  # of the segment so far, weighted

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        call = take_apart(self.forward, args, kwargs, floats=self.floats)
        given = call.kwargs(call.tensors)
        timestep = float(call.tensors[call.names.index("timestep")][0])
        if not self.timesteps or timestep != self.timesteps[-1]:
            self._settle(timestep)
            self.timesteps.append(timestep)
            self._place = 0
        else:
            self._place += 1
        if self._place == len(self._kept):
            self._kept.append({})
            self._sums.append({})
        step = len(self.timesteps) - 1
        *outputs, deep = self._timed("whole", self.whole, **given)
        kept = self._kept[self._place]
        differences: dict[Whole, torch.Tensor] = {}
        self._differences.append({})
        for whole in self._histories(step):
            known = _youngest(whole, kept)
            if known and known not in differences:
                at = [self.timesteps[s] for s in reversed(known)]
                features = forecast(at, [kept[s] for s in reversed(known)], timestep)
                reused = self._timed("outer", self.outer, **given, **{DEEP: features})[0]
                differences[known] = (reused.float() - outputs[0].float()).cpu()
            if known:
                self._differences[self._place][whole] = differences[known]
        kept[step] = deep
        for old in [s for s in kept if step - s > self.max_age + self.order * (self.max_age + 1)]:
            del kept[old]
        if step == 0:
            self.numbers += outputs[0].numel()
        outputs = [output.to(call.dtype) for output in outputs]
        return answered(call, self.denoiser, outputs)

    def _histories(self, step: int) -> list[Whole]:
        """Every choice of the last whole steps, at most order + 1, whose features may serve at `step`.

        Fewer than order + 1 only where step 0, always whole, is among them.
        """
        histories: list[Whole] = [(i,) for i in range(max(0, step - self.max_age), step)]
        for _ in range(self.order):
            histories = [
                longer
                for whole in histories
                for longer in (
                    [(i, *whole) for i in range(max(0, whole[0] - self.max_age - 1), whole[0])] or [whole]
                )
            ]
        return histories

    def _settle(self, following: float | None) -> None:
        """Add this step's differences to the segments that go on, now that the step after it is known."""
        if not self.timesteps:
            return
        step = len(self.timesteps) - 1
        behind = [] if following is None else [following]
        weight = float(output_weights(self.scheduler, [self.timesteps[-1], *behind])[0])
        for differences, sums in zip(self._differences, self._sums, strict=False):
            for whole in [w for w in sums if step - w[-1] > self.max_age]:
                del sums[whole]
            for whole, difference in differences.items():
                moved = difference.double() * weight
                sums[whole] = sums[whole] + moved if whole in sums else moved
                error = float(sums[whole].square().sum())
                self.errors[whole, step] = self.errors.get((whole, step), 0.0) + error
        self._differences = []

    def end(self) -> None:
        """Sum up the errors of this batch."""
        self._settle(None)

    def _timed(self, what: str, evaluate: Any, **given: Any) -> Any:
        start = time.perf_counter()
        outputs = evaluate(**given, return_dict=False)
        self.seconds[what].append(time.perf_counter() - start)
        return outputs

    @property
    def mean_seconds(self) -> tuple[float, float]:
        """Of one evaluation: the whole network, its outer part; the first of each, which compiles, is left out."""
        means = []
        for what in ("whole", "outer"):
            seconds = self.seconds[what][1:] or self.seconds[what] or [0.0]
            means.append(sum(seconds) / len(seconds))
        return means[0], means[1]


def _youngest(whole: Whole, kept: Mapping[int, Any]) -> Whole:
    """As many of the last whole steps as features were kept of without a gap, as the sampler will find them."""
    count = 0
    while count < len(whole) and whole[-1 - count] in kept:
        count += 1
    return whole[len(whole) - count :]
