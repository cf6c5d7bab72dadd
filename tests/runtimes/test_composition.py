"""Every step of a recipe at once: what each adds to a network must survive the others, saving, and the engine."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import DDIMPipeline

import octavo
from octavo.calibration import evaluate, output_correction, output_correction_of
from octavo.quantization import dequantized, quantized_layers, quantized_products
from octavo.runtimes import saturation

RECIPE = octavo.PTQ4DM(
    weights=2,
    group_size=16,
    bits={"mid_block.*": (8, 8)},
    rounding="gptq",
    balance=True,
    bias_correction=True,
    output_correction=True,
    attention_matmuls=True,
    samples=32,
    steps=4,
)


@pytest.fixture(scope="module")
def everything(make_pipeline: Callable[..., DDIMPipeline]) -> DDIMPipeline:
    return octavo.quantize(make_pipeline(), RECIPE, batch_size=8, progress=False)


def test_killed_wherever_it_is_it_ends_with_the_same_bits(
    make_pipeline: Callable[..., DDIMPipeline],
    everything: DDIMPipeline,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Killed in five evaluations of the calibration pairs, spread over the steps that make passes over them."""
    calls, killed = 0, 0

    def killing(module: object, name: str) -> None:
        real = getattr(module, name)

        def dies(*args: object, **kwargs: object) -> object:
            nonlocal calls, killed
            calls += 1
            if calls in (2, 7, 14, 23, 34):
                killed += 1
                raise KeyboardInterrupt
            return real(*args, **kwargs)

        monkeypatch.setattr(module, name, dies)

    killing(evaluate, "collate")
    killing(output_correction, "collate")
    for _ in range(6):
        try:
            again = octavo.quantize(
                make_pipeline(), RECIPE, batch_size=8, workdir=tmp_path, progress=False
            ).unet.state_dict()
            break
        except KeyboardInterrupt:
            assert any(tmp_path.iterdir())
    whole = everything.unet.state_dict()
    assert killed == 5 and again.keys() == whole.keys()
    assert all(torch.equal(tensor, again[name]) for name, tensor in whole.items())
    assert not list(tmp_path.iterdir())


def output(pipeline: DDIMPipeline, timestep: int, rows: int = 2) -> torch.Tensor:
    x = torch.randn(rows, 3, 8, 8, generator=torch.Generator().manual_seed(timestep))
    with torch.no_grad():
        return pipeline.unet(x, timestep).sample  # type: ignore[no-any-return]


def test_all_steps_are_there_and_come_back_from_disk(everything: DDIMPipeline, tmp_path: Path) -> None:
    layers = dict(quantized_layers(everything.unet))
    assert {layer.group_multiplier is not None for layer in layers.values()} == {True, False}
    assert any(layer.input_multiplier is not None for layer in layers.values())
    assert list(quantized_products(everything.unet)) and output_correction_of(everything.unet) is not None
    everything.save_pretrained(tmp_path / "model")
    loaded = DDIMPipeline.from_pretrained(tmp_path / "model")
    for timestep in (999, 250, 0):
        assert torch.equal(output(loaded, timestep), output(everything, timestep))


@pytest.mark.parametrize("adds_in_16_bits", [True, False])
def test_the_engine_runs_all_of_it(
    everything: DDIMPipeline, monkeypatch: pytest.MonkeyPatch, adds_in_16_bits: bool
) -> None:
    """In integers, on either kind of CPU; the simulation's result wherever this machine's sums are exact."""
    exact = adds_in_16_bits or not saturation.adds_in_16_bits()
    monkeypatch.setattr(saturation, "adds_in_16_bits", lambda: adds_in_16_bits)
    fast = octavo.accelerate(everything, precision="f32", batch_size=2)
    rows = octavo.audit(fast)
    count = len(dict(quantized_layers(everything.unet))) + len(dict(quantized_products(everything.unet)))
    assert len(rows) == count and all(row.ok for row in rows)
    assert {row.kernels for row in rows} == ({1, 2} if adds_in_16_bits else {1})
    if exact:
        differences = sorted(
            float((output(fast, t) - output(everything, t)).norm() / output(everything, t).norm())
            for t in range(1, 1000, 120)
        )
        assert differences[0] < 1e-5 and differences[len(differences) // 2] < 0.02


def test_the_float_network_has_nothing_left_to_correct(everything: DDIMPipeline) -> None:
    """The correction is of quantization's error, which `dequantized` no longer makes."""
    unet = dequantized(everything.unet)
    assert output_correction_of(unet) is None and output_correction_of(everything.unet) is not None
    assert not list(quantized_layers(unet)) and not list(quantized_products(unet))
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = unet(x, 500).sample
        unet._forward_hooks.clear()
        unet._forward_pre_hooks.clear()
        assert torch.equal(before, unet(x, 500).sample)
