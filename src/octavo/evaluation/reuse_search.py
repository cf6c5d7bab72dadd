"""Which steps may reuse deep features: measured on the network as it will run, chosen by dynamic programming."""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm

from octavo.diffusion import call_pipeline, find_denoiser, generators, with_denoiser
from octavo.diffusion.reuse import ReusePlan, cheapest_plan, segment_costs, uniform
from octavo.diffusion.reuse.plan import plan_cost
from octavo.diffusion.reuse.weights import output_weights
from octavo.diffusion.trajectories.jump_costs import SEED_STREAM, check_count
from octavo.diffusion.trajectories.schedule import Floats
from octavo.errors import OctavoError
from octavo.fingerprint import model_identity
from octavo.runtimes import executor_of
from octavo.runtimes.accelerate import ONNX_HAS_NO_REUSE
from octavo.runtimes.calls import take_apart
from octavo.runtimes.network import shared_copy
from octavo.runtimes.openvino import OpenVINOExecutor, output_type
from octavo.runtimes.reuse import most_depth
from octavo.runtimes.reuse.networks import DEEP, recording, reusing

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


@dataclass(frozen=True, eq=False)
class ReuseCosts:
    """What reusing deep features costs on one model, for any number of whole steps.

    timesteps  those of the sampler, as it tells them to the network.
    costs      float64 [K, K + 1], see `octavo.diffusion.reuse.cheapest_plan`.
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

    def plan(self, recompute: int) -> ReusePlan:
        """The plan of least cost with exactly so many whole steps. Raises `OctavoError` where there is none."""
        recomputed, cost = cheapest_plan(self.costs, recompute)
        even = plan_cost(self.costs, uniform(len(self.timesteps), recompute))
        facts = {**self.facts, "cost": cost, "cost_of_uniform": even if even != float("inf") else None}
        return ReusePlan(self.timesteps, recomputed, self.depth, self.model, facts)

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
    max_age: int | None = None,
    images: int = 16,
    seed: int = 0,
    batch_size: int = 16,
    inputs: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> ReuseCosts:
    """Sample images with the whole network, and at each step evaluate its outer part on every earlier step's features.

    The cost that steps i + 1 .. m reuse the deep features of step i is, in mean square over images and numbers,

        || sum_{n = i + 1}^{m} w_n (outer(x_n, deep_i) - whole(x_n)) ||^2

    x along the whole network's own trajectory, w of `output_weights` for data of variance 1: errors of one segment add
    up before they are squared, those of different segments after. What errors do to later inputs is left out.

    steps    of the pipeline's own sampler (a trajectory's, where it has one).
    depth    1 .. `most_depth`: how many skip connections, or blocks at either end, every step computes.
    max_age  the most steps, after the one that computed them, that features may serve; None: all.
    images   image k's noise comes from seed + k alone, in a range of seeds of its own.

    The pipeline may be accelerated: then both networks run in its engine, with its precision and threads. It stays as
    it was. Raises `OctavoError` for a network that cannot be cut, or counts out of range.
    """
    check_count("steps", steps, 1)
    check_count("images", images, 1)
    check_count("batch_size", batch_size, 1)
    component, denoiser = find_denoiser(pipeline)
    executor = executor_of(pipeline)
    if executor is not None and executor.runtime == "onnx":
        raise OctavoError(f"pipeline: {ONNX_HAS_NO_REUSE}; measure on the runtime openvino, or in torch")
    if getattr(executor, "plan", None) is not None:
        raise OctavoError("pipeline: reuses features already; measure without a plan")
    check_count("depth", depth, 1, most_depth(denoiser))
    max_age = steps if max_age is None else max_age
    check_count("max_age", max_age, 1)
    watch = _Watch(*_both(pipeline, denoiser, depth), denoiser, max_age)
    other = shared_copy(denoiser)
    other.__dict__["forward"] = watch
    sampled = with_denoiser(pipeline, component, other)
    with tqdm(total=images, desc="measure reuse", unit="image", disable=not progress) as bar:
        for first in range(0, images, batch_size):
            count = min(batch_size, images - first)
            watch.begin()
            call_pipeline(
                sampled,
                generators=generators(seed + SEED_STREAM, first, count),
                num_inference_steps=steps,
                inputs=inputs,
                output_type="pt",
                first_image=first,
            )
            watch.end(copy.deepcopy(sampled.scheduler))
            bar.update(count)
    numbers = watch.numbers
    errors = {key: value / numbers for key, value in watch.errors.items()}
    if not all(map(torch.isfinite, map(torch.tensor, errors.values()))):
        raise OctavoError(f"{component}: its predictions are not finite, so that nothing can be planned")
    timesteps = tuple(watch.timesteps)
    facts = {"images": images, "seed": seed, "max_age": max_age, "solver": type(pipeline.scheduler).__name__}
    return ReuseCosts(
        timesteps,
        segment_costs(errors, len(timesteps)),
        depth,
        model_identity(denoiser),
        watch.mean_seconds,
        facts,
    )


def _both(pipeline: DiffusionPipeline, denoiser: Any, depth: int) -> tuple[Any, Any]:
    """The whole network and its outer part, in the pipeline's engine where it has one."""
    executor = executor_of(pipeline)
    if not isinstance(executor, OpenVINOExecutor):
        return recording(denoiser, depth), reusing(denoiser, depth)
    networks = recording(executor.denoiser, depth), reusing(executor.denoiser, depth)
    settings: dict[str, Any] = {name: getattr(executor, name) for name in ("threads", "on_fallback", "cache")}
    precisions = {graph.precision for graph in executor.graphs.values()}
    settings["precision"] = precisions.pop() if len(precisions) == 1 else executor.precision
    return OpenVINOExecutor(networks[0], **settings), OpenVINOExecutor(networks[1], **settings)


@dataclass
class _Watch:
    """In place of the denoiser's `forward`: evaluates the whole network, and the outer part on all kept features."""

    whole: Any
    outer: Any
    denoiser: Any
    max_age: int
    errors: dict[tuple[int, int], float] = field(default_factory=dict)
    numbers: int = 0

    def __post_init__(self) -> None:
        self.forward = type(self.denoiser).forward.__get__(self.denoiser)
        self.seconds: dict[str, list[float]] = {"whole": [], "outer": []}

    def __deepcopy__(self, memo: dict[int, Any]) -> _Watch:
        return self

    def begin(self) -> None:
        self.timesteps: list[float] = []
        self._place = 0
        self._calls: list[dict[int, dict[int, torch.Tensor]]] = []  # place -> step -> source -> difference
        self._kept: list[dict[int, torch.Tensor]] = []  # place -> step -> deep features
        self._numbers = 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        call = take_apart(self.forward, args, kwargs)
        given = call.kwargs(call.tensors)
        timestep = float(call.tensors[call.names.index("timestep")][0])
        if not self.timesteps or timestep != self.timesteps[-1]:
            self.timesteps.append(timestep)
            self._place = 0
        else:
            self._place += 1
        if self._place == len(self._kept):
            self._kept.append({})
            self._calls.append({})
        step = len(self.timesteps) - 1
        *outputs, deep = self._timed("whole", self.whole, **given)
        kept = self._kept[self._place]
        differences = self._calls[self._place].setdefault(step, {})
        for source in [s for s in kept if step - s > self.max_age]:
            del kept[source]
        for source, features in kept.items():
            reused = self._timed("outer", self.outer, **given, **{DEEP: features})[0]
            differences[source] = (reused - outputs[0]).float().cpu()
        kept[step] = deep
        if step == 0:
            self._numbers += outputs[0].numel()
        outputs = [output.to(call.dtype) for output in outputs]
        if not call.return_dict:
            return tuple(outputs)
        return output_type(self.denoiser)(*outputs)

    def end(self, scheduler: Any) -> None:
        """Sum up the errors of this batch."""
        weights = output_weights(scheduler, self.timesteps)
        for calls in self._calls:
            summed: dict[int, torch.Tensor] = {}
            for step in sorted(calls):
                for source, difference in calls[step].items():
                    moved = difference.double() * float(weights[step])
                    summed[source] = summed[source] + moved if source in summed else moved
                    error = float(summed[source].square().sum())
                    self.errors[source, step] = self.errors.get((source, step), 0.0) + error
        self.numbers += self._numbers

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
