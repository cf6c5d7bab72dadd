"""A picture beside the prompt: an IP-Adapter quantized with the network, and one loaded onto a quantized network."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_families import build

import octavo
from octavo.diffusion import first_call
from octavo.quantization import quantized_layers

RECIPE = octavo.PTQ4DM(samples=2, steps=2)
FEATURES, TOKENS, SCALE = 16, 4, 0.7
FUTURE = pytest.mark.filterwarnings(
    "ignore:You have passed a tensor as `encoder_hidden_states`:FutureWarning"
)


def add_adapter(pipeline: Any) -> dict[str, Any]:
    """An adapter of random weights, the same each time; returns what the pipeline's call needs."""
    unet = pipeline.unet
    generator = torch.Generator().manual_seed(1)
    width = unet.config.cross_attention_dim

    def draw(*shape: int) -> torch.Tensor:
        return 0.3 * torch.randn(shape, generator=generator)

    projection = {
        "proj.weight": draw(TOKENS * width, FEATURES),
        "proj.bias": draw(TOKENS * width),
        "norm.weight": torch.ones(width),
        "norm.bias": torch.zeros(width),
    }
    attention: dict[str, torch.Tensor] = {}
    for name in unet.attn_processors:
        if "attn2" in name:
            inner = getattr(unet.get_submodule(name.removesuffix(".processor")), "inner_dim")  # noqa: B009
            key = 2 * (len(attention) // 2) + 1
            attention |= {f"{key}.to_{what}_ip.weight": draw(inner, width) for what in "kv"}
    unet._load_ip_adapter_weights([{"image_proj": projection, "ip_adapter": attention}])
    pipeline.set_ip_adapter_scale(SCALE)
    return {**build("sd")[1], "ip_adapter_image_embeds": [draw(2, 1, FEATURES)]}


@pytest.fixture(scope="module")
def adapted() -> tuple[Any, dict[str, Any]]:
    pipeline, _ = build("sd")
    return pipeline, add_adapter(pipeline)


@pytest.fixture(scope="module")
def call(adapted: Any) -> dict[str, Any]:
    """The network's own arguments: half the rows are of the prompt and the picture."""
    return first_call(adapted[0], batch_size=2, inputs=adapted[1])[1]


@pytest.fixture(scope="module")
def quantized(adapted: Any) -> Any:
    return octavo.quantize(adapted[0], RECIPE, batch_size=2, inputs=adapted[1], progress=False)


def evaluated(pipeline: Any, call: dict[str, Any]) -> torch.Tensor:
    with torch.no_grad():
        output: torch.Tensor = pipeline.unet(**call)[0]
    return output


def far(x: torch.Tensor, reference: torch.Tensor) -> float:
    return float((x - reference).norm() / reference.norm())


def test_an_adapter_is_quantized_with_the_network_and_heard(adapted: Any, quantized: Any, call: Any) -> None:
    """The quantized network had lost the setting by which it reads the picture, and ignored it without a word."""
    names = {name for name, _ in quantized_layers(quantized.unet)}
    assert sum("_ip." in name for name in names) == 2 * sum(
        "attn2" in n for n in quantized.unet.attn_processors
    )
    outputs = {}
    for scale in (SCALE, 0.0):
        for pipeline in (adapted[0], quantized):
            pipeline.set_ip_adapter_scale(scale)
        outputs[scale] = evaluated(quantized, call)
        assert far(outputs[scale], evaluated(adapted[0], call)) < 0.06
    for pipeline in (adapted[0], quantized):
        pipeline.set_ip_adapter_scale(SCALE)
    assert far(outputs[0.0], outputs[SCALE]) > 0.15


@FUTURE
def test_it_is_accelerated_at_its_scale(adapted: Any, quantized: Any, call: Any) -> None:
    for scale in (SCALE, 0.2):  # each from a graph of its own in the cache
        quantized.set_ip_adapter_scale(scale)
        fast = octavo.accelerate(quantized, precision="f32", batch_size=2, inputs=adapted[1])
        assert far(evaluated(fast, call), evaluated(quantized, call)) < 0.03
        assert all(row.ok for row in octavo.audit(fast))
    for edit in (
        lambda: fast.set_ip_adapter_scale(SCALE),
        lambda: fast.unload_ip_adapter(),
        lambda: fast.load_ip_adapter("nowhere", "", "nothing"),
    ):
        with pytest.raises(
            octavo.OctavoError, match=r"^IP-Adapter: unet is accelerated as it was; load it, or"
        ):
            edit()
    quantized.set_ip_adapter_scale(SCALE)


def test_it_cannot_be_saved_nor_what_is_left_without_it(adapted: Any, tmp_path: Path) -> None:
    quantized = octavo.quantize(adapted[0], RECIPE, batch_size=2, inputs=adapted[1], progress=False)
    for part in (quantized, quantized.unet):
        with pytest.raises(
            octavo.OctavoError, match=r"^IP-Adapter: a UNet2DConditionModel cannot be saved with one"
        ):
            part.save_pretrained(tmp_path / "int8")
    quantized.unload_ip_adapter()
    with pytest.raises(
        octavo.OctavoError, match=r"_ip\.0: was quantized, and has been taken out since; quantize again with"
    ):
        quantized.save_pretrained(tmp_path / "int8")
    assert not any(tmp_path.iterdir())


@FUTURE
def test_one_loaded_onto_a_quantized_network_runs_in_float_beside_it(
    adapted: Any, call: Any, tmp_path: Path
) -> None:
    """Calibrated with it, left in float, taken out, saved, loaded and put back: the ranges hold what it adds."""
    recipe = replace(RECIPE, exclude=("encoder_hid_proj.*", "*_ip.*"))
    quantized = octavo.quantize(adapted[0], recipe, batch_size=2, inputs=adapted[1], progress=False)
    layers = {name for name, _ in quantized_layers(quantized.unet)}
    assert not any("_ip." in name or "encoder_hid" in name for name in layers)
    quantized.unload_ip_adapter()
    quantized.save_pretrained(tmp_path / "int8")
    loaded = octavo.load(tmp_path / "int8")
    inputs = add_adapter(loaded)
    assert {name for name, _ in quantized_layers(loaded.unet)} == layers
    assert far(evaluated(loaded, call), evaluated(adapted[0], call)) < 0.06
    fast = octavo.accelerate(loaded, precision="f32", batch_size=2, inputs=inputs)
    assert far(evaluated(fast, call), evaluated(loaded, call)) < 0.03
    assert {row.layer for row in octavo.audit(fast) if row.ok} == layers
