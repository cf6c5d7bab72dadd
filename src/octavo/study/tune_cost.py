"""What `octavo tune` costs at most in evaluations of the network, known before it starts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from octavo.calibration import named_recipe
from octavo.diffusion import probe
from octavo.diffusion.samplers import with_scheduler
from octavo.diffusion.trajectories import noise_schedule
from octavo.diffusion.trajectories.bound import plain_name
from octavo.diffusion.trajectories.jump_costs import cost_of_measuring
from octavo.evaluation.generate import whole_batches
from octavo.evaluation.trajectory_methods import candidate_timesteps
from octavo.study.tune_networks import DP, FLOAT, evaluations_of_pairs, evaluations_of_timing, searched_on
from octavo.study.tune_options import Goal, TuneOptions
from octavo.study.tune_plan import Plan
from octavo.study.tune_search import most_asked
from octavo.study.tune_verify import VERIFY_AT_MOST

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


def cost_at_most(
    pipeline: DiffusionPipeline,
    goal: Goal,
    options: TuneOptions,
    plan: Plan,
    *,
    calibration: Mapping[str, Any],
    seed: int,
    batch_size: int,
    inputs: Mapping[str, Any] | None,
) -> dict[str, int]:
    """Kind -> evaluations, one for each image, that `tune` makes at most; the kinds are `Spending`'s.

    Images are made in whole batches. Quantizing runs over its pairs some times more than is counted here.
    """
    recipes = tuple(dict.fromkeys(options.recipes))
    pairs = sum(
        evaluations_of_pairs(pipeline, named_recipe(name, **calibration), seed, batch_size, inputs)
        for name in recipes
        if name != FLOAT
    )
    searched = {
        plain_name(searched_on(pipeline, with_scheduler(pipeline, solver)).scheduler)
        for solver, spacing in plan.evaluations
        if spacing == DP
    }
    schedule = noise_schedule(pipeline.scheduler)
    candidates = len(candidate_timesteps(schedule, options.search, DP))
    search = cost_of_measuring("trajectory", candidates, options.search.images, schedule.num_train_timesteps)
    reference = probe(pipeline, num_inference_steps=options.reference_steps, inputs=inputs).num_steps
    curves = [[*evaluations.values()] for evaluations in plan.evaluations.values()]
    asked = sum(most_asked(curve) if goal.kind == "quality" else max(curve) for curve in curves)
    scored = whole_batches(options.num_images, batch_size)
    verified = whole_batches(options.verify_images, batch_size)
    tries = VERIFY_AT_MOST if goal.kind == "quality" else 1
    by_reference = options.metric == "psnr" or (goal.kind == "quality" and goal.value is None)
    return {
        "calibration": pairs,
        "timing": evaluations_of_timing(len({*recipes, FLOAT}), batch_size),
        "search": len(recipes) * len(searched) * search,
        "reference": scored * reference if by_reference else 0,
        "scores": len(recipes) * asked * scored,
        "verification": verified * (tries * max(map(max, curves)) + reference)
        if options.metric == "fd"
        else 0,
    }
