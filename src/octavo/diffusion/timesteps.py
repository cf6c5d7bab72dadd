"""At which steps of a trajectory to look: the timestep distributions of calibration.

A draw is a number of *steps left*, t in 1..T, where T is the number of steps the sampler makes (not the
number of training timesteps): t = T is the network's first call, on pure noise x_T, and t = 1 its last.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from octavo.errors import OctavoError


class Draws(NamedTuple):
    """Where to look and what to call it: two int64 tensors [N] of steps left, each in 1..T.

    They differ only for `AsPublished`; everywhere else the pair is labelled with the step it was captured at.
    """

    captured: Tensor
    label: Tensor


@dataclass(frozen=True)
class Distribution:
    """A distribution of steps left. Fractions are of T, so one recipe serves every number of steps.

    `to_dict()` gives a JSON-safe dict that `from_dict` reads back.
    """

    name: ClassVar[str]

    def sample(self, num_samples: int, num_steps: int, generator: torch.Generator) -> Draws:
        """Draw `num_samples` steps left for a sampler of `num_steps` steps; advances `generator`."""
        captured = _clamp(self._position(num_samples, num_steps, generator), num_steps)
        return Draws(captured, captured)

    def to_dict(self) -> dict[str, Any]:
        return {"name": self.name, **dataclasses.asdict(self)}

    def _position(self, num_samples: int, num_steps: int, generator: torch.Generator) -> Tensor:
        """float64 [N], in steps, before rounding and clamping."""
        raise NotImplementedError


@dataclass(frozen=True)
class NDTC(Distribution):
    """Normally distributed timesteps (PTQ4DM 2211.15736, section 3.3, Algorithm 1).

    t = clamp(floor(Normal(mean * T, (std * T)^2)), 0, T), and t = 0, which no sampler hands to the network,
    counts as 1. The paper asks for mean <= 0.5 (the clean half); `std="sqrt"` is its literal standard
    deviation of sqrt(T/2) steps, whatever T.
    """

    name: ClassVar[str] = "ndtc"
    mean: float = 0.4
    std: float | Literal["sqrt"] = 0.5

    def __post_init__(self) -> None:
        _check_number("mean", self.mean, 0.0, 1.0)
        if self.std != "sqrt":
            _check_number("std", self.std, 0.0, math.inf, also='or "sqrt"')

    def _position(self, num_samples: int, num_steps: int, generator: torch.Generator) -> Tensor:
        std = math.sqrt(num_steps / 2) if self.std == "sqrt" else float(self.std) * num_steps
        return self.mean * num_steps + std * _normal(num_samples, generator)


@dataclass(frozen=True)
class Uniform(Distribution):
    """Every step equally likely: t uniform on 1..T."""

    name: ClassVar[str] = "uniform"

    def _position(self, num_samples: int, num_steps: int, generator: torch.Generator) -> Tensor:
        return torch.randint(1, num_steps + 1, (num_samples,), generator=generator).double()


@dataclass(frozen=True)
class Single(Distribution):
    """One step for all: t = round(at * T); at=1 calibrates on noise x_T, at=0 on the last call's input."""

    name: ClassVar[str] = "single"
    at: float = 0.5

    def __post_init__(self) -> None:
        _check_number("at", self.at, 0.0, 1.0)

    def _position(self, num_samples: int, num_steps: int, generator: torch.Generator) -> Tensor:
        return torch.full((num_samples,), self.at * num_steps + 0.5, dtype=torch.float64)


@dataclass(frozen=True)
class SkewNormal(Distribution):
    """A true skew-normal (Azzalini 1985), which the paper's word "skew" may suggest.

    X = location + scale * (d |Z0| + sqrt(1 - d^2) Z1), d = shape / sqrt(1 + shape^2), Z0 and Z1 standard
    normal; its mean is location + scale * d * sqrt(2/pi). The defaults give mean 0.39 T and std 0.32 T, with
    a long tail towards noise.
    """

    name: ClassVar[str] = "skew_normal"
    location: float = 0.0
    scale: float = 0.5
    shape: float = 4.0

    def __post_init__(self) -> None:
        _check_number("location", self.location, -math.inf, math.inf)
        _check_number("scale", self.scale, 0.0, math.inf)
        _check_number("shape", self.shape, -math.inf, math.inf)

    def _position(self, num_samples: int, num_steps: int, generator: torch.Generator) -> Tensor:
        d = self.shape / math.hypot(1.0, self.shape)
        half = _normal(num_samples, generator).abs()
        skewed = d * half + math.sqrt(1 - d * d) * _normal(num_samples, generator)
        return num_steps * (self.location + self.scale * skewed)


@dataclass(frozen=True)
class AsPublished(Distribution):
    """What the research code of PTQ4DM really does, to measure the difference; never a good choice.

    It draws an index i = clamp(floor(Normal(0.4 T, (0.4 T)^2)), 0, T-1), compares it with a loop counter that
    runs from the NOISY end, stores that step's OUTPUT (so the image of index T-2-i), and labels it i. An
    index i is i + 1 steps left, hence captured = T - 1 - i and label = i + 1. The output of the very last
    step (i = T-1) is a finished image, which is no network input; the nearest one, captured = 1, stands for
    it.

    That code makes one more error, outside this class: it tells the network the index `label - 1` itself, not
    the training timestep `scheduler.timesteps[T - label]`.
    """

    name: ClassVar[str] = "as_published"
    mean: float = 0.4
    std: float = 0.4

    def __post_init__(self) -> None:
        _check_number("mean", self.mean, 0.0, 1.0)
        _check_number("std", self.std, 0.0, math.inf)

    def sample(self, num_samples: int, num_steps: int, generator: torch.Generator) -> Draws:
        position = num_steps * (self.mean + self.std * _normal(num_samples, generator))
        index = position.floor().clamp(0, num_steps - 1).to(torch.int64)
        return Draws(captured=_clamp(num_steps - 1 - index, num_steps), label=index + 1)


DISTRIBUTIONS: dict[str, type[Distribution]] = {
    kind.name: kind for kind in (NDTC, Uniform, Single, SkewNormal, AsPublished)
}


def distribution(name: str, **params: Any) -> Distribution:
    """The distribution called `name`, with its parameters checked.

    Raises OctavoError for an unknown name, an unknown parameter or a value out of range.

    >>> distribution("ndtc", std="sqrt")
    NDTC(mean=0.4, std='sqrt')
    """
    if name not in DISTRIBUTIONS:
        raise OctavoError(f"timesteps: no distribution {name!r}; choose one of {', '.join(DISTRIBUTIONS)}")
    kind = DISTRIBUTIONS[name]
    known = [field.name for field in dataclasses.fields(kind)]
    for key in params:
        if key not in known:
            raise OctavoError(f"timesteps: {name} has no {key!r}, only {', '.join(known) or 'no parameters'}")
    return kind(**params)


def from_dict(state: Mapping[str, Any]) -> Distribution:
    """The inverse of `Distribution.to_dict`; raises OctavoError as `distribution` does.

    >>> from_dict(Single(at=1.0).to_dict())
    Single(at=1.0)
    """
    if "name" not in state:
        raise OctavoError("timesteps: the description has no 'name'")
    return distribution(**state)


def draw(
    timesteps: str | Distribution, num_samples: int, num_steps: int, generator: torch.Generator, **params: Any
) -> Tensor:
    """Draw the steps to capture at: int64 [num_samples], steps left in 1..num_steps.

    `timesteps` is a name of DISTRIBUTIONS (with its `params`) or a Distribution. Advances `generator`, a CPU
    one, and touches no other randomness. Raises OctavoError for bad names, parameters or counts. Source:
    PTQ4DM, Algorithm 1.

    >>> draw("single", 3, 50, torch.Generator(), at=1.0)
    tensor([50, 50, 50])
    """
    return draw_labelled(timesteps, num_samples, num_steps, generator, **params).captured


def draw_labelled(
    timesteps: str | Distribution, num_samples: int, num_steps: int, generator: torch.Generator, **params: Any
) -> Draws:
    """As `draw`, and beside each step captured the step it is labelled with (see AsPublished).

    >>> draws = draw_labelled("as_published", 1, 100, torch.Generator(), std=0.0)
    >>> draws.captured.item(), draws.label.item()  # index 40: the image of index 58
    (59, 41)
    """
    for argument, value in (("num_samples", num_samples), ("num_steps", num_steps)):
        if value < 1:
            raise OctavoError(f"{argument}: {value} is not at least 1")
    if isinstance(timesteps, str):
        timesteps = distribution(timesteps, **params)
    elif params:
        raise OctavoError(f"timesteps: {', '.join(params)} belongs inside {timesteps!r}")
    return timesteps.sample(num_samples, num_steps, generator)


def _clamp(position: Tensor, num_steps: int) -> Tensor:
    return position.floor().clamp(1, num_steps).to(torch.int64)


def _normal(num_samples: int, generator: torch.Generator) -> Tensor:
    return torch.randn(num_samples, generator=generator, dtype=torch.float64)


def _check_number(name: str, value: object, low: float, high: float, also: str = "") -> None:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value) or not low <= value <= high:  # type: ignore[arg-type,operator]
        interval = "a number" if low == -math.inf else f"at least {low:g}"
        if high < math.inf:
            interval = f"between {low:g} and {high:g}"
        raise OctavoError(f"timesteps: {name}={value!r} is not {interval} {also}".rstrip())
