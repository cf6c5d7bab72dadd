"""A trajectory as a value: the timesteps a sampler visits, for which model they were found, and what that cost."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from itertools import pairwise
from typing import Any

from octavo.diffusion.solvers.eta import checked_eta
from octavo.errors import OctavoError, quoted
from octavo.files import read_json, write_json

FORMAT = "octavo trajectory"
VERSION = 1
PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")
MAX_TRAIN_TIMESTEPS = 1_000_000


@dataclass(frozen=True)
class Trajectory:
    """The training timesteps that a sampler visits, from the noisy end, and where they come from.

    timesteps            ints, each told to the network once, descending, within 0 .. num_train_timesteps - 1; after the
                         last the sampler jumps to the image.
    num_train_timesteps  T of the noise schedule that the timesteps are indices of.
    prediction_type      what the network predicts: "epsilon", "v_prediction" or "sample".
    method               what found them: "dp", "grid" or the name of a spacing.
    objective            what the search minimised: "elbo", "trajectory", "fd" or "analytic"; None for a spacing.
    network_evaluations  what the search cost: evaluations of the network, one for each image.
    seed                 of the search; None where nothing was drawn.
    model                `octavo.fingerprint.model_identity` of the network it was found on; None: of no one model.
                         Compared by `same_model`, which takes a network and its quantized versions for one, so that
                         what was found on one of these can be used on any.
    facts                whatever else is worth keeping of the search: JSON-safe, for people.
    alpha_bars           `NoiseSchedule.digest` of the schedule that the timesteps were found for; None: of no one
                         schedule (a spacing that goes by timesteps alone), or not known (an older file).
    eta                  DDIM's, that the timesteps were found for and are sampled with; None: the sampler's own.

    Raises `OctavoError` for timesteps that are no trajectory.

    >>> trajectory = Trajectory((900, 500, 100), 1000, "epsilon", "linear")
    >>> trajectory.num_steps, Trajectory.from_dict(trajectory.to_dict()) == trajectory
    (3, True)
    """

    timesteps: tuple[int, ...]
    num_train_timesteps: int
    prediction_type: str
    method: str
    objective: str | None = None
    network_evaluations: int = 0
    seed: int | None = None
    model: str | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)
    alpha_bars: tuple[float, ...] | None = None
    eta: float | None = None

    def __post_init__(self) -> None:
        _whole("num_train_timesteps", self.num_train_timesteps, 1, MAX_TRAIN_TIMESTEPS)
        check_timesteps(self.timesteps, self.num_train_timesteps)
        object.__setattr__(self, "timesteps", tuple(self.timesteps))
        if self.prediction_type not in PREDICTION_TYPES:
            raise OctavoError(
                f"trajectory: prediction_type {quoted(self.prediction_type)} is not one of "
                f"{', '.join(PREDICTION_TYPES)}"
            )
        _text("method", self.method)
        for name in ("objective", "model"):
            if getattr(self, name) is not None:
                _text(name, getattr(self, name))
        _whole("network_evaluations", self.network_evaluations, 0, 2**62)
        if self.seed is not None:
            _whole("seed", self.seed, 0, 2**62)
        if not isinstance(self.facts, Mapping):
            raise OctavoError("trajectory: facts are not a JSON object")
        object.__setattr__(self, "alpha_bars", checked_digest("trajectory", self.alpha_bars))
        if self.eta is not None:
            object.__setattr__(self, "eta", checked_eta("trajectory: eta", self.eta))

    @property
    def num_steps(self) -> int:
        """K: the sampler's iterations."""
        return len(self.timesteps)

    def __str__(self) -> str:
        found_by = self.method if self.objective is None else f"{self.method}, {self.objective}"
        eta = "" if self.eta is None else f", eta {self.eta:g}"
        steps = "1 step" if self.num_steps == 1 else f"{self.num_steps} steps"
        return f"{steps} ({found_by}{eta}): {' '.join(map(str, self.timesteps))}"

    def to_dict(self) -> dict[str, Any]:
        """JSON-safe, every field, with the format's name and version."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        values |= {"timesteps": list(self.timesteps), "facts": dict(self.facts)}
        values["alpha_bars"] = None if self.alpha_bars is None else list(self.alpha_bars)
        return {"format": FORMAT, "version": VERSION, **values}

    @classmethod
    def from_dict(cls, state: Any) -> Trajectory:
        """The inverse of `to_dict`. Raises `OctavoError` for whatever it did not write."""
        if not isinstance(state, Mapping) or state.get("format") != FORMAT:
            raise OctavoError("trajectory: is not one that `octavo trajectory` wrote")
        if type(state.get("version")) is not int or state["version"] != VERSION:
            raise OctavoError(
                f"trajectory: version {quoted(state.get('version'))} is not {VERSION}; upgrade octavo"
            )
        given = {key: value for key, value in state.items() if key not in ("format", "version")}
        known = [f.name for f in fields(cls)]
        for key in given:
            if key not in known:
                raise OctavoError(f"trajectory: unknown field {str(key)[:60]!r}; upgrade octavo")
        for name in known[:4]:
            if name not in given:
                raise OctavoError(f"trajectory: {name} is missing; search it again")
        return cls(**given)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the trajectory as JSON, whole or not at all."""
        write_json(path, self.to_dict())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Trajectory:
        """Read what `save` wrote. Raises `OctavoError`, which names the file, for anything else."""
        state = read_json(path)
        try:
            return cls.from_dict(state)
        except OctavoError as error:
            raise OctavoError(f"{path}: {error}") from error


def check_timesteps(timesteps: Any, num_train_timesteps: int) -> None:
    """Raise `OctavoError` unless `timesteps` are whole numbers that descend within 0 .. num_train_timesteps - 1.

    >>> check_timesteps([500, 500], 1000)
    Traceback (most recent call last):
        ...
    octavo.errors.OctavoError: trajectory: timesteps do not descend (500 follows 500)
    """
    if not isinstance(timesteps, (list, tuple)) or not timesteps:
        raise OctavoError("trajectory: timesteps are not a list of at least one timestep")
    for t in timesteps:
        if type(t) is not int or not 0 <= t < num_train_timesteps:
            raise OctavoError(
                f"trajectory: timestep {str(t)[:60]} is not a whole number from 0 to {num_train_timesteps - 1}"
            )
    for before, after in pairwise(timesteps):
        if after >= before:
            raise OctavoError(f"trajectory: timesteps do not descend ({after} follows {before})")


def checked_digest(name: str, alpha_bars: Any) -> tuple[float, ...] | None:
    """The digest of a schedule as a tuple. Raises `OctavoError` for what is none.

    >>> checked_digest("trajectory", [0.9999, 0.0001]), checked_digest("trajectory", None)
    ((0.9999, 0.0001), None)
    """
    if alpha_bars is None:
        return None
    numbers = isinstance(alpha_bars, (list, tuple)) and all(
        type(value) in (int, float) and math.isfinite(value) and 0 <= value <= 1 for value in alpha_bars
    )
    if not numbers or not alpha_bars:
        raise OctavoError(f"{name}: alpha_bars are not a list of numbers from 0 to 1")
    return tuple(alpha_bars)


def _whole(name: str, value: Any, low: int, high: int) -> None:
    if type(value) is not int or not low <= value <= high:
        raise OctavoError(
            f"trajectory: {name} {str(value)[:60]!r} is not a whole number from {low} to {high}"
        )


def _text(name: str, value: Any) -> None:
    if not isinstance(value, str) or not value or len(value) > 200:
        raise OctavoError(f"trajectory: {name} is not a short text")
