from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import EulerDiscreteScheduler

import octavo
from octavo.calibration import PairStore, collect_pairs
from octavo.diffusion import call_pipeline, generators
from octavo.errors import OctavoError
from octavo.study.sources import check_fits, given_samples, own_samples, pairs_from

STEPS = 5


@pytest.fixture(scope="module")
def pairs(pipeline, tmp_path_factory: pytest.TempPathFactory) -> PairStore:  # type: ignore[no-untyped-def]
    recipe = octavo.PTQ4DM(samples=12, steps=STEPS, pairs_per_trajectory=2, timesteps="uniform")
    folder = tmp_path_factory.mktemp("pairs")
    return collect_pairs(pipeline, recipe, folder, seed=7, batch_size=4, progress=False)


@pytest.fixture(scope="module")
def clean() -> torch.Tensor:
    return torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def made(source: str, pairs: PairStore, pipeline, clean: torch.Tensor, folder: Path):  # type: ignore[no-untyped-def]
    store = pairs_from(source, pairs, folder, pipeline.scheduler, clean, steps=STEPS, seed=3)
    return [pair for batch in store for pair in batch]


@pytest.mark.parametrize("source", ["forward", "raw", "noise"])
def test_only_the_sample_changes(source: str, pairs, pipeline, clean, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    before = [pair for batch in pairs for pair in batch]
    after = made(source, pairs, pipeline, clean, tmp_path)
    assert len(after) == len(before) == 12
    for old, new in zip(before, after, strict=True):
        assert (old.image, old.step, old.args["timestep"]) == (new.image, new.step, new.args["timestep"])
        assert old.args["sample"].shape == new.args["sample"].shape
        assert not torch.equal(old.args["sample"], new.args["sample"])


def test_raw_is_x0_and_noise_is_standard_normal(pairs, pipeline, clean, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    for pair in made("raw", pairs, pipeline, clean, tmp_path / "raw"):
        assert torch.equal(pair.args["sample"][0], clean[pair.image])
    noise = torch.stack(
        [pair.args["sample"] for pair in made("noise", pairs, pipeline, clean, tmp_path / "noise")]
    )
    assert len(set(noise.flatten(1)[:, 0].tolist())) == 12  # each its own
    assert abs(noise.mean()) < 0.1 and abs(noise.std() - 1) < 0.05


def test_forward_is_the_closed_form(pairs, pipeline, clean, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    noised = made("forward", pairs, pipeline, clean, tmp_path / "forward")
    noise = made("noise", pairs, pipeline, clean, tmp_path / "noise")  # the same streams, and unit noise here
    for x_t, eps in zip(noised, noise, strict=True):
        abar = pipeline.scheduler.alphas_cumprod[int(x_t.args["timestep"])].double()
        expected = abar.sqrt() * clean[x_t.image] + (1 - abar).sqrt() * eps.args["sample"][0]
        expected = expected.double()
        torch.testing.assert_close(x_t.args["sample"][0].double(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers' own
def test_samples_are_scaled_as_the_sampler_scales_its_own(pairs, pipeline, clean, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    euler = EulerDiscreteScheduler.from_config(pipeline.scheduler.config)
    store = pairs_from("forward", pairs, tmp_path, euler, clean, steps=STEPS, seed=3)
    euler.set_timesteps(STEPS)
    for pair in (pair for batch in store for pair in batch):
        sigma = euler.sigmas[
            pair.step
        ]  # x_0 + sigma noise, over sqrt(sigma^2 + 1): variance-preserving again
        remainder = pair.args["sample"][0] * (sigma**2 + 1).sqrt() - clean[pair.image]
        assert 0.8 < (remainder / sigma).std() < 1.2


def test_guided_rows_get_the_same_sample(dit, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    recipe = octavo.PTQ4DM(samples=4, steps=3, pairs_per_trajectory=2)
    inputs = {"class_labels": [1, 2]}
    pairs = collect_pairs(dit, recipe, tmp_path / "pairs", batch_size=2, inputs=inputs, progress=False)
    clean = own_samples(dit, 2, steps=3, seed=0, batch_size=2, inputs=inputs)
    assert clean.shape == (2, 4, 8, 8)
    store = pairs_from("forward", pairs, tmp_path / "forward", dit.scheduler, clean, steps=3, seed=0)
    for pair in (pair for batch in store for pair in batch):
        first, second = pair.args["hidden_states"]
        assert torch.equal(first, second) and pair.num_rows == 2


def test_own_samples_are_the_pipelines_images(pipeline) -> None:  # type: ignore[no-untyped-def]
    clean = own_samples(pipeline, 3, steps=STEPS, seed=11, batch_size=2)
    images = call_pipeline(
        pipeline, generators=generators(11, 0, 2), num_inference_steps=STEPS, output_type="pt"
    )
    torch.testing.assert_close((clean[:2] / 2 + 0.5).clamp(0, 1), images)
    assert len(clean) == 3 and "step" not in vars(pipeline.scheduler)


def test_given_images_are_scaled_and_each_taken_once(pipeline) -> None:  # type: ignore[no-untyped-def]
    images = np.arange(5, dtype=np.uint8)[:, None, None, None] * np.full((1, 8, 8, 3), 51, dtype=np.uint8)
    clean = given_samples(images, 5, seed=0)
    assert sorted(round(float(x.mean()), 3) for x in clean) == [-1.0, -0.6, -0.2, 0.2, 0.6]
    assert len(given_samples(images, 12, seed=0)) == 12


def test_what_does_not_fit_is_told(pairs, pipeline, dit, clean, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(OctavoError, match=r"images: of 3 x 4 x 4 .*, but the network reads 3 x 8 x 8"):
        made("raw", pairs, pipeline, clean[..., :4, :4], tmp_path)
    with pytest.raises(OctavoError, match="source: 'denoising'"):
        made("denoising", pairs, pipeline, clean, tmp_path)
    with pytest.raises(OctavoError, match="latents"):
        check_fits(np.zeros((1, 8, 8, 3), dtype=np.uint8), dit)
    with pytest.raises(OctavoError, match=r"images: of 1 x 8 x 6 .*, but the network reads 3 x 8 x 8"):
        check_fits(np.zeros((1, 8, 6, 1), dtype=np.uint8), pipeline)
    check_fits(np.zeros((1, 8, 8, 3), dtype=np.uint8), pipeline)
