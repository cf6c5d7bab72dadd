"""Octavo: 8-bit diffusion models, without retraining.

    import octavo
    pipeline = octavo.load("digits")                     # or any diffusers pipeline
    quantized = octavo.quantize(pipeline)
    quantized.save_pretrained("digits-int8")             # an ordinary diffusers folder
    fast = octavo.accelerate(quantized)                  # real int8, by OpenVINO
    octavo.audit(fast)                                   # which kernel ran each layer

Importing this package registers Octavo with diffusers, so that plain `from_pretrained` loads what it saved, and keeps
the engines that are imported after it from reporting to their makers.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from octavo.checkpoint.registration import register as _register
from octavo.telemetry import refuse as _refuse_telemetry

if TYPE_CHECKING:
    from octavo.api import quantize as quantize
    from octavo.calibration import PTQ4DM as PTQ4DM
    from octavo.calibration import named_recipe as named_recipe
    from octavo.checkpoint import load as load
    from octavo.diffusion.reuse import ReusePlan as ReusePlan
    from octavo.diffusion.trajectories import Trajectory as Trajectory
    from octavo.diffusion.trajectories import with_trajectory as with_trajectory
    from octavo.errors import OctavoError as OctavoError
    from octavo.evaluation.reuse_search import measure_reuse as measure_reuse
    from octavo.evaluation.target import Target as Target
    from octavo.evaluation.trajectory_methods import SearchOptions as SearchOptions
    from octavo.evaluation.trajectory_methods import search_cost as search_cost
    from octavo.evaluation.trajectory_search import search_trajectory as search_trajectory
    from octavo.runtimes import accelerate as accelerate
    from octavo.runtimes import audit as audit
    from octavo.runtimes import export as export
    from octavo.runtimes import with_reuse as with_reuse

__version__ = "0.1.0"

_PLACES = {
    "PTQ4DM": "octavo.calibration",
    "OctavoError": "octavo.errors",
    "ReusePlan": "octavo.diffusion.reuse",
    "Trajectory": "octavo.diffusion.trajectories",
    "SearchOptions": "octavo.evaluation.trajectory_methods",
    "Target": "octavo.evaluation.target",
    "accelerate": "octavo.runtimes",
    "audit": "octavo.runtimes",
    "export": "octavo.runtimes",
    "load": "octavo.checkpoint",
    "measure_reuse": "octavo.evaluation.reuse_search",
    "named_recipe": "octavo.calibration",
    "quantize": "octavo.api",
    "search_cost": "octavo.evaluation.trajectory_methods",
    "search_trajectory": "octavo.evaluation.trajectory_search",
    "with_reuse": "octavo.runtimes",
    "with_trajectory": "octavo.diffusion.trajectories",
}

_SCHEDULERS = "octavo.diffusion.trajectories.schedulers"
_ANALYTIC = "octavo.diffusion.analytic.scheduler"
_ETA = "octavo.diffusion.solvers.eta"
_UNCONDITIONAL = "octavo.diffusion.solvers.unconditional"
_FOR_DIFFUSERS = {
    "SchedulerMixin": "diffusers",
    "AnalyticScheduler": _ANALYTIC,
    "AnalyticTrajectoryScheduler": _ANALYTIC,
    "DDIMEtaScheduler": _ETA,
    "DDIMEtaTrajectoryScheduler": _SCHEDULERS,
    "DDIMTrajectoryScheduler": _SCHEDULERS,
    "DDPMTrajectoryScheduler": _SCHEDULERS,
    "DEISMultistepTrajectoryScheduler": _SCHEDULERS,
    "DPMSolverMultistepTrajectoryScheduler": _SCHEDULERS,
    "EulerAncestralDiscreteTrajectoryScheduler": _SCHEDULERS,
    "EulerDiscreteTrajectoryScheduler": _SCHEDULERS,
    "HeunDiscreteTrajectoryScheduler": _SCHEDULERS,
    "UniPCMultistepTrajectoryScheduler": _SCHEDULERS,
    "DEISMultistepUnconditionalScheduler": _UNCONDITIONAL,
    "EulerAncestralDiscreteUnconditionalScheduler": _UNCONDITIONAL,
    "EulerDiscreteUnconditionalScheduler": _UNCONDITIONAL,
    "HeunDiscreteUnconditionalScheduler": _UNCONDITIONAL,
    "PNDMUnconditionalScheduler": _UNCONDITIONAL,
    "UniPCMultistepUnconditionalScheduler": _UNCONDITIONAL,
    "DEISMultistepUnconditionalTrajectoryScheduler": _SCHEDULERS,
    "EulerAncestralDiscreteUnconditionalTrajectoryScheduler": _SCHEDULERS,
    "EulerDiscreteUnconditionalTrajectoryScheduler": _SCHEDULERS,
    "HeunDiscreteUnconditionalTrajectoryScheduler": _SCHEDULERS,
    "UniPCMultistepUnconditionalTrajectoryScheduler": _SCHEDULERS,
    "PredictorCorrectorScheduler": "octavo.diffusion.solvers.predictor_corrector",
    "PredictorCorrectorTrajectoryScheduler": _SCHEDULERS,
}
"""What diffusers looks for in this package, by which `model_index.json` names the schedulers that are Octavo's."""

__all__ = ["__version__", *sorted(_PLACES)]


def __getattr__(name: str) -> Any:
    place = _PLACES.get(name) or _FOR_DIFFUSERS.get(name)
    if place is None:
        raise AttributeError(f"module 'octavo' has no attribute {name!r}")
    return getattr(importlib.import_module(place), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


_refuse_telemetry()
_register()
