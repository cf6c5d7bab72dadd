"""DDIM that holds its eta among its settings: a folder samples with it, whatever the pipeline's call leaves out."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from numbers import Real
from typing import Any

from diffusers import DDIMScheduler

from octavo.diffusion.solvers.settings import announce_settings
from octavo.errors import OctavoError


class DDIMEtaScheduler(DDIMScheduler):
    """`DDIMScheduler` with one more setting, `eta` from 0 to 1: how much of DDPM's noise each step adds.

    sigma_t = eta sqrt((1 - abar_s) / (1 - abar_t)) sqrt(1 - abar_t / abar_s). Diffusers has eta as an argument of the
    pipeline's call alone, and DDIMPipeline as Stable Diffusion's hand their default, 0, to every `step`, asked for or
    not. So a `step` that is handed 0 goes by the setting, and one that is handed another number by that. Within
    `called_with(eta)` every step goes by that eta, 0 too: so do runs that Octavo makes with an eta given. Raises
    `OctavoError` for an eta out of range. Source: DDIM (2010.02502), equation 16.

    >>> DDIMEtaScheduler(eta=0.5).eta_of_step(0.0), DDIMEtaScheduler(eta=0.5).eta_of_step(0.2)
    (0.5, 0.2)
    """

    _given: float | None = None

    def __init__(self, *args: Any, eta: float = 0.0, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.register_to_config(eta=checked_eta("eta", eta))

    @functools.wraps(DDIMScheduler.step)
    def step(
        self, model_output: Any, timestep: Any, sample: Any, eta: float = 0.0, *args: Any, **kwargs: Any
    ) -> Any:
        return super().step(model_output, timestep, sample, self.eta_of_step(eta), *args, **kwargs)

    def eta_of_step(self, handed: float) -> float:
        """The eta of a step that the pipeline hands `handed`."""
        if self._given is not None:
            return self._given
        return handed or float(self.config.eta)

    @contextmanager
    def called_with(self, eta: float) -> Iterator[None]:
        """Within the block every step goes by `eta`."""
        before, self._given = self._given, eta
        try:
            yield
        finally:
            self._given = before


announce_settings(DDIMEtaScheduler, "eta")


def checked_eta(name: str, eta: Any) -> float:
    """`eta` as a float. Raises `OctavoError`, which begins with `name`, for what is no number from 0 to 1.

    >>> checked_eta("eta", 1)
    1.0
    """
    if isinstance(eta, bool) or not isinstance(eta, Real) or not 0 <= float(eta) <= 1:
        raise OctavoError(f"{name}: {repr(eta)[:60]} is not a number from 0 to 1")
    return float(eta)
