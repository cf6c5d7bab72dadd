"""Gamma_t, the mean squared prediction of noise: one number for each timestep, of which optimal variances are made."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np

from octavo.diffusion.trajectories.schedule import Floats
from octavo.diffusion.trajectories.trajectory import PREDICTION_TYPES, check_timesteps, checked_digest
from octavo.errors import OctavoError, quoted
from octavo.files import read_json, write_json

FORMAT = "octavo gamma"
VERSION = 1
LEAST = 1e-9
"""For interpolation Gamma is at least this: at 0 the variance that it stands for is infinite."""


@dataclass(frozen=True)
class Gamma:
    """Gamma_t = E || eps_theta(x_t, t) ||^2 / d of one network, at ascending timesteps.

    timesteps            ints, ascending, within 0 .. num_train_timesteps - 1.
    values               floats, Gamma at each of them; 1 means that x_t tells all of x_0, less that some is unknown.
                         An estimate may be above 1, or below 0, by its error.
    errors               floats, their standard errors over images.
    num_train_timesteps  T of the noise schedule that the timesteps are indices of.
    prediction_type      what the network predicts, from which eps was made.
    images               how many images each value is a mean over.
    network_evaluations  what estimating cost: evaluations of the network, one for each image.
    seed                 of the estimate.
    model                `octavo.fingerprint.model_identity` of the network; None: of no one model.
    network              `octavo.fingerprint.fingerprint` of the network that executed: the Gamma of a quantized network
                         is another than its original's. None: of no one network, and used on any of the model's.
    facts                whatever else is worth keeping (the runtime): JSON-safe, for people.
    alpha_bars           `NoiseSchedule.digest` of the noise schedule; None: not known, and not compared.

    Raises `OctavoError` for what is no such table. Source: Bao et al. (2201.06503), equation 8, whose Gamma is of the
    score, eps / sqrt(1 - abar): theirs times 1 - abar is ours.

    >>> gamma = Gamma((0, 999), (0.1, 1.0), (0.0, 0.0), 1000, "epsilon")
    >>> Gamma.from_dict(gamma.to_dict()) == gamma
    True
    """

    timesteps: tuple[int, ...]
    values: tuple[float, ...]
    errors: tuple[float, ...]
    num_train_timesteps: int
    prediction_type: str
    images: int = 0
    network_evaluations: int = 0
    seed: int = 0
    model: str | None = None
    network: str | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)
    alpha_bars: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        for name in ("num_train_timesteps", "images", "network_evaluations", "seed"):
            if type(getattr(self, name)) is not int or not 0 <= getattr(self, name) < 2**62:
                raise OctavoError(
                    f"gamma: {name} {str(getattr(self, name))[:60]!r} is not a whole number from 0"
                )
        for name in ("timesteps", "values", "errors"):
            if not isinstance(getattr(self, name), (list, tuple)):
                raise OctavoError(f"gamma: {name} are not a list")
            object.__setattr__(self, name, tuple(getattr(self, name)))
        check_table(self.timesteps, self.values, self.num_train_timesteps)
        check_table(self.timesteps, self.errors, self.num_train_timesteps)
        if self.prediction_type not in PREDICTION_TYPES:
            raise OctavoError(f"gamma: prediction_type is not one of {', '.join(PREDICTION_TYPES)}")
        for name in ("model", "network"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, str) or not 0 < len(value) <= 200):
                raise OctavoError(f"gamma: {name} is not a short text")
        if not isinstance(self.facts, Mapping):
            raise OctavoError("gamma: facts are not a JSON object")
        object.__setattr__(self, "alpha_bars", checked_digest("gamma", self.alpha_bars))

    def at(self, timesteps: Sequence[int], alpha_bars: Floats) -> Floats:
        """Gamma at any timesteps: see `interpolated`."""
        return interpolated(self.timesteps, self.values, timesteps, alpha_bars)

    def to_dict(self) -> dict[str, Any]:
        """JSON-safe, every field, with the format's name and version."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        values |= {name: list(values[name]) for name in ("timesteps", "values", "errors")}
        values["alpha_bars"] = None if self.alpha_bars is None else list(self.alpha_bars)
        return {"format": FORMAT, "version": VERSION, **values, "facts": dict(self.facts)}

    @classmethod
    def from_dict(cls, state: Any) -> Gamma:
        """The inverse of `to_dict`. Raises `OctavoError` for whatever it did not write."""
        if not isinstance(state, Mapping) or state.get("format") != FORMAT:
            raise OctavoError("gamma: is not one that Octavo estimated")
        if type(state.get("version")) is not int or state["version"] != VERSION:
            raise OctavoError(
                f"gamma: version {quoted(state.get('version'))} is not {VERSION}; upgrade octavo"
            )
        given = {key: value for key, value in state.items() if key not in ("format", "version")}
        known = [f.name for f in fields(cls)]
        for key in given:
            if key not in known:
                raise OctavoError(f"gamma: unknown field {str(key)[:60]!r}; upgrade octavo")
        for name in known[:5]:
            if name not in given:
                raise OctavoError(f"gamma: {name} is missing; estimate it again")
        return cls(**given)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the table as JSON, whole or not at all."""
        write_json(path, self.to_dict())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Gamma:
        """Read what `save` wrote. Raises `OctavoError`, which names the file, for anything else."""
        state = read_json(path)
        try:
            return cls.from_dict(state)
        except OctavoError as error:
            raise OctavoError(f"{path}: {error}") from error


def check_table(timesteps: Any, values: Any, num_train_timesteps: int) -> None:
    """Raise `OctavoError` unless ascending timesteps have a finite number each."""
    if not isinstance(timesteps, (list, tuple)) or not isinstance(values, (list, tuple)):
        raise OctavoError("gamma: needs a list of timesteps and one of values")
    check_timesteps(list(timesteps)[::-1], num_train_timesteps)
    if len(values) != len(timesteps):
        raise OctavoError(f"gamma: has {len(values)} values for {len(timesteps)} timesteps")
    for value in values:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not np.isfinite(value):
            raise OctavoError(f"gamma: {str(value)[:60]!r} is not a finite number")


def interpolated(
    known: Sequence[int], values: Sequence[float], timesteps: Sequence[int], alpha_bars: Floats
) -> Floats:
    """Gamma at `timesteps` [K] from its `values` at the timesteps `known`, float64 [K].

    At the known timesteps it is the value itself. Between them c^2 is linear in log SNR, SNR = abar / (1 - abar), where
    c^2 = (1 / Gamma - 1) / SNR, at least 0, is the variance of the normal data that would have this Gamma: exact for
    normal data. Below the first and above the last, c^2 is that of the nearest. alpha_bars: float64 [T].

    >>> alpha_bars = np.linspace(0.99, 0.01, 11)
    >>> exact = (1 - alpha_bars) / (alpha_bars * 0.25 + 1 - alpha_bars)  # of data with variance 0.25
    >>> bool(np.allclose(interpolated((2, 7), exact[[2, 7]], range(11), alpha_bars), exact))
    True
    """
    log_snr = _log_snr(alpha_bars)
    kept = np.maximum(np.asarray(values, dtype=np.float64), LEAST)
    nodes = log_snr[list(known)]
    variances = np.maximum(1 / kept - 1, 0.0) * np.exp(-nodes)
    wanted = log_snr[list(timesteps)]
    # np.interp wants its nodes ascending; the SNR falls with the timestep
    between = np.interp(wanted, nodes[::-1], variances[::-1])
    found = 1 / (1 + between * np.exp(wanted))
    own = dict(zip(known, values, strict=True))
    return np.array([own.get(t, g) for t, g in zip(timesteps, found, strict=True)], dtype=np.float64)


def _log_snr(alpha_bars: Floats) -> Floats:
    """log abar / (1 - abar), falling; an abar of 0 (zero terminal SNR) is taken as 1e-12."""
    kept = np.maximum(alpha_bars, 1e-12)
    return np.log(kept) - np.log1p(-kept)
