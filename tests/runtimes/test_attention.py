from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from diffusers import DDIMPipeline, DiTPipeline
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from torch import nn

import octavo
from octavo.diffusion import first_call
from octavo.errors import OctavoError
from octavo.evaluation.cost import ELSEWHERE, layer_costs
from octavo.quantization import AttentionSpecs, QuantProduct, attach_attention
from octavo.runtimes import convert, executor_of
from octavo.runtimes.audit import audit_compiled, audited
from octavo.runtimes.calls import take_apart
from octavo.runtimes.core import openvino_core
from octavo.runtimes.network import has_foreign_code

INPUTS = {"class_labels": [1, 5, 7], "guidance_scale": 2.0}


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.fixture(scope="module")
def fast(attentive: DDIMPipeline) -> DDIMPipeline:
    return octavo.accelerate(attentive, precision="f32", threads=1)


def differences(fast: DDIMPipeline, simulated: DDIMPipeline) -> Iterator[float]:
    with torch.no_grad():
        for timestep in range(1, 1000, 60):
            x = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(timestep))
            yield relative(fast.unet(x, timestep).sample, simulated.unet(x, timestep).sample)


def test_both_products_run_in_integers_by_audit(fast: DDIMPipeline, attentive: DDIMPipeline) -> None:
    rows = {row.layer: row for row in octavo.audit(fast)}
    assert all(row.ok for row in rows.values())
    assert {row.precision for name, row in rows.items() if name.endswith("attentions.0.qk")} == {"i8"}
    assert {row.precision for name, row in rows.items() if name.endswith("attentions.0.pv")} == {"u8"}
    simulated = octavo.audit(attentive)
    assert [row.layer for row in simulated] == list(rows) and not any(row.ok for row in simulated)


def test_they_compute_what_the_simulation_computes(fast: DDIMPipeline, attentive: DDIMPipeline) -> None:
    """To float32's precision where no value flips at a rounding border."""
    found = list(differences(fast, attentive))
    assert min(found) < 2e-6 and max(found) < 0.05


def test_fewer_bits_saturate_where_their_range_ends(pipeline: DDIMPipeline) -> None:
    recipe = octavo.PTQ4DM(weights=7, activations=5, samples=4, steps=2, attention_matmuls=True)
    coarse = octavo.quantize(pipeline, recipe, batch_size=4, progress=False)
    executed = octavo.accelerate(coarse, precision="f32", threads=1)
    assert all(row.ok for row in octavo.audit(executed))
    assert min(differences(executed, coarse)) < 2e-6


class Owner(nn.Module):
    def forward(self, *operands: torch.Tensor) -> torch.Tensor:
        query, key, value = (x.transpose(1, 2) for x in operands)
        return F.scaled_dot_product_attention(query, key, value, scale=1e-4).transpose(1, 2)


class Denoiser(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = Owner()

    def forward(
        self, sample: torch.Tensor, key: torch.Tensor, value: torch.Tensor, return_dict: bool = True
    ) -> tuple[torch.Tensor]:
        return (self.attention(sample, key, value),)


@pytest.mark.parametrize("keys", [64, 77], ids=["self", "cross"])
def test_sums_are_exact_at_the_ends_of_the_ranges(keys: int) -> None:
    """The engine's kernels, on operands that all saturate: pairs of products that int16 must just hold."""
    generator = torch.Generator().manual_seed(3)

    def ends(tokens: int) -> torch.Tensor:
        signs = torch.randint(2, (2, tokens, 2, 1), generator=generator) * 2.0 - 1
        return signs.expand(2, tokens, 2, 32).contiguous() * 1000

    tensors = (ends(64), ends(keys), ends(keys))
    network = Denoiser()
    scales = {name: torch.tensor(1.0) for name in ("query", "key", "value")}
    attach_attention(network, {"attention": AttentionSpecs.of_bits(8)}, {"attention": scales})
    (simulated,) = network(*tensors)
    graph = convert.to_openvino(network, take_apart(network.forward, tensors, {}))
    graph.reshape({port: list(x.shape) for port, x in zip(graph.inputs, tensors, strict=True)})
    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}
    compiled = openvino_core().compile_model(graph, "CPU", settings)
    executed = torch.from_numpy(compiled([x.numpy() for x in tensors])[0])
    assert simulated.abs().max() > 10
    torch.testing.assert_close(executed, simulated, atol=1e-4, rtol=1e-6)
    rows = audit_compiled(compiled, audited(network))
    assert [(row.layer, row.precision) for row in rows] == [("attention.qk", "i8"), ("attention.pv", "u8")]


def test_a_guided_transformer_runs_in_integers(dit: DiTPipeline) -> None:
    recipe = octavo.PTQ4DM(weights=7, samples=6, steps=3, attention_matmuls=True)
    int8 = octavo.quantize(dit, recipe, batch_size=3, inputs=INPUTS, progress=False)
    fast = octavo.accelerate(int8, precision="f32", batch_size=3, inputs=INPUTS, threads=1)
    rows = octavo.audit(fast)
    assert all(row.ok for row in rows)
    assert sum(row.layer.endswith((".qk", ".pv")) for row in rows) == 4
    args, kwargs = first_call(dit, batch_size=3, inputs=INPUTS)
    with torch.no_grad():
        exact, simulated, executed = (
            pipeline.transformer(*args, **kwargs).sample for pipeline in (dit, int8, fast)
        )
    assert (executed - simulated).norm() < 0.5 * (simulated - exact).norm() < 0.05 * exact.norm()


def test_a_float_fallback_is_refused(attentive: DDIMPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    fallen = copy.copy(attentive)
    fallen.unet = copy.deepcopy(attentive.unet)
    fallen.unet.conv_in.bias.data.add_(1.0)  # another network, for the cache
    product = fallen.unet.mid_block.attentions[0].octavo_attention.qk
    ordinary = convert._forward_of_product

    def in_float(of: QuantProduct):  # type: ignore[no-untyped-def]
        if of.left_scale.data_ptr() != product.left_scale.data_ptr():  # the executor's copies share memory
            return ordinary(of)
        return lambda left, right, factor: left @ right * factor

    monkeypatch.setattr(convert, "_forward_of_product", in_float)
    with pytest.raises(
        OctavoError, match=r"mid_block\.attentions\.0\.qk \((f32|bf16)\); .*attention_matmuls"
    ):
        octavo.accelerate(fallen, threads=1)
    warned = octavo.accelerate(fallen, on_fallback="warn", threads=1)
    assert [row.layer for row in octavo.audit(warned) if not row.ok] == ["mid_block.attentions.0.qk"]


def test_it_is_no_foreign_code(fast: DDIMPipeline, attentive: DDIMPipeline) -> None:
    """So its graph is kept in the cache."""
    assert not has_foreign_code(attentive.unet)
    executor = executor_of(fast)
    assert executor is not None and executor.kept.folder is not None and executor.kept.folder.is_dir()
    other = copy.deepcopy(attentive.unet)
    other.mid_block.forward = other.mid_block.forward
    assert has_foreign_code(other)


def test_a_method_or_a_hook_in_a_library_s_place_is(
    pipeline: DDIMPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not has_foreign_code(pipeline.unet)
    for owner, name in ((Attention, "forward"), (AttnProcessor2_0, "__call__")):
        with monkeypatch.context() as patched:
            patched.setattr(owner, name, lambda *args, **kwargs: None)
            assert has_foreign_code(pipeline.unet)
    hook = torch.nn.modules.module.register_module_forward_hook(lambda *args: None)
    assert has_foreign_code(pipeline.unet)
    hook.remove()
    assert not has_foreign_code(pipeline.unet)


def test_its_cost_is_counted_by_product(pipeline: DDIMPipeline, attentive: DDIMPipeline) -> None:
    in_float = {row.layer: row for row in layer_costs(pipeline)}
    by_name = {row.layer: row for row in layer_costs(attentive)}
    products = [row for name, row in by_name.items() if name.endswith((".qk", ".pv"))]
    assert ELSEWHERE not in by_name
    assert sum(row.macs for row in products) == in_float[ELSEWHERE].macs
    assert {(row.weight_bits, row.activation_bits) for row in products} == {(7, 8), (8, 7)}
