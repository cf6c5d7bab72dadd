"""Guidance by two calls of the network at each step: both are calibrated on, quantized, executed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from tiny_families import build
from tiny_guided import GUIDED

import octavo
from octavo.diffusion import call_pipeline, capture_pairs, find_denoiser, generators, inputs_of_images
from octavo.quantization import integer_layers, quantized_layers
from octavo.runtimes.accelerate import executor_of
from octavo.runtimes.time_table import INDEX

TEXT = "encoder_hidden_states"
UNREAD = [
    f"transformer_blocks.1.{name}" for name in ("attn.to_add_out", "txt_mlp.net.0.proj", "txt_mlp.net.2")
]
"""Layers of the tiny QwenImage whose results its output does not depend on."""
pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{message}")
    for message in (
        "__array__ implementation doesn't accept a copy keyword:DeprecationWarning",
        "__array_wrap__ must accept context and return_scalar arguments:DeprecationWarning",
        "`FluxPosEmbed` is deprecated:FutureWarning",  # which diffusers' own Chroma takes from there
    )
]


@dataclass
class Guided:
    name: str
    inputs: dict[str, Any]
    original: Any
    loaded: Any
    fast: Any


@pytest.fixture(scope="module", params=GUIDED)
def guided(request: Any, tmp_path_factory: Any) -> Iterator[Guided]:
    original, inputs = build(request.param, GUIDED)
    recipe = octavo.named_recipe("best", samples=6, steps=2, pairs_per_trajectory=2)  # batches of 2 and 1
    quantized = octavo.quantize(original, recipe, batch_size=2, inputs=inputs, progress=False)
    folder = tmp_path_factory.mktemp(request.param) / "int8"
    quantized.save_pretrained(folder)
    loaded = diffusers.DiffusionPipeline.from_pretrained(folder)
    loaded.set_progress_bar_config(disable=True)
    fast = octavo.accelerate(loaded, precision="f32", batch_size=3, inputs=inputs)
    yield Guided(request.param, inputs, original, loaded, fast)


def test_both_calls_of_every_drawn_step_are_caught(guided: Guided) -> None:
    handed: list[dict[str, torch.Tensor]] = []
    _, denoiser = find_denoiser(guided.original)
    hook = denoiser.register_forward_pre_hook(
        lambda module, args, kwargs: handed.append(kwargs), with_kwargs=True
    )
    pairs = capture_pairs(
        guided.original,
        [[2], [2, 1]],
        generators=generators(0, 0, 2),
        num_inference_steps=2,
        inputs=inputs_of_images(guided.inputs, [0, 1]),
    )
    hook.remove()
    assert [(pair.image, pair.steps_left) for pair in pairs] == [
        (j, t) for j, t in ((0, 2), (1, 2), (1, 1)) for _ in "+-"
    ]
    assert len(handed) == 4
    for k, pair in enumerate(pairs):
        call = handed[2 * pair.step + k % 2]
        assert torch.equal(pair.args[TEXT], call[TEXT][pair.image : pair.image + 1])
        assert torch.equal(pair.args["hidden_states"], call["hidden_states"][pair.image : pair.image + 1])
    positive, negative = (pair.args[TEXT] for pair in pairs[2:4])
    assert (positive.shape != negative.shape) == (guided.name == "qwen_image")
    assert positive.shape != negative.shape or not torch.equal(positive, negative)


def test_every_layer_runs_in_int8_in_the_graphs_of_both_calls(guided: Guided) -> None:
    images = [sample(pipeline, guided.inputs) for pipeline in (guided.original, guided.loaded, guided.fast)]
    exact, simulated, executed = images
    error = np.linalg.norm(simulated - exact)
    assert 0 < error < 0.1 * np.linalg.norm(exact)
    assert np.linalg.norm(executed - simulated) < 0.25 * error
    executor = executor_of(guided.fast)
    assert executor is not None
    # texts of two lengths are two shapes, or two masks
    assert len(executor.graphs) == (2 if guided.name in ("qwen_image", "lumina2") else 1)
    rows = octavo.audit(guided.fast)
    assert len(rows) > 10 and all(row.ok for row in rows)
    assert {row.layer for row in rows} == {
        name for name, _ in integer_layers(find_denoiser(guided.loaded)[1])
    }


def test_whole_timesteps_are_read_from_a_table(guided: Guided) -> None:
    """Not those of networks that are told the time from 0 to 1, of which 1 is whole: that were a graph for one step."""
    executor: Any = executor_of(guided.fast)
    for graph in executor.graphs.values():
        names = {name for port in graph.streams.compiled.inputs for name in port.get_names()}
        assert (INDEX in names) == (guided.name == "wan")


@pytest.mark.parametrize("guided", ["chroma"], indirect=True)
def test_a_graph_for_each_number_of_images(guided: Guided) -> None:
    """Chroma's network makes constants of the number of rows."""
    simulated, executed = (
        sample(pipeline, guided.inputs, images=1) for pipeline in (guided.loaded, guided.fast)
    )
    exact = sample(guided.original, guided.inputs, images=1)
    assert np.linalg.norm(executed - simulated) < 0.2 * np.linalg.norm(simulated - exact)


@pytest.mark.parametrize("guided", ["lumina2"], indirect=True)
def test_a_graph_for_each_mask_whose_lengths_the_network_reads(guided: Guided) -> None:
    """Lumina 2 makes slices of them: by the graph of other lengths the texts would be cut elsewhere."""
    inputs = {**guided.inputs, "prompt": ["a red cat on mars"], "negative_prompt": ["a dog"]}
    exact, simulated, executed = (
        sample(pipeline, inputs, images=1) for pipeline in (guided.original, guided.loaded, guided.fast)
    )
    assert np.linalg.norm(executed - simulated) < 0.2 * np.linalg.norm(simulated - exact)
    executor: Any = executor_of(guided.fast)
    assert [sorted(names) for names in executor._held.values()] == [["encoder_attention_mask"]]
    assert all(row.ok for row in octavo.audit(guided.fast))


def test_layers_that_nothing_reads_have_float_activations(guided: Guided) -> None:
    layers = dict(quantized_layers(find_denoiser(guided.loaded)[1]))
    integer = {name for name, _ in integer_layers(find_denoiser(guided.loaded)[1])}
    unread = UNREAD if guided.name == "qwen_image" else []
    assert set(unread) <= set(layers) - integer
    assert all(layers[name].weight_int8.dtype == torch.int8 for name in unread)


def sample(pipeline: Any, inputs: dict[str, Any], images: int = 3) -> Any:
    return call_pipeline(
        pipeline,
        generators=generators(0, 0, images),
        num_inference_steps=2,
        inputs=inputs,
        output_type="np",
    )
