"""What an evaluation of a denoiser costs: multiplications, bit operations, bytes, milliseconds."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

from octavo.calibration.tracing import evaluating
from octavo.checkpoint import tensor_bytes
from octavo.diffusion import find_denoiser, first_call
from octavo.evaluation.speed import Timing, table, take_turns
from octavo.quantization import quantized_layers, quantized_products, walk
from octavo.quantization.attention_calls import product_name
from octavo.runtimes.reuse.networks import DEEP, recording, reusing

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from octavo.diffusion.reuse import ReusePlan

FLOAT_BITS = 32
"""A float operand counts as 32 bits, whatever the engine makes of it."""
ELSEWHERE = "(attention and other matmuls)"
MODEL, REFERENCE = "model", "reference"
OUTER = "outer part"


@dataclass(frozen=True)
class LayerCost:
    """Multiply-accumulates of one layer for one image at one step, and the bits of its operands.

    Of a product of attention in integers, which has no weights, K and V stand in the weights' place.
    """

    layer: str
    macs: int
    weight_bits: int
    activation_bits: int

    @property
    def bops(self) -> int:
        """Bit operations: MACs x weight bits x activation bits."""
        return self.macs * self.weight_bits * self.activation_bits


@dataclass(frozen=True)
class Cost:
    """What an evaluation of a denoiser costs, on a reuse plan the mean one of its steps.

    latency: a row of `octavo.evaluation.speed.table`; memory: see `peak_memory`.
    """

    macs: int
    bops: int
    bytes: int
    latency: dict[str, float | str] | None = None
    peak_memory_bytes: int | None = None
    libraries_memory_bytes: int | None = None

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def layer_costs(pipeline: DiffusionPipeline, inputs: Mapping[str, Any] | None = None) -> list[LayerCost]:
    """Evaluate the denoiser once for one image, and count each layer's MACs, in the order of execution.

    A convolution makes out_elements x in_channels / groups x kernel_size of them, a linear layer out_elements x
    in_features, attention its two products of matrices; products outside any convolution or linear layer that are not
    attention in integers are summed as ELSEWHERE, in float. With guidance in one batch both of an image's rows count.
    Biases, normalisations, activations and softmax do not. Give a pipeline that torch runs: an accelerated one has no
    layers to look at.
    Source of BOPs: Baskin et al. (1804.10969), without its accumulator's bits, as the field counts them.
    """
    _, denoiser = find_denoiser(pipeline)
    _, kwargs = first_call(pipeline, inputs=inputs)
    return _count(denoiser, kwargs)


def outer_costs(
    pipeline: DiffusionPipeline, plan: ReusePlan, inputs: Mapping[str, Any] | None = None
) -> list[LayerCost]:
    """`layer_costs` of a step that reuses deep features by `plan`: of what is computed there, under the same names."""
    _, denoiser = find_denoiser(pipeline)
    _, kwargs = first_call(pipeline, inputs=inputs)
    kwargs |= {"return_dict": False}
    whole = recording(denoiser, plan.depth)
    with torch.inference_mode(), evaluating(whole):
        deep = whole(**kwargs)[-1]
    return _count(reusing(denoiser, plan.depth), {**kwargs, DEEP: deep})


def _count(denoiser: nn.Module, kwargs: Mapping[str, Any]) -> list[LayerCost]:
    bits = {
        name: (layer.weight_spec.bits, layer.input_spec.bits) for name, layer in quantized_layers(denoiser)
    }
    products = [(product_name(name), product) for name, product in quantized_products(denoiser)]
    bits.update((name, (product.right_spec.bits, product.left_spec.bits)) for name, product in products)
    counter = _Counter()
    hooks = []
    for name, layer in (*walk(denoiser), *quantized_layers(denoiser), *products):
        hooks.append(layer.register_forward_pre_hook(counter.entering(name)))
        hooks.append(layer.register_forward_hook(counter.leaving))
    try:
        with torch.inference_mode(), evaluating(denoiser), counter:
            denoiser(**kwargs)
    finally:
        for hook in hooks:
            hook.remove()
    return [
        LayerCost(name, macs, *bits.get(name, (FLOAT_BITS, FLOAT_BITS)))
        for name, macs in counter.macs.items()
    ]


def static_cost(
    pipeline: DiffusionPipeline,
    inputs: Mapping[str, Any] | None = None,
    plan: ReusePlan | None = None,
    share: float | None = None,
) -> Cost:
    """MACs and BOPs of one evaluation for one image, and the bytes of the denoiser's tensors as they are saved.

    With a plan they are the mean of a run's: share x whole + (1 - share) x outer, `outer_costs`. `share`: of the run's
    evaluations (`ReusePlan.share_of`); None: the plan's.
    """
    rows = layer_costs(pipeline, inputs)
    _, denoiser = find_denoiser(pipeline)
    whole = Cost(sum(row.macs for row in rows), sum(row.bops for row in rows), tensor_bytes(denoiser))
    share = 1.0 if plan is None else plan.share if share is None else share
    if plan is None or share == 1:
        return whole
    rows = outer_costs(pipeline, plan, inputs)
    macs = _mean_of(share, whole.macs, sum(row.macs for row in rows))
    bops = _mean_of(share, whole.bops, sum(row.bops for row in rows))
    return Cost(round(macs), round(bops), whole.bytes)


def _mean_of(share: float, whole: float, outer: float) -> float:
    return share * whole + (1 - share) * outer


def latency(
    model: DiffusionPipeline,
    reference: DiffusionPipeline,
    call: tuple[tuple[Any, ...], dict[str, Any]],
    *,
    rounds: int = 9,
    plan: ReusePlan | None = None,
    share: float | None = None,
) -> tuple[dict[str, float | str], dict[str, float | str]]:
    """Milliseconds of one evaluation by each pipeline's denoiser, in turn in this process; speed over the reference.

    `call`: (args, kwargs) that both denoisers are given, `first_call` of a pipeline that is not accelerated. Returns
    the model's and the reference's row of `octavo.evaluation.speed.table`, `per_second` counting evaluations. `plan`:
    by which the model reuses deep features. Each round then times a step that computes the whole network and one that
    reuses (a forecast of lower order at first, where the plan has an order), and takes their mean as often as the run
    has either: `share` as of `static_cost`.
    """
    args, kwargs = call

    def engine(pipeline: DiffusionPipeline, timestep: float | None = None) -> Callable[[], Any]:
        _, denoiser = find_denoiser(pipeline)
        given = kwargs if timestep is None else {**kwargs, "timestep": _like(kwargs["timestep"], timestep)}
        return lambda: denoiser(*args, **given)

    engines = {REFERENCE: engine(reference), MODEL: engine(model)}
    share = 1.0 if plan is None else plan.share if share is None else share
    if plan is not None and share < 1:
        first = plan.recomputed.index(
            0
        )  # the step before it is a whole one: its features are those that are reused
        engines[MODEL] = engine(model, plan.timesteps[first - 1])
        engines[OUTER] = engine(model, plan.timesteps[first])
    with torch.inference_mode():
        timings = take_turns(engines, rounds=rounds, warm_up=1)
    if OUTER in timings:
        pairs = zip(timings[MODEL].seconds, timings.pop(OUTER).seconds, strict=True)
        timings[MODEL] = Timing([_mean_of(share, whole, outer) for whole, outer in pairs])
    in_reference, in_model = table(timings, REFERENCE)
    return in_model, in_reference


def _like(timestep: Any, value: float) -> Any:
    return torch.full_like(timestep, value) if torch.is_tensor(timestep) else type(timestep)(value)


class _Counter(TorchFunctionMode):
    """Adds up the MACs of torch's products under the name of the layer that is running."""

    def __init__(self) -> None:
        super().__init__()
        self.macs: dict[str, int] = {}
        self._running: list[str] = []

    def entering(self, name: str) -> Callable[..., None]:
        return lambda module, args: self._running.append(name)

    def leaving(self, module: nn.Module, args: Any, output: Any) -> None:
        self._running.pop()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        count = COUNTED.get(func)
        if count is not None:
            name = self._running[-1] if self._running else ELSEWHERE
            self.macs[name] = self.macs.get(name, 0) + count(output, *args, **(kwargs or {}))
        return output


def _of_convolution(
    output: torch.Tensor, input: torch.Tensor, weight: torch.Tensor, *_: Any, **__: Any
) -> int:
    return output.numel() * weight[0].numel()


def _of_transposed(
    output: torch.Tensor, input: torch.Tensor, weight: torch.Tensor, *_: Any, **__: Any
) -> int:
    return input.numel() * weight[0].numel()


def _of_linear(output: torch.Tensor, input: torch.Tensor, weight: torch.Tensor, *_: Any, **__: Any) -> int:
    return output.numel() * weight.shape[-1]


def _of_product(output: torch.Tensor, first: torch.Tensor, *_: Any, **__: Any) -> int:
    return output.numel() * first.shape[-1]


def _of_sum_and_product(
    output: torch.Tensor, added: torch.Tensor, first: torch.Tensor, *_: Any, **__: Any
) -> int:
    return output.numel() * first.shape[-1]


def _of_attention(
    output: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any
) -> int:
    scores = math.prod(query.shape[:-1]) * key.shape[-2]
    return scores * (query.shape[-1] + value.shape[-1])


COUNTED: dict[Any, Callable[..., int]] = {
    **dict.fromkeys((torch.conv1d, torch.conv2d, torch.conv3d), _of_convolution),
    **dict.fromkeys((torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d), _of_transposed),
    F.linear: _of_linear,
    **dict.fromkeys(
        (torch.matmul, torch.bmm, torch.mm, torch.Tensor.matmul, torch.Tensor.bmm, torch.Tensor.mm),
        _of_product,
    ),
    torch.Tensor.__matmul__: _of_product,
    **dict.fromkeys((torch.baddbmm, torch.Tensor.baddbmm), _of_sum_and_product),
    F.scaled_dot_product_attention: _of_attention,
}
