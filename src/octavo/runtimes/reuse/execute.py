"""A denoiser that reuses deep features between a sampler's steps, in torch or as two graphs in an engine."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from octavo.diffusion import find_denoiser, with_denoiser
from octavo.diffusion.reuse import ReusePlan, forecast_weights
from octavo.errors import OctavoError
from octavo.fingerprint import model_identity, same_model
from octavo.runtimes.calls import Call, take_apart
from octavo.runtimes.network import shared_copy
from octavo.runtimes.openvino import Graph, OpenVINOExecutor, output_type
from octavo.runtimes.reuse.networks import DEEP, recording, reusing

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

logger = logging.getLogger(__name__)
MOST_PLACES = 8
"""Calls of the network at one timestep whose deep features are kept."""
Evaluate = Callable[..., tuple[torch.Tensor, ...]]


@dataclass
class Reuser:
    """Evaluates a denoiser by a plan; called like the denoiser's own `forward`.

    At a step that the plan marks, and at timesteps that are none of its own (a warning is logged once), `whole` is
    evaluated, which also gives deep features; at the others `outer`, which is handed those of the last marked step, or
    what the last few forecast for this one (the plan's order). A sampler that calls the network several times at one
    timestep (sequential guidance) has each call's features kept by its place. Where those of the last marked step are
    missing or of another shape (an image-to-image run that starts within the plan), the whole network is evaluated;
    where earlier ones are, the order is lower. A timestep above the one before begins a new run, which forgets all
    features. One run at a time: two threads must not share one.
    """

    denoiser: nn.Module
    plan: ReusePlan
    whole: Evaluate
    outer: Evaluate
    evaluations: dict[str, int] = field(default_factory=lambda: {"whole": 0, "outer": 0}, init=False)

    def __post_init__(self) -> None:
        self._forward = type(self.denoiser).forward.__get__(self.denoiser)
        self._kept: dict[float, list[tuple[tuple[tuple[int, ...], ...], torch.Tensor]]] = {}
        self._now: float | None = None
        self._place = 0
        self._warned = False

    def __deepcopy__(self, memo: dict[int, Any]) -> Reuser:
        return self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        call = take_apart(self._forward, args, kwargs)
        kwargs = call.kwargs(call.tensors)
        timestep = self._timestep(call)
        if self._now is not None and timestep > self._now:
            self._kept = {}
        self._place = self._place + 1 if timestep == self._now else 0
        self._now = timestep
        deep = self._deep(timestep, call)
        if deep is None:
            self.evaluations["whole"] += 1
            *outputs, deep = self.whole(**kwargs, return_dict=False)
            if not self.plan.sources(timestep):
                self._keep(timestep, call, deep)
        else:
            self.evaluations["outer"] += 1
            outputs = list(self.outer(**kwargs, **{DEEP: deep}, return_dict=False))
        outputs = [output.to(call.dtype) for output in outputs]
        return output_type(self.denoiser)(*outputs) if call.return_dict else tuple(outputs)

    def _timestep(self, call: Call) -> float:
        try:
            timestep = call.tensors[call.names.index("timestep")]
        except ValueError:
            raise OctavoError(
                f"{type(self.denoiser).__name__}: is told no timestep; leave reuse out"
            ) from None
        if bool((timestep != timestep[0]).any()):
            raise OctavoError("timestep: rows at different timesteps cannot reuse features; leave reuse out")
        first = float(timestep[0])
        if first not in self.plan.timesteps and not self._warned:
            self._warned = True
            logger.warning(
                "reuse plan: timestep %g is none of its %d; the whole network is computed there (make a plan for "
                "these steps)",
                first,
                self.plan.num_steps,
            )
        return first

    def _keep(self, timestep: float, call: Call, deep: torch.Tensor) -> None:
        if self._place == 0:
            newest = list(self._kept)[-self.plan.order :] if self.plan.order else []
            self._kept = {**{t: self._kept[t] for t in newest}, timestep: []}
        if self._place < MOST_PLACES:
            self._kept[timestep].append((call.shapes, deep))

    def _deep(self, timestep: float, call: Call) -> torch.Tensor | None:
        known: list[float] = []
        features: list[torch.Tensor] = []
        for source in self.plan.sources(timestep):
            places = self._kept.get(source, [])
            if self._place >= len(places) or places[self._place][0] != call.shapes:
                break
            known.append(source)
            features.append(places[self._place][1])
        return forecast(known, features, timestep) if known else None


def forecast(known: Sequence[float], features: Sequence[torch.Tensor], timestep: float) -> torch.Tensor:
    """Deep features at `timestep` from those at the timesteps `known`, see `octavo.diffusion.reuse.forecast_weights`.

    One timestep: its features themselves. Otherwise a new tensor of their shape and dtype, summed in float32 or better.
    """
    if len(known) == 1:
        return features[0]
    first, *others = forecast_weights(known, timestep)
    dtype = features[0].dtype
    deep = features[0].to(torch.promote_types(dtype, torch.float32)) * first
    for weight, tensor in zip(others, features[1:], strict=True):
        deep.add_(tensor, alpha=weight)
    return deep.to(dtype)


@dataclass
class ReusingExecutor(OpenVINOExecutor):
    """Two graphs of one network: the whole one, which is this executor's own, and its outer part.

    `graphs` and so the audit hold those of both.
    """

    plan: ReusePlan | None = None

    def __post_init__(self) -> None:
        assert self.plan is not None
        original = self.denoiser
        self.denoiser = recording(original, self.plan.depth)
        super().__post_init__()
        self.outer = OpenVINOExecutor(
            reusing(original, self.plan.depth),
            precision=self.precision,
            threads=self.threads,
            on_fallback=self.on_fallback,
            timesteps=self.timesteps,
            cache=self.cache,
        )
        self.reuser = Reuser(original, self.plan, super().__call__, self._outer)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.reuser(*args, **kwargs)

    def prepare(self, *args: Any, **kwargs: Any) -> Graph:
        """Both graphs for a call's shapes; the outer part's needs the deep features of one evaluation."""
        graph = super().prepare(*args, **kwargs)
        call = take_apart(self._forward, args, kwargs)
        deep = super().__call__(**call.kwargs(call.tensors), return_dict=False)[-1]
        self._outer(**call.kwargs(call.tensors), **{DEEP: deep}, return_dict=False)
        return graph

    def _outer(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, ...]:
        if self._chosen is not None:  # one precision for both
            self.outer.precision, self.outer._chosen = self.precision, self._chosen
        outputs: tuple[torch.Tensor, ...] = self.outer(*args, **kwargs)
        self.graphs.update({f"outer-{key}": graph for key, graph in self.outer.graphs.items()})
        return outputs


def with_reuse(pipeline: DiffusionPipeline, plan: ReusePlan) -> DiffusionPipeline:
    """The same pipeline whose denoiser, evaluated by torch, reuses deep features by `plan`; see `accelerate` for int8.

    `pipeline` stays as it was; networks are shared. Raises `OctavoError` for a network that cannot be cut, or a plan
    that was made for another model.
    """
    component, denoiser = find_denoiser(pipeline)
    check_plan(denoiser, plan)
    whole, outer = recording(denoiser, plan.depth), reusing(denoiser, plan.depth)
    other = shared_copy(denoiser)
    other.__dict__["forward"] = Reuser(denoiser, plan, whole, outer)
    return with_denoiser(pipeline, component, other)


def check_plan(denoiser: nn.Module, plan: ReusePlan) -> None:
    """Raise `OctavoError` if the plan was made for another model."""
    if plan.model is not None and not same_model(plan.model, model_identity(denoiser)):
        raise OctavoError("reuse plan: was made for another model; make one for this model (octavo reuse)")
