"""Multipliers made by the module in front: an equivalent network, found by following the data."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from diffusers import DDIMPipeline
from torch import nn

import octavo
from octavo.calibration import LayerRule
from octavo.calibration.absorption import absorb, find_absorbers
from octavo.calibration.balance import best_multiplier, best_shared_multiplier
from octavo.errors import OctavoError
from octavo.fingerprint import model_identity
from octavo.quantization import QuantSpec, dequantized, quantized_layers, walk

RULE = LayerRule(QuantSpec(8, granularity="per_channel", narrow=True), QuantSpec(8, symmetric=False))
RECIPE = octavo.PTQ4DM(
    weights=7,
    samples=8,
    steps=4,
    pairs_per_trajectory=2,
    balance=True,
    absorb=True,
    include=("*.attentions.*",),
)


class Block(nn.Module):
    """Every case once: shared readers, attention, a nonlinearity, a residual, a sole reader behind a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.q, self.k, self.v = nn.LayerNorm(8), *(nn.Linear(8, 8) for _ in range(3))
        self.out = nn.Linear(8, 8)
        self.norm2, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 16), nn.Linear(16, 8)
        self.group, self.first, self.second = (
            nn.GroupNorm(2, 8),
            nn.Conv1d(8, 8, 3, padding=1),
            nn.Conv1d(8, 8, 1),
        )
        self.plain = nn.LayerNorm(8, elementwise_affine=False)
        self.last = nn.Linear(8, 8)

    def forward(
        self, sample: torch.Tensor, timestep: object = None, return_dict: bool = False
    ) -> tuple[torch.Tensor]:
        x = self.norm(sample)
        q, k, v = (layer(x).unflatten(-1, (2, 4)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        x = sample + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape))
        x = x + self.down(F.silu(self.up(self.norm2(x))))
        x = self.second(self.first(self.group(x.transpose(1, 2)))).transpose(1, 2)
        return (self.last(self.plain(x)),)


@pytest.fixture
def block() -> Block:
    torch.manual_seed(0)
    block = Block()
    for norm in (block.norm, block.norm2, block.group):
        nn.init.uniform_(norm.weight, 0.2, 3), nn.init.normal_(norm.bias)
    return block


@pytest.fixture
def call() -> dict[str, torch.Tensor]:
    return {"sample": torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(1))}


ALL = ("q", "k", "v", "out", "up", "down", "first", "second", "last")
EXPECTED = {
    "norm": ("q", "k", "v"),
    "v": ("out",),
    "norm2": ("up",),
    "group": ("first",),
    "first": ("second",),
}


def test_found_by_the_flow_of_data(block: Block, call: dict[str, torch.Tensor]) -> None:
    assert find_absorbers(block, call, ALL) == EXPECTED
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in block.modules())


def test_a_reader_that_stays_float_keeps_the_norm_as_it_is(
    block: Block, call: dict[str, torch.Tensor]
) -> None:
    found = find_absorbers(block, call, set(ALL) - {"k"}, through_attention=False)
    assert found == {name: readers for name, readers in EXPECTED.items() if name not in ("norm", "v")}


@pytest.mark.parametrize("reads_it", ["output", "sum", "twice"])
def test_another_reader_forbids_it(block: Block, call: dict[str, torch.Tensor], reads_it: str) -> None:
    class Reading(Block):
        def forward(
            self, sample: torch.Tensor, timestep: object = None, return_dict: bool = False
        ) -> tuple[torch.Tensor]:
            x = self.norm2(sample)
            y = self.up(x)
            if reads_it == "output":
                return (y, x)
            if reads_it == "twice":
                return (y + self.up(x * 2),)
            return (y[..., :8] + x,)

    block.__class__ = Reading
    assert find_absorbers(block, call, ALL) == {}


def test_channels_that_were_moved_are_told_by_running_it(block: Block, call: dict[str, torch.Tensor]) -> None:
    class Mixing(Block):
        def forward(
            self, sample: torch.Tensor, timestep: object = None, return_dict: bool = False
        ) -> tuple[torch.Tensor]:
            x = self.norm2(sample)  # [2, 5, 8]: the 8 channels become 2 x 4 and swap
            return (self.up(x.unflatten(-1, (2, 4)).transpose(2, 3).reshape(x.shape)),)

    block.__class__ = Mixing
    assert find_absorbers(block, call, ALL) == {}


def test_the_network_stays_the_same_function(block: Block, call: dict[str, torch.Tensor]) -> None:
    """Outputs with absorption equal those without, to float rounding."""
    sizes = {name: layer.weight.shape[1] for name, layer in walk(block)}
    generator = torch.Generator().manual_seed(2)
    found = find_absorbers(block, call, ALL)
    multipliers: dict[str, torch.Tensor] = {}
    for readers in found.values():
        m = (2 * torch.randn(sizes[readers[0]], generator=generator)).exp()
        multipliers |= dict.fromkeys(readers, m)
    new = absorb(block, found, multipliers)
    with torch.no_grad():
        torch.testing.assert_close(new(**call)[0], block(**call)[0], rtol=2e-5, atol=2e-5)
    assert not torch.equal(new.norm.weight, block.norm.weight)
    assert new.last.weight is block.last.weight and new.down.weight is block.down.weight


def test_layers_share_a_multiplier_where_little_is_lost() -> None:
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    inputs = [torch.randn(1, 5, 16, generator=generator) for _ in range(4)]
    for x in inputs:
        x[..., 0] *= 100
    alike = [(nn.Linear(16, 8), inputs, RULE) for _ in range(3)]
    m = best_shared_multiplier(alike, "mse", 1.0)
    assert m is not None and float(m[0]) < 0.5 * float(m[1:].min())
    opposite = [(nn.Linear(16, 8), inputs, RULE), (nn.Linear(16, 8), inputs, RULE)]
    with torch.no_grad():
        opposite[0][0].weight[:, 1] *= 1000
        opposite[1][0].weight[:, 2] *= 1000
    assert all(best_multiplier(*layer, "mse", 1.0) is not None for layer in opposite)
    assert best_shared_multiplier(opposite, "mse", 1.0) is None


@pytest.fixture(scope="module")
def uneven(make_pipeline: Callable[..., DDIMPipeline]) -> DDIMPipeline:
    """Attention's channels differ: what its normalization gives, and what its values are."""
    pipeline = make_pipeline()
    with torch.no_grad():
        for name, module in pipeline.unet.named_modules():
            if name.endswith("group_norm"):
                module.weight[::5] *= 30
            if name.endswith(("to_q", "to_k", "to_v")):
                module.weight[:, ::5] /= 30
            if name.endswith("to_v"):
                module.weight[::7] *= 20
            if name.endswith("to_out.0"):
                module.weight[:, ::7] /= 20
    return pipeline


@pytest.fixture(scope="module")
def absorbed(uneven: DDIMPipeline) -> DDIMPipeline:
    return octavo.quantize(uneven, RECIPE, batch_size=4, progress=False)


def test_quantized_with_and_without(uneven: DDIMPipeline, absorbed: DDIMPipeline) -> None:
    """The same integers are read where a layer has a norm of its own in front; nothing is lost where several share."""
    without = octavo.quantize(uneven, dataclasses.replace(RECIPE, absorb=False), batch_size=4, progress=False)
    record = absorbed.unet.hf_quantizer.quantization_config.calibration["absorbed"]
    assert {name.rpartition(".")[2] for name in record} == {"group_norm", "to_v"}
    layers = dict(quantized_layers(absorbed.unet))
    readers = [name for names in record.values() for name in names]
    assert readers and all(layers[name].input_multiplier is None for name in readers)
    before = dict(quantized_layers(without.unet))
    assert sum(before[name].input_multiplier is not None for name in readers) > len(readers) / 2
    for name in readers:
        if name.endswith("to_out.0"):
            assert torch.equal(layers[name].weight_int8, before[name].weight_int8)
    errors = []
    x = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(9))
    with torch.no_grad():
        exact = uneven.unet(x, 400).sample
        for pipeline in (absorbed, without):
            errors.append(float((pipeline.unet(x, 400).sample - exact).norm() / exact.norm()))
        same = dequantized(absorbed.unet)(x, 400).sample
    assert errors[0] < 1.1 * errors[1]
    assert float((same - exact).norm() / exact.norm()) < 0.05


def test_saved_loaded_and_in_int8(uneven: DDIMPipeline, absorbed: DDIMPipeline, tmp_path: Path) -> None:
    absorbed.save_pretrained(tmp_path / "saved")
    loaded = DDIMPipeline.from_pretrained(tmp_path / "saved")
    loaded.set_progress_bar_config(disable=True)
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        assert torch.equal(loaded.unet(x, 5).sample, absorbed.unet(x, 5).sample)
    assert model_identity(loaded.unet) == model_identity(absorbed.unet) == model_identity(uneven.unet)
    fast = octavo.accelerate(loaded, precision="f32", batch_size=2)
    assert all(row.ok for row in octavo.audit(fast))
    differences = []
    with torch.no_grad():
        for seed in range(6):
            x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
            a, b = fast.unet(x, 5).sample, absorbed.unet(x, 5).sample
            differences.append(float((a - b).norm() / b.norm()))
    assert min(differences) < 5e-3


def test_every_step_goes_on_top(uneven: DDIMPipeline) -> None:
    """GPTQ, bias correction and attention's products see the equivalent network."""
    recipe = dataclasses.replace(RECIPE, rounding="gptq", bias_correction=True, attention_matmuls=True)
    made = octavo.quantize(uneven, recipe, batch_size=4, progress=False)
    record = made.unet.hf_quantizer.quantization_config.calibration["absorbed"]
    assert record and all(name.endswith("group_norm") for name in record)
    x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        exact = uneven.unet(x, 400).sample
        assert float((made.unet(x, 400).sample - exact).norm() / exact.norm()) < 0.1


def test_weights_that_would_be_rounded_on_the_way_are_refused(pipeline: DDIMPipeline) -> None:
    half = copy.copy(pipeline)
    half.unet = copy.deepcopy(pipeline.unet).to(torch.bfloat16)
    with pytest.raises(OctavoError, match=r"absorb: needs a network in float32, .* holds bfloat16"):
        octavo.quantize(half, RECIPE, batch_size=4, progress=False)
