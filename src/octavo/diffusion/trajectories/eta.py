"""A pipeline whose DDIM has an eta of its own, on a trajectory or not."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from diffusers import DDIMScheduler

from octavo.diffusion.exchange import exchange_scheduler
from octavo.diffusion.solvers.eta import DDIMEtaScheduler, checked_eta
from octavo.diffusion.trajectories.bound import ETA, SETTING, plain_name, remade, visited_by
from octavo.diffusion.trajectories.schedulers import ADAPTERS
from octavo.errors import OctavoError

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


def with_eta(pipeline: DiffusionPipeline, eta: float) -> DiffusionPipeline:
    """The same pipeline whose DDIM adds `eta` of DDPM's noise by itself: see `DDIMEtaScheduler`; 0 is plain DDIM.

    A trajectory that it visits stays. `save_pretrained` writes an ordinary folder, which plain `from_pretrained` loads
    after `import octavo`. `pipeline` stays as it was. Raises `OctavoError` for an eta out of range, and for one above 0
    under another scheduler than DDIM.

    >>> with_eta(pipeline, 0.5)(num_inference_steps=10)  # doctest: +SKIP
    """
    eta, own = checked_eta(ETA, eta), pipeline.scheduler
    if eta == (held_eta(own) or 0.0):
        return pipeline
    name = plain_name(own)
    if name not in (DDIMScheduler.__name__, DDIMEtaScheduler.__name__):
        raise OctavoError(
            f"eta: is DDIM's, and {name} has none; leave it out, or give the pipeline a DDIMScheduler"
        )
    trajectory = visited_by(own)
    plain: Any = DDIMEtaScheduler if eta else DDIMScheduler
    kind = plain if trajectory is None else ADAPTERS[plain.__name__]
    settings: dict[str, Any] = {ETA: eta} if eta else {}
    settings |= {SETTING: list(trajectory)} if trajectory is not None else {}
    return exchange_scheduler(pipeline, remade(kind, own, **settings))


def held_eta(scheduler: Any) -> float | None:
    """The eta that the scheduler holds; None for one that holds none."""
    return float(scheduler.config.eta) if isinstance(scheduler, DDIMEtaScheduler) else None
