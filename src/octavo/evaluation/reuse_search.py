"""Which steps may reuse deep features: measured on the network as it will run, chosen by dynamic programming."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from tqdm import tqdm

from octavo.diffusion import call_pipeline, find_denoiser, generators, with_denoiser
from octavo.diffusion.reuse import ReusePlan, cheapest_plan, segment_costs, uniform
from octavo.diffusion.reuse.forecast import MAX_ORDER
from octavo.diffusion.reuse.plan import plan_cost
from octavo.diffusion.reuse.weights import output_weights
from octavo.diffusion.trajectories.jump_costs import SEED_STREAM, check_count
from octavo.diffusion.trajectories.schedule import Floats
from octavo.errors import OctavoError
from octavo.evaluation.reuse_errors import ForecastErrors
from octavo.fingerprint import model_identity
from octavo.runtimes import executor_of
from octavo.runtimes.accelerate import HAS_NO_REUSE
from octavo.runtimes.network import evaluated_by
from octavo.runtimes.openvino import OpenVINOExecutor
from octavo.runtimes.reuse import most_depth
from octavo.runtimes.reuse.execute import refuse_reusing
from octavo.runtimes.reuse.networks import recording, reusing

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


MAX_AGES = {1: 8, 2: 5}
"""What max_age is by default, where features are forecast."""
MOST_COSTS = 1e8
"""How many numbers the table of costs may hold: float64, and planning needs a few times as much."""


@dataclass(frozen=True, eq=False)
class ReuseCosts:
    """What reusing deep features costs on one model, for any number of whole steps.

    timesteps  those of the sampler, as it tells them to the network.
    costs      float64 [K, .., K, K + 1], order + 1 axes of K, see `octavo.diffusion.reuse.cheapest_plan`.
    depth      of the cut.
    model      `model_identity` of the network.
    seconds    of one evaluation of a batch, means: of the whole network, of its outer part.
    facts      how it was measured, JSON-safe.
    """

    timesteps: tuple[float, ...]
    costs: Floats
    depth: int
    model: str
    seconds: tuple[float, float]
    facts: Mapping[str, Any]

    def plan(self, recompute: int, *, even: bool = False) -> ReusePlan:
        """The plan of least cost with exactly so many whole steps; even: that of evenly spaced ones, whatever it costs.

        Raises `OctavoError` where there is none, or features would have to be older than was measured.
        """
        marks = uniform(len(self.timesteps), recompute)
        cost_of_even = plan_cost(self.costs, marks)
        cost = cost_of_even
        if not even:
            marks, cost = cheapest_plan(self.costs, recompute)
        elif cost == float("inf"):
            raise OctavoError(
                f"recompute: {recompute} even steps are farther apart than max_age; give more of one"
            )
        known = cost_of_even if cost_of_even != float("inf") else None
        facts = {**self.facts, "cost": cost, "cost_of_uniform": known}
        return ReusePlan(self.timesteps, marks, self.depth, self.model, facts, self.order)

    @property
    def order(self) -> int:
        """Of the forecast; 0: features are reused as they are."""
        return self.costs.ndim - 2

    def speed_up(self, recompute: int) -> float:
        """How many times less time the network takes by a plan with so many whole steps, by the measured seconds."""
        whole, outer = self.seconds
        steps = len(self.timesteps)
        return steps * whole / (recompute * whole + (steps - recompute) * outer)


def measure_reuse(
    pipeline: DiffusionPipeline,
    steps: int,
    *,
    depth: int = 1,
    order: int = 1,
    max_age: int | None = None,
    images: int = 16,
    seed: int = 0,
    batch_size: int = 16,
    inputs: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> ReuseCosts:
    """Sample images with the whole network, and at each step evaluate its outer part on what earlier steps forecast.

    The cost that steps i + 1 .. m take the deep features of the last whole steps i, h, .. is, in mean square over
    images and numbers,

        || sum_{n = i + 1}^{m} w_n (outer(x_n, forecast_n(deep_i, deep_h, ..)) - whole(x_n)) ||^2

    x along the whole network's own trajectory, w of `output_weights` for data of variance 1: errors of one segment add
    up before they are squared, those of different segments after. What errors do to later inputs is left out.

    steps    of the pipeline's own sampler (a trajectory's, where it has one).
    depth    1 .. `most_depth`: how many skip connections, or blocks at either end, every step computes.
    order    of the forecast (`octavo.diffusion.reuse.forecast_weights`), 0 .. 2; 0: the features of step i as they are.
    max_age  the most steps, after the one that computed them, that features may serve; None: all at order 0, else
             `MAX_AGES`. With it the outer part is evaluated about K max_age^(order + 1) times.
    images   image k's noise comes from seed + k alone, in a range of seeds of its own.

    The pipeline may be accelerated: then both networks run in its engine, with its precision and threads. It stays as
    it was. Raises `OctavoError` for a network that cannot be cut, a scheduler without noise levels (`output_weights`),
    or counts out of range.
    """
    check_count("steps", steps, 1)
    check_count("images", images, 1)
    check_count("batch_size", batch_size, 1)
    component, denoiser = find_denoiser(pipeline)
    executor = executor_of(pipeline)
    if executor is not None and not isinstance(executor, OpenVINOExecutor):
        raise OctavoError(
            f"pipeline: {HAS_NO_REUSE.format(executor.runtime)}; measure on the runtime openvino, or in torch"
        )
    if getattr(executor, "plan", None) is not None:
        raise OctavoError("pipeline: reuses features already; measure without a plan")
    refuse_reusing(component, denoiser, "measure the original")
    check_depth(denoiser, depth)
    output_weights(pipeline.scheduler, [0.0])  # raises for a scheduler that tells no noise levels
    check_count("order", order, 0, MAX_ORDER)
    max_age = MAX_AGES.get(order, steps) if max_age is None else max_age
    check_count("max_age", max_age, 1)
    if float(steps) ** (order + 2) > MOST_COSTS:
        raise OctavoError(f"order: {order} is too much to plan {steps} steps with; take a lower one")
    watch = ForecastErrors(
        *_both(pipeline, denoiser, depth), denoiser, order, max_age, floats=executor is not None
    )
    sampled = with_denoiser(pipeline, component, evaluated_by(denoiser, watch))
    with tqdm(total=images, desc="measure reuse", unit="image", disable=not progress) as bar:
        for first in range(0, images, batch_size):
            count = min(batch_size, images - first)
            watch.begin(copy.deepcopy(sampled.scheduler))
            call_pipeline(
                sampled,
                generators=generators(seed + SEED_STREAM, first, count),
                num_inference_steps=steps,
                inputs=inputs,
                output_type="pt",
                first_image=first,
            )
            watch.end()
            bar.update(count)
    numbers = watch.numbers
    errors = {key: value / numbers for key, value in watch.errors.items()}
    if not all(map(torch.isfinite, map(torch.tensor, errors.values()))):
        raise OctavoError(f"{component}: its predictions are not finite, so that nothing can be planned")
    timesteps = tuple(watch.timesteps)
    facts = {"images": images, "seed": seed, "max_age": max_age, "solver": type(pipeline.scheduler).__name__}
    return ReuseCosts(
        timesteps,
        segment_costs(errors, len(timesteps), order),
        depth,
        model_identity(denoiser),
        watch.mean_seconds,
        facts,
    )


def check_depth(denoiser: nn.Module, depth: int) -> None:
    """Raise `OctavoError` for a network that cannot be cut, or not at this depth."""
    most = most_depth(denoiser)
    if most < 1:
        raise OctavoError(
            f"depth: this {type(denoiser).__name__} has too few blocks to leave one out; leave reuse out"
        )
    check_count("depth", depth, 1, most)


def _both(pipeline: DiffusionPipeline, denoiser: Any, depth: int) -> tuple[Any, Any]:
    """The whole network and its outer part, in the pipeline's engine where it has one."""
    executor = executor_of(pipeline)
    if not isinstance(executor, OpenVINOExecutor):
        return recording(denoiser, depth), reusing(denoiser, depth)
    networks = recording(executor.denoiser, depth), reusing(executor.denoiser, depth)
    kept = ("threads", "on_fallback", "timesteps", "cache")
    settings: dict[str, Any] = {name: getattr(executor, name) for name in kept}
    precisions = {graph.precision for graph in executor.graphs.values()}
    settings["precision"] = precisions.pop() if len(precisions) == 1 else executor.precision
    return OpenVINOExecutor(networks[0], **settings), OpenVINOExecutor(networks[1], **settings)
