"""Another sampler for a pipeline: the same network, denoised by a scheduler of the user's choice."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from octavo.diffusion.exchange import exchange_scheduler
from octavo.errors import OctavoError

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

SOLVERS: dict[str, tuple[str, Mapping[str, Any]]] = {
    "ddim": ("DDIMScheduler", {}),
    "ddpm": ("DDPMScheduler", {}),
    "dpmsolver++": (
        "DPMSolverMultistepScheduler",
        {"algorithm_type": "dpmsolver++", "solver_order": 2, "solver_type": "midpoint"},
    ),
    "dpmsolver++sde": (
        "DPMSolverMultistepScheduler",
        {"algorithm_type": "sde-dpmsolver++", "solver_order": 2, "solver_type": "midpoint"},
    ),
    "unipc": (
        "UniPCMultistepScheduler",
        {"solver_order": 2, "solver_type": "bh2", "predict_x0": True, "disable_corrector": []},
    ),
    "deis": (
        "DEISMultistepScheduler",
        {"algorithm_type": "deis", "solver_order": 2, "solver_type": "logrho"},
    ),
    "pndm": ("PNDMScheduler", {"skip_prk_steps": False, "timestep_spacing": "leading"}),
    "heun": ("HeunDiscreteScheduler", {}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler_ancestral": ("EulerAncestralDiscreteScheduler", {}),
    "predictor_corrector": ("PredictorCorrectorScheduler", {}),
}
"""Solvers by name: the class, of diffusers or of Octavo, and the settings that make it that solver, whatever the
model's own are.

All orders are 2, which hold for guided models too. PNDM's formulas hold for the equal steps of "leading" only.
"""
SCHEDULE = (
    "num_train_timesteps",
    "beta_start",
    "beta_end",
    "beta_schedule",
    "trained_betas",
    "prediction_type",
    "rescale_betas_zero_snr",
    "set_alpha_to_one",
    "clip_sample",
    "clip_sample_range",
)
"""Settings that belong to the model, so that no other class's default may take their place."""
ADAPTIVE = ("rk45", "adaptive")
"""Solvers that choose the steps of each image themselves, which no scheduler can: see `octavo.diffusion.solvers`."""
NO_SAMPLE_PREDICTION = ("PNDMScheduler", "EulerAncestralDiscreteScheduler")
PLAIN = ("DDIMPipeline", "DDPMPipeline")
"""Pipelines that hand x_t to the network as it is, start from unit noise, and give `step` a generator."""


def with_scheduler(pipeline: DiffusionPipeline, name: str) -> DiffusionPipeline:
    """The same pipeline with the scheduler that `name` names, made from the configuration of its own.

    `name` is one of SOLVERS, "ddim:ETA" ("ddim:0.5", DDIM that holds its eta, see `with_eta`), or a diffusers class
    ("DDPMScheduler"). The networks are shared, `pipeline` stays as it
    was. The new scheduler has the noise schedule, the prediction type and, where it knows them, the other settings of
    the old one; of one that knows of no clipping (DPM-Solver, UniPC, Euler) it is made without. A DDIMPipeline, which
    gives its scheduler arguments that only DDIM knows, becomes a DDPMPipeline under another scheduler; what an
    unconditional pipeline cannot drive (Euler, Heun, ...) gets Octavo's class for it, see
    `octavo.diffusion.solvers.unconditional`. Raises `OctavoError` for a scheduler that does not exist or does not fit
    the pipeline.

    >>> with_scheduler(None, "dimm")
    Traceback (most recent call last):
        ...
    octavo.errors.OctavoError: scheduler: 'dimm' is neither ddim, ddpm, dpmsolver++, dpmsolver++sde, unipc, deis, pndm,
    heun, euler, euler_ancestral, predictor_corrector nor a scheduler of diffusers
    """
    import diffusers

    from octavo.diffusion.solvers.predictor_corrector import PredictorCorrectorScheduler
    from octavo.diffusion.trajectories.eta import with_eta

    solver, eta = split_eta(name)
    if eta is not None:
        return with_eta(with_scheduler(pipeline, solver), eta)
    if solver_name(name) in ADAPTIVE:
        raise OctavoError(
            f"scheduler: {name} chooses its steps itself, so it is none; `octavo sample` and octavo.diffusion.solvers "
            "have it"
        )
    class_name, settings = SOLVERS.get(solver_name(name), (name, {}))
    kind: Any = getattr(diffusers, class_name, None) if class_name.endswith("Scheduler") else None
    if class_name == PredictorCorrectorScheduler.__name__:
        kind = PredictorCorrectorScheduler
    if not hasattr(kind, "from_config"):
        raise OctavoError(f"scheduler: {name!r} is neither {', '.join(SOLVERS)} nor a scheduler of diffusers")
    own = pipeline.scheduler
    fitting = {type(own).__name__, *(other.__name__ for other in own.compatibles)}
    if "DDPMScheduler" in fitting:
        fitting.add(PredictorCorrectorScheduler.__name__)
    if class_name not in fitting:
        raise OctavoError(f"scheduler: {class_name} does not fit {type(own).__name__}'s configuration")
    plain = type(pipeline).__name__ in PLAIN
    if plain:
        from octavo.diffusion.solvers.unconditional import UNCONDITIONAL

        kind = UNCONDITIONAL.get(class_name, kind)
    scheduler = _made(kind, class_name, own, settings)
    if plain:
        _check_plain(scheduler)
    return exchange_scheduler(pipeline, scheduler)


def solver_name(name: str) -> str:
    """A solver's name as SOLVERS has it.

    >>> solver_name("Euler-Ancestral")
    'euler_ancestral'
    """
    return name.lower().replace("-", "_")


def split_eta(name: str) -> tuple[str, float | None]:
    """A solver's name without the eta in it, and that eta. Raises `OctavoError` for one that is not DDIM's.

    >>> split_eta("ddim:0.5"), split_eta("unipc")
    (('ddim', 0.5), ('unipc', None))
    """
    from octavo.diffusion.solvers.eta import checked_eta

    solver, colon, text = name.partition(":")
    if not colon:
        return name, None
    try:
        eta: Any = float(text)
    except ValueError:
        eta = text
    eta = checked_eta(f"scheduler: {name!r}: eta", eta)
    if solver_name(solver) != "ddim":
        raise OctavoError(f"scheduler: {name!r} gives {solver} an eta, which only ddim has; write {solver}")
    return solver, eta


def _made(kind: Any, class_name: str, own: Any, settings: Mapping[str, Any]) -> Any:
    """A scheduler of class `kind` on the noise schedule of `own`; `OctavoError` where the class does not have it.

    Diffusers leaves out what `own` has by default, and the defaults of two classes differ: Heun's betas are others. So
    do those of clipping, which DDIM and DDPM do unless told, to [-1, 1], latents too; others have no such setting.
    """
    config = {key: value for key, value in dict(own.config).items() if key not in ("eta", "trajectory")}
    if "clip_sample" in inspect.signature(kind.__init__).parameters:
        config.setdefault("clip_sample", False)
    defaults = [key for key in config.get("_use_default_values", []) if key not in SCHEDULE]
    if config.get("prediction_type") == "sample" and class_name in NO_SAMPLE_PREDICTION:
        raise OctavoError(f"scheduler: {class_name} has no formula for a model that predicts the sample")
    try:
        scheduler = kind.from_config({**config, "_use_default_values": defaults, **settings})
    except (ImportError, NotImplementedError) as error:
        raise OctavoError(f"scheduler: {class_name} cannot be made here: {error}") from error
    before, after = (getattr(one, "alphas_cumprod", None) for one in (own, scheduler))
    if before is not None and (after is None or not torch.allclose(after, before, rtol=1e-5, atol=1e-6)):
        raise OctavoError(f"scheduler: {class_name} does not have the model's noise schedule; choose another")
    return scheduler


def _check_plain(scheduler: Any) -> None:
    """Raise `OctavoError` unless an unconditional pipeline can drive the scheduler."""
    name = type(scheduler).__name__
    if "generator" not in inspect.signature(scheduler.step).parameters:
        raise OctavoError(f"scheduler: {name} takes no generator, which an unconditional pipeline gives it")
    trial = copy.deepcopy(scheduler)
    trial.set_timesteps(10)
    ones = torch.ones(1, 1, 2, 2)
    scaled = trial.scale_model_input(ones, trial.timesteps[0])
    if not torch.equal(scaled, ones) or float(trial.init_noise_sigma) != 1.0:
        raise OctavoError(
            f"scheduler: {name} scales the network's input, which an unconditional pipeline does not"
        )
