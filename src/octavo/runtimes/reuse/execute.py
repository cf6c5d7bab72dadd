"""A denoiser that reuses deep features between a sampler's steps, in torch or as two graphs in an engine."""

from __future__ import annotations

import copy
import threading
import weakref
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
from octavo.runtimes.drop_in import answered
from octavo.runtimes.network import evaluated_by
from octavo.runtimes.openvino import Graph, OpenVINOExecutor
from octavo.runtimes.reuse.follow import Run
from octavo.runtimes.reuse.networks import DEEP, recording, reusing

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

Evaluate = Callable[..., tuple[torch.Tensor, ...]]


@dataclass
class Reuser:
    """Evaluates a denoiser by a plan; called like the denoiser's own `forward`.

    At a step that the plan marks, and at timesteps that are none of its own (a warning is logged once), `whole` is
    evaluated, which also gives deep features; at the others `outer`, which is handed those of the last marked step, or
    what the last few forecast for this one (the plan's order). A sampler that calls the network several times at one
    timestep (sequential guidance) has each call's features kept by its place. Where those of the last marked step are
    missing or of another shape (an image-to-image run that starts within the plan), the whole network is evaluated;
    where earlier ones are, the order is lower. Features are of one run (`Run`): each thread has its own, and so has
    each deep copy. A pipeline's run that leaves out steps of the plan raises `OctavoError`.

    floats: both are handed float32 tensors, as engines want; else tensors of the caller's own dtypes.
    """

    denoiser: nn.Module
    plan: ReusePlan
    whole: Evaluate
    outer: Evaluate
    floats: bool = False
    evaluations: dict[str, int] = field(default_factory=lambda: {"whole": 0, "outer": 0}, init=False)

    def __post_init__(self) -> None:
        self._forward = type(self.denoiser).forward.__get__(self.denoiser)
        self._lock = threading.Lock()
        self.bind(None)

    def bind(self, pipeline: DiffusionPipeline | None) -> None:
        """From now on a new run begins wherever `pipeline`, which is not kept alive, sets its scheduler's timesteps."""
        self._pipeline = None if pipeline is None else weakref.ref(pipeline)
        self._run = Run(self.plan, self._schedule())

    def __deepcopy__(self, memo: dict[int, Any]) -> Reuser:
        other = Reuser(self.denoiser, self.plan, self.whole, self.outer, self.floats)
        pipeline = None if self._pipeline is None else self._pipeline()
        other.bind(memo.get(id(pipeline)))  # its copy, where that is what is being copied
        return other

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        call = take_apart(self._forward, args, kwargs, floats=self.floats)
        kwargs = call.kwargs(call.tensors)
        timestep = self._timestep(call)
        self._run.step(timestep, self._schedule())
        features = self._run.features(call.shapes)
        self._count("outer" if features else "whole")
        if features:
            deep = forecast(list(features), list(features.values()), timestep)
            outputs = list(self.outer(**kwargs, **{DEEP: deep}, return_dict=False))
        else:
            *outputs, deep = self.whole(**kwargs, return_dict=False)
            self._run.keep(call.shapes, deep)
        outputs = [output.to(call.dtype) for output in outputs]
        return answered(call, self.denoiser, outputs)

    def _timestep(self, call: Call) -> float:
        try:
            timestep = call.tensors[call.names.index("timestep")]
        except ValueError:
            raise OctavoError(
                f"{type(self.denoiser).__name__}: is told no timestep; leave reuse out"
            ) from None
        if bool((timestep != timestep[0]).any()):
            raise OctavoError("timestep: rows at different timesteps cannot reuse features; leave reuse out")
        return float(timestep[0])

    def _schedule(self) -> Any:
        pipeline = None if self._pipeline is None else self._pipeline()
        return getattr(getattr(pipeline, "scheduler", None), "timesteps", None)

    def _count(self, what: str) -> None:
        with self._lock:
            self.evaluations[what] += 1


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

    `graphs` and so the audit hold those of both. Deep copies share them, and have features of their own.
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
        self.reuser = Reuser(original, self.plan, super().__call__, self._outer, floats=True)

    def __deepcopy__(self, memo: dict[int, Any]) -> ReusingExecutor:
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__)
        other.reuser = copy.deepcopy(self.reuser, memo)
        return other

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
        for key in list(self.outer.graphs):
            self.graphs.setdefault(f"outer-{key}", self.outer.graphs[key])
        return outputs


def with_reuse(pipeline: DiffusionPipeline, plan: ReusePlan) -> DiffusionPipeline:
    """The same pipeline whose denoiser, evaluated by torch, reuses deep features by `plan`; see `accelerate` for int8.

    `pipeline` stays as it was; networks are shared, and compute in their own dtype. Raises `OctavoError` for a network
    that cannot be cut, one that is accelerated or reuses features already, or a plan that was made for another model.
    """
    component, denoiser = find_denoiser(pipeline)
    refuse_reusing(component, denoiser, "give the original")
    if "forward" in vars(denoiser):
        raise OctavoError(
            f"pipeline: its {component} is accelerated, offloaded or replaced; give the original (for int8: "
            "octavo.accelerate(pipeline, reuse=plan))"
        )
    check_plan(denoiser, plan)
    reuser = Reuser(denoiser, plan, recording(denoiser, plan.depth), reusing(denoiser, plan.depth))
    other = with_denoiser(pipeline, component, evaluated_by(denoiser, reuser))
    reuser.bind(other)
    return other


def refuse_reusing(component: str, denoiser: nn.Module, instead: str) -> None:
    """Raise `OctavoError` for a denoiser under `with_reuse`, whose `forward` is no network's."""
    if isinstance(vars(denoiser).get("forward"), Reuser):
        raise OctavoError(f"pipeline: its {component} reuses features by octavo.with_reuse; {instead}")


def check_plan(denoiser: nn.Module, plan: ReusePlan) -> None:
    """Raise `OctavoError` if the plan was made for another model."""
    if plan.model is not None and not same_model(plan.model, model_identity(denoiser)):
        raise OctavoError("reuse plan: was made for another model; make one for this model (octavo reuse)")
