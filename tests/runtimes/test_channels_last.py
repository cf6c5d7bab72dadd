"""Normalization and attention in channels last: the same numbers, and a graph that turns no tensor around."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import DDIMPipeline
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from torch import nn

import octavo
from octavo.diffusion import first_call
from octavo.runtimes import executor_of, kept_graphs
from octavo.runtimes.calls import take_apart
from octavo.runtimes.channels_last import _less_in_eight_bits, channels_last, group_norms, statistics_nodes
from octavo.runtimes.convert import to_openvino
from octavo.runtimes.core import openvino_core
from octavo.runtimes.edges import layer_of
from octavo.runtimes.integer_graph import nodes_in_f32, to_integer_graph
from octavo.runtimes.precision import has_bf16

needs_bf16 = pytest.mark.skipif(not has_bf16(openvino_core()), reason="this processor has no bf16")


def facts_of(pipeline: Any) -> list[tuple[str, dict[str, str]]]:
    """Every node of the one compiled graph: its name, and what the engine says of it."""
    executor = executor_of(pipeline)
    assert executor is not None
    (graph,) = executor.graphs.values()
    return [
        (
            node.get_friendly_name(),
            {k: v.astype(str) for k, v in node.get_rt_info().items() if hasattr(v, "astype")},
        )
        for node in graph.streams.compiled.get_runtime_model().get_ordered_ops()
    ]


@pytest.mark.parametrize(
    ("groups", "affine", "shape"),
    [
        (4, True, (2, 16, 6, 5)),
        (1, True, (3, 8, 4, 4)),
        (8, False, (2, 8, 3, 3)),
        (2, False, (1, 8, 7, 1)),
        (4, True, (2, 8, 3, 4, 5)),
        (4, True, (2, 16, 9)),
        (4, True, (3, 16)),
    ],
)
@pytest.mark.parametrize("ratio", [0.0, 1.0, 1000.0])
def test_groups_are_normalized(groups: int, affine: bool, shape: tuple[int, ...], ratio: float) -> None:
    """Against float64; a mean of 1,000 spreads costs no more digits than the numbers themselves have lost."""
    generator = torch.Generator().manual_seed(0)
    norm = nn.GroupNorm(groups, shape[1], affine=affine)
    if affine:
        nn.init.normal_(norm.weight, generator=generator)
        nn.init.normal_(norm.bias, generator=generator)
    x = torch.randn(shape, generator=generator) + ratio * torch.randn(
        shape[1], generator=generator
    ).abs().view(1, -1, *[1] * (len(shape) - 2))
    exact = norm.double()(x.double())
    norm = norm.float()
    with channels_last(norm):
        ours = norm(x)
    error = (ours - exact).norm() / exact.norm()
    assert error < 1e-6 * (1 + ratio / 10)
    assert torch.equal(norm(x), nn.functional.group_norm(x, groups, norm.weight, norm.bias)), "put back"


def test_what_is_taken_off_is_a_number_that_bf16_holds() -> None:
    """A bf16 graph takes it off the tensor, and an f32 part of it puts it back: both must mean the same number."""
    x = torch.randn(4096, generator=torch.Generator().manual_seed(0)) * torch.logspace(-6, 4, 4096)
    held = -_less_in_eight_bits(x)
    assert torch.equal(held.to(torch.bfloat16).float(), held)
    assert bool(((held - x).abs() <= 2**-8 * x.abs()).all()) and bool((held != x).any())


def test_a_constant_image_gives_the_bias() -> None:
    norm = nn.GroupNorm(2, 8)
    nn.init.normal_(norm.bias)
    with channels_last(norm):
        ours = norm(torch.full((2, 8, 4, 4), 30.0))
    torch.testing.assert_close(
        ours, norm.bias.detach().view(1, 8, 1, 1).expand(2, 8, 4, 4), atol=1e-3, rtol=0
    )


def attention(**settings: Any) -> Attention:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Attention(16, heads=2, dim_head=8, norm_num_groups=4, bias=True, **settings).eval()


@pytest.mark.parametrize("residual", [False, True])
def test_attention_over_pixels(residual: bool) -> None:
    module = attention(residual_connection=residual, rescale_output_factor=1.5)
    x = torch.randn(2, 16, 3, 5, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        plain = module(x)
        with channels_last(module):
            ours, rows = module(x), module(x.flatten(2).transpose(1, 2))
    torch.testing.assert_close(ours, plain, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(rows, plain.flatten(2).transpose(1, 2), atol=1e-5, rtol=1e-5)
    assert "forward" not in vars(module) and "forward" not in vars(module.group_norm)


def test_what_somebody_else_changed_is_left_alone() -> None:
    class Processor:
        def __call__(self, module: Any, hidden_states: torch.Tensor, **_: Any) -> torch.Tensor:
            return hidden_states * 2

    module, norm = attention(), nn.GroupNorm(2, 4)
    module.processor = Processor()
    norm.forward = lambda x: x + 1  # type: ignore[method-assign,assignment]
    x = torch.ones(1, 4, 2, 2)
    with channels_last(nn.ModuleList([module, norm])):
        assert torch.equal(norm(x), x + 1) and torch.equal(module(x), 2 * x)
    assert torch.equal(norm(x), x + 1)


def converted_plainly(monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on executors convert as peers do."""
    monkeypatch.setattr(kept_graphs, "to_integer_graph", to_openvino)
    monkeypatch.setattr(kept_graphs, "FORMAT", "plain")


@pytest.mark.parametrize("precision", ["f32", pytest.param("bf16", marks=needs_bf16)])
def test_the_graph_normalizes_without_turning_tensors(
    precision: Any, quantized: DDIMPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No MVN, which wants channels first, and fewer transpositions: those of attention's heads stay."""
    fast = octavo.accelerate(quantized, precision=precision, batch_size=2)
    kinds = [fact.get("layerType") for _, fact in facts_of(fast)]
    assert "MVN" not in kinds and kinds.count("Reduce") >= 2 * len(group_norms(quantized.unet))
    assert all(row.ok for row in octavo.audit(fast))

    converted_plainly(monkeypatch)
    plain = octavo.accelerate(quantized, precision=precision, batch_size=2)
    plain_kinds = [fact.get("layerType") for _, fact in facts_of(plain)]
    assert "MVN" in plain_kinds
    assert kinds.count("Transpose") < plain_kinds.count("Transpose")


@needs_bf16
def test_what_has_one_number_for_a_channel_stays_f32(quantized: DDIMPipeline) -> None:
    args, kwargs = first_call(quantized, batch_size=2)
    call = take_apart(quantized.unet.forward, args, kwargs)
    model = to_integer_graph(quantized.unet, call)
    norms = group_norms(quantized.unet)
    marked = statistics_nodes(model, norms)
    assert set(marked) <= set(nodes_in_f32(model, quantized.unet))
    assert {layer_of(name) for name in marked} == set(norms)
    kinds = {node.get_friendly_name(): node.get_type_name() for node in model.get_ordered_ops()}
    assert {"Power", "Multiply", "Add", "ReduceMean"} <= {kinds[name] for name in marked}
    over_pixels = [name for name in nodes_in_f32(model, quantized.unet) if kinds[name] == "ReduceL2"]
    assert [layer_of(name) for name in over_pixels] == ["down_blocks.0.resnets.0.norm1"], (
        "which reads an edge"
    )

    fast = octavo.accelerate(quantized, precision="bf16", batch_size=2)
    written = {
        name: fact["outputPrecisions"]
        for name, fact in facts_of(fast)
        if fact.get("layerType") == "Reduce" and layer_of(name) in norms
    }
    assert len(written) >= 4 * len(norms) - 4 and set(written.values()) == {"f32"}


@needs_bf16
def test_a_large_mean_costs_bf16_what_it_cost_before(
    make_pipeline: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Channels whose mean is ten spreads, normalized behind the first convolution of each block."""
    original = make_pipeline()
    blocks = [module for module in original.unet.modules() if isinstance(module, ResnetBlock2D)]
    for block in blocks:
        nn.init.constant_(block.conv1.bias, 10.0)
    recipe = octavo.PTQ4DM(samples=4, steps=2, first_and_last="quantized")
    pipeline = octavo.quantize(original, recipe, batch_size=4, progress=False)
    args, kwargs = first_call(pipeline, batch_size=2)
    with torch.no_grad():
        simulated = pipeline.unet(*args, **kwargs).sample

    def error() -> float:
        fast = octavo.accelerate(pipeline, precision="bf16", batch_size=2)
        return float((fast.unet(*args, **kwargs).sample - simulated).norm() / simulated.norm())

    ours = error()
    converted_plainly(monkeypatch)
    assert ours < 1.3 * error()
