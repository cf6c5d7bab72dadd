"""Output correction: what quantization adds to the output, found at each timestep, left alone where it harms."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler
from torch import nn

import octavo
from octavo.calibration import OUTPUT_CORRECTION, attach_operations, output_correction_of
from octavo.calibration.collect import PairStore
from octavo.calibration.output_correction import LEAST_PAIRS, fit_output_correction, summary
from octavo.diffusion import CalibrationPair
from octavo.errors import OctavoError
from octavo.quantization import OutputCorrection

RECIPE = octavo.PTQ4DM(weights=3, activations=5, samples=16, steps=4, pairs_per_trajectory=2)
TIMESTEPS = (0, 300, 900)
K = {0: 0.0, 300: 0.25, 900: -0.125}
MEAN = {0: (1.0, 0.0), 300: (-0.5, 0.25), 900: (0.0, 2.0)}


class Network(nn.Module):
    """What it is handed, through a convolution, and then through `disturbed(y, rows' timesteps, x)`."""

    def __init__(self, disturbed: Callable[..., torch.Tensor] = lambda y, t, x: y) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 2, 1)
        with torch.no_grad():
            self.conv.weight.copy_(torch.tensor([[1.0, 0.5], [-1.0, 2.0]]).view(2, 2, 1, 1))
            self.conv.bias.copy_(torch.tensor([0.1, -3.0]))  # type: ignore[union-attr]
        self.disturbed = disturbed

    def forward(self, sample: torch.Tensor, timestep: Any, return_dict: bool = True) -> tuple[torch.Tensor]:
        t = torch.as_tensor(timestep).flatten().expand(len(sample))
        return (self.disturbed(self.conv(sample), t, sample),)


def known(y: torch.Tensor, t: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    k = torch.tensor([K[int(step)] for step in t]).view(-1, 1, 1, 1)
    mean = torch.tensor([MEAN[int(step)] for step in t]).view(-1, 2, 1, 1)
    return (1 + k) * y + mean


def stored(folder: Path, images: int = 2 * LEAST_PAIRS, timesteps: tuple[int, ...] = TIMESTEPS) -> PairStore:
    """Four images to a batch, each caught at every timestep; odd images have a mark in their first pixel."""
    store, generator = PairStore(folder, images // 4), torch.Generator().manual_seed(0)
    for batch in range(images // 4):
        pairs = []
        for image in range(4 * batch, 4 * batch + 4):
            for step, timestep in enumerate(timesteps):
                x = torch.randn(1, 2, 4, 4, generator=generator)
                x[0, 0, 0, 0] = 100.0 if image % 2 else 0.0
                args = {"sample": x, "timestep": torch.tensor(timestep)}
                pairs.append(CalibrationPair(args, frozenset({"sample"}), 1, image, step, 3 - step))
        store.save(batch, pairs)
    return store


@pytest.fixture
def pairs(tmp_path: Path) -> PairStore:
    return stored(tmp_path)


def test_a_known_k_and_mean_are_found_and_taken_out(pairs: PairStore) -> None:
    original, quantized = Network(), Network(known)
    correction, steps = fit_output_correction(quantized, original, pairs, progress=False)
    assert correction is not None
    assert correction.timesteps.tolist() == list(TIMESTEPS)
    torch.testing.assert_close(correction.k, torch.tensor(list(K.values())), rtol=0, atol=1e-6)
    torch.testing.assert_close(correction.mean.view(3, 2), torch.tensor(list(MEAN.values())))
    assert [step.kind for step in steps] == ["mean", "k and mean", "k and mean"]
    assert max(step.held_out for step in steps) < 1e-9
    attach_operations(quantized, {OUTPUT_CORRECTION: correction})
    for timestep in TIMESTEPS:
        x = torch.randn(3, 2, 4, 4)
        torch.testing.assert_close(quantized(x, timestep)[0], original(x, timestep)[0])


def test_against_numpy_on_noise_that_stays(tmp_path: Path) -> None:
    """Of k and mean with a residual left over: the regression that numpy makes of all samples kept."""

    def noisy(y: torch.Tensor, t: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return 1.1 * y + 0.3 * torch.sin(40 * x)

    pairs, original = stored(tmp_path, 16, (7,)), Network()
    correction, _ = fit_output_correction(Network(noisy), original, pairs, progress=False)
    assert correction is not None
    with torch.no_grad():
        samples = torch.cat([pair.args["sample"] for batch in pairs for pair in batch])
        e = original(samples, 7)[0].double()
        d = Network(noisy)(samples, 7)[0].double() - e
    e, d = (value.movedim(1, 0).flatten(1).numpy() for value in (e, d))
    both = [np.cov(d[c], e[c]) for c in range(2)]
    k = sum(m[0, 1] for m in both) / sum(m[1, 1] for m in both)
    assert float(correction.k) == pytest.approx(k, rel=1e-6)
    assert correction.mean.flatten().tolist() == pytest.approx((d - k * e).mean(1).tolist(), rel=1e-5)


def opposite(at: tuple[int, ...]) -> Callable[..., torch.Tensor]:
    """At these timesteps odd images err the other way than even ones, which no correction can know."""

    def disturbed(y: torch.Tensor, t: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        sign = torch.where(x[:, :1, :1, :1] > 50, -1.0, 1.0)
        confused = torch.tensor([int(step) in at for step in t]).view(-1, 1, 1, 1)
        return torch.where(confused, y + sign * (0.5 + 0.1 * y), 1.25 * y + 0.5)

    return disturbed


def test_a_timestep_at_which_a_correction_does_harm_is_left_alone(pairs: PairStore) -> None:
    correction, steps = fit_output_correction(Network(opposite((0,))), Network(), pairs, progress=False)
    assert correction is not None
    assert [step.kind for step in steps] == ["none", "k and mean", "k and mean"]
    assert correction.k[0] == 0 and not correction.mean[0].any()
    facts = summary(steps)
    assert (facts["timesteps"], facts["none"], facts["k_and_mean"]) == (3, 1, 2)


def test_where_nothing_helps_there_is_no_correction(pairs: PairStore) -> None:
    for harm in (Network(opposite(TIMESTEPS)), Network()):
        correction, steps = fit_output_correction(harm, Network(), pairs, progress=False)
        assert correction is None and all(step.held_out == 1.0 for step in steps)


def test_neighbours_are_pooled_until_each_half_has_enough(tmp_path: Path) -> None:
    """4 images: 2 pairs in each half at a timestep, so that two timesteps make one, and the fifth joins the last."""
    pairs = stored(tmp_path, 4, (900, 10, 20, 310, 300))
    quantized = Network(lambda y, t, x: 1.5 * y)
    correction, steps = fit_output_correction(quantized, Network(), pairs, progress=False)
    assert [(step.timestep, step.pairs) for step in steps] == [(15.0, 8), (pytest.approx(1510 / 3), 12)]
    assert correction is not None and correction.k.tolist() == pytest.approx([0.5, 0.5])


class Killed(PairStore):
    def load(self, batch: int) -> list[CalibrationPair]:
        if batch == 1:
            raise KeyboardInterrupt
        return super().load(batch)


def test_a_killed_pass_goes_on_to_the_same_bits(pairs: PairStore, tmp_path: Path) -> None:
    original, quantized, state = Network(), Network(known), tmp_path / "state.safetensors"
    whole, steps = fit_output_correction(quantized, original, pairs, progress=False)
    with pytest.raises(KeyboardInterrupt):
        fit_output_correction(
            quantized, original, Killed(pairs.folder, len(pairs)), state=state, progress=False
        )
    pairs.path(0).unlink()  # what was seen is not looked at again
    resumed, again = fit_output_correction(quantized, original, pairs, state=state, progress=False)
    assert whole is not None and resumed is not None
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name])
    assert summary(steps) == summary(again)


def test_a_damaged_state_is_told(pairs: PairStore, tmp_path: Path) -> None:
    (tmp_path / "state").write_bytes(b"not tensors")
    with pytest.raises(OctavoError, match="not readable; delete it"):
        fit_output_correction(Network(), Network(), pairs, state=tmp_path / "state", progress=False)


class Timeless(nn.Module):
    def forward(self, sample: torch.Tensor) -> torch.Tensor:
        return sample


def test_a_network_that_is_told_no_single_timestep_is_refused() -> None:
    correction = OutputCorrection(torch.zeros(1), torch.zeros(1), torch.zeros(1, 1, 1, 1))
    timeless, network = Timeless(), Network()
    for module in (timeless, network):
        attach_operations(module, {OUTPUT_CORRECTION: correction})
    x = torch.zeros(1, 2, 4, 4)
    with pytest.raises(OctavoError, match="told no timestep"):
        timeless(x)
    with pytest.raises(OctavoError, match="one for each row"):
        network(x, timestep=torch.zeros(1, 1))


class DropsVariance(DDIMScheduler):
    def step(self, model_output: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return super().step(model_output[:, :3], *args, **kwargs)


def error(pipeline: DDIMPipeline, exact: DDIMPipeline, channels: slice) -> float:
    x = torch.randn(32, 3, 8, 8, generator=torch.Generator().manual_seed(9))
    with torch.inference_mode():
        return sum(
            float((pipeline.unet(x, t).sample - exact.unet(x, t).sample)[:, channels].square().mean())
            for t in (100, 500, 900)
        )


def test_the_recipe_asks_for_it_and_a_learned_variance_is_left_alone(make_pipeline) -> None:  # type: ignore[no-untyped-def]
    exact = make_pipeline(seed=3, out_channels=6)
    exact.scheduler = DropsVariance.from_config(exact.scheduler.config)
    plain, corrected = (
        octavo.quantize(exact, recipe, batch_size=4, progress=False)
        for recipe in (RECIPE, dataclasses.replace(RECIPE, output_correction=True))
    )
    correction = output_correction_of(corrected.unet)
    assert correction is not None and correction.mean.shape[1:] == (3, 1, 1)
    assert output_correction_of(plain.unet) is None
    prediction, variance = slice(0, 3), slice(3, 6)
    assert error(corrected, exact, prediction) < error(plain, exact, prediction)
    assert error(corrected, exact, variance) == error(plain, exact, variance)
    assert not exact.unet._forward_hooks


def test_it_comes_behind_a_rounded_output(make_pipeline) -> None:  # type: ignore[no-untyped-def]
    recipe = dataclasses.replace(RECIPE, network_output=True, output_correction=True)
    unet = octavo.quantize(make_pipeline(seed=3), recipe, batch_size=4, progress=False).unet
    correction = output_correction_of(unet)
    assert correction is not None
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        k, mean = correction.at(torch.tensor(400))
        steps = (unet(x, 400).sample * (1 + k) + mean) / unet.octavo_operations["network_output"].scale
    assert float((steps - steps.round()).abs().max()) < 1e-3


def test_the_recipe_takes_nothing_but_a_switch() -> None:
    with pytest.raises(OctavoError, match="output_correction: 'k' is neither True nor False"):
        octavo.PTQ4DM(output_correction="k")  # type: ignore[arg-type]
