from __future__ import annotations

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor

from octavo.diffusion import generators
from octavo.diffusion.analytic import Gamma, cost_of_gamma, estimate, estimate_gamma
from octavo.diffusion.trajectories.own_images import own_images
from octavo.diffusion.trajectories.schedule import noise_schedule
from octavo.errors import OctavoError
from octavo.fingerprint import fingerprint, model_identity


def twelve(**settings: Any) -> DDIMScheduler:
    """A schedule of 12 timesteps, from almost no noise to almost nothing else."""
    return DDIMScheduler(num_train_timesteps=12, beta_start=0.01, beta_end=0.6, **settings)


def estimated(pipeline: Any, folder: Path, **settings: Any) -> Gamma:
    return estimate_gamma(
        pipeline, workdir=folder, **{"images": 8, "batch_size": 6, "progress": False, **settings}
    )


@pytest.mark.parametrize("mean", [0.0, 0.3])
def test_of_the_exact_network_of_normal_data_it_is_known(
    mean: float, normal_pipeline: Callable[..., Any], tmp_path: Path
) -> None:
    """(1 - abar) / (abar c^2 + 1 - abar): E eps^2, where eps = sqrt(1 - abar) (x_t - its mean) / Var(x_t)."""
    scheduler = DDIMScheduler(clip_sample=False)
    gamma = estimated(
        normal_pipeline(scheduler, mean=mean), tmp_path, candidates=10, images=24, batch_size=24
    )
    abar = noise_schedule(scheduler).alpha_bars[list(gamma.timesteps)]
    exact = (1 - abar) / (abar * 0.25 + 1 - abar)
    assert (np.abs(np.array(gamma.values) - exact) < 5 * np.array(gamma.errors) + 0.02 * (1 - exact)).all()
    # where little is signal, the noise's own spread, sqrt(2 / 192 / 24) for plain means, is gone
    assert max(gamma.errors[-3:]) < 0.1 * np.sqrt(2 / 192 / 24)
    if mean == 0:
        np.testing.assert_allclose(1 - np.array(gamma.values[-3:]), 1 - exact[-3:], rtol=0.1)


def test_it_is_the_mean_square_of_what_the_network_predicts(
    ddpm: Callable[[Any], Any], tmp_path: Path
) -> None:
    """Plain means over many draws of noise, the network called by hand, agree within their errors."""
    pipeline, images = ddpm(twelve()), 8
    gamma = estimated(pipeline, tmp_path, images=images, batch_size=8)
    schedule = noise_schedule(pipeline.scheduler)
    own = own_images(pipeline, schedule, steps=50, generators=generators(estimate.SEED_STREAM, 0, images))
    draw = torch.Generator().manual_seed(1)
    for t in (2, 11):
        batches = []
        for _ in range(24):
            x = schedule.noised(own, torch.randn(own.shape, generator=draw), t)
            with torch.no_grad():
                eps = pipeline.unet(x, t).sample
            batches.append(float(eps.double().square().mean()))
        error = np.std(batches) / np.sqrt(24) + gamma.errors[t]
        assert abs(np.mean(batches) - gamma.values[t]) < 4 * error


def test_it_says_what_it_is_of(ddpm: Callable[[Any], Any], tmp_path: Path) -> None:
    pipeline = ddpm(twelve())
    gamma = estimated(pipeline, tmp_path, seed=3, runtime=["engine", "f32"])
    assert gamma.timesteps == tuple(range(12)) and gamma.num_train_timesteps == 12
    assert (gamma.images, gamma.seed, gamma.prediction_type) == (8, 3, "epsilon")
    assert gamma.network_evaluations == cost_of_gamma(12, 8, 12) == 8 * (12 + 1 + 12)
    assert gamma.model == model_identity(pipeline.unet) and gamma.network == fingerprint(pipeline.unet)
    assert gamma.facts == {"runtime": ["engine", "f32"]}
    assert cost_of_gamma(100, 1) == 151


def test_the_network_that_executes_is_the_one_named(ddpm: Callable[[Any], Any], tmp_path: Path) -> None:
    pipeline = ddpm(twelve())
    other = copy.deepcopy(pipeline.unet)
    other.conv_in.weight.data *= 1.01  # in other bits, so to speak
    named = estimated(pipeline, tmp_path / "named", candidates=2, networks={"unet": other})
    assert named.network == fingerprint(other) != fingerprint(pipeline.unet)
    plain = estimated(pipeline, tmp_path, candidates=2)
    assert plain.network == fingerprint(pipeline.unet) and plain.model == named.model
    pipeline.unet = other
    again = estimated(pipeline, tmp_path, candidates=2)
    assert again.network == named.network and again.model == plain.model and again.values != plain.values
    names = {path.parent.name for path in tmp_path.rglob("*.safetensors")}
    assert len(names) == 2  # the same work has the same name


def test_a_guided_batch_with_a_learned_variance_has_one_too(
    dit: Callable[[Any], Any], tmp_path: Path
) -> None:
    gamma = estimated(dit(twelve()), tmp_path, candidates=3, inputs={"class_labels": [1, 2]})
    assert np.isfinite(gamma.values).all() and min(gamma.values) > 0


def test_other_predictions_are_turned_into_noise(
    normal_pipeline: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = normal_pipeline(twelve(clip_sample=False))
    plain = estimated(pipeline, tmp_path)
    alpha_bars = noise_schedule(pipeline.scheduler).alpha_bars
    original = type(pipeline.unet).forward

    def velocity(self: Any, sample: Tensor, timestep: Any, **_: Any) -> Any:
        abar = float(alpha_bars[int(timestep)])
        output = original(self, sample, timestep)
        return type(output)((output.sample - (1 - abar) ** 0.5 * sample) / abar**0.5)

    monkeypatch.setattr(type(pipeline.unet), "forward", velocity)
    pipeline.scheduler = twelve(clip_sample=False, prediction_type="v_prediction")
    found = estimated(pipeline, tmp_path)
    np.testing.assert_allclose(found.values, plain.values, rtol=1e-4)
    assert found.prediction_type == "v_prediction"


def test_what_was_killed_goes_on_and_ends_the_same(
    ddpm: Callable[[Any], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = ddpm(twelve())
    whole = estimated(pipeline, tmp_path / "whole")
    saved = estimate._save

    def killed_after_one(path: Path, measured: Any) -> None:
        saved(path, measured)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(estimate, "_save", killed_after_one)
        estimated(pipeline, tmp_path / "killed")
    assert len(list((tmp_path / "killed").rglob("*.safetensors"))) == 1
    calls: list[int] = []
    network = type(pipeline.unet)
    original = network.forward

    def counted(self: Any, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
        calls.append(len(sample))
        return original(self, sample, *args, **kwargs)

    monkeypatch.setattr(network, "forward", counted)
    kept: list[int] = []
    again = estimated(pipeline, tmp_path / "killed", on_kept=kept.append)
    assert kept == [cost_of_gamma(12, 6, 12)]
    assert sum(calls) == cost_of_gamma(12, 2, 12)  # the second batch alone
    assert again == whole


def test_the_bar_begins_at_what_was_kept(
    ddpm: Callable[[Any], Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    estimated(ddpm(twelve()), tmp_path)
    estimated(ddpm(twelve()), tmp_path, progress=True)
    err = capsys.readouterr().err
    assert "measure gamma: 100%" in err and not re.search(r"\devaluation/s", err), "no rate"


def test_images_are_the_same_in_any_batches_and_others_with_another_seed(
    ddpm: Callable[[Any], Any], tmp_path: Path
) -> None:
    pipeline = ddpm(twelve())
    first, second = (np.array(estimated(pipeline, tmp_path, batch_size=b).values) for b in (8, 3))
    np.testing.assert_allclose(first, second, rtol=1e-3)
    assert not np.allclose(first, estimated(pipeline, tmp_path, seed=100).values, rtol=1e-3)


def test_a_damaged_file_is_named(ddpm: Callable[[Any], Any], tmp_path: Path) -> None:
    pipeline = ddpm(twelve())
    estimated(pipeline, tmp_path)
    path = sorted(tmp_path.rglob("*.safetensors"))[1]
    path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(OctavoError, match=r"squares-000006\.safetensors: not readable as measurements"):
        estimated(pipeline, tmp_path)


def test_bad_arguments_are_told_before_anything_runs(ddpm: Callable[[Any], Any], tmp_path: Path) -> None:
    pipeline = ddpm(twelve())
    for settings, message in (
        ({"images": 7}, "images: 7 is not a whole number from 8"),
        ({"candidates": 13}, "candidates: 13 is not a whole number from 2 to 12"),
        ({"batch_size": 0}, "batch_size: 0"),
        ({"seed": 2_000_000_000}, "seed: 2000000000 is not a whole number from 0 to 1073741816"),
    ):
        with pytest.raises(OctavoError, match=message):
            estimated(pipeline, tmp_path, **settings)
    with pytest.raises(OctavoError, match="has no alpha-bars"):
        estimated(ddpm(FlowMatchEulerDiscreteScheduler()), tmp_path)
    assert not list(tmp_path.iterdir())


def test_predictions_that_are_not_finite_are_told(ddpm: Callable[[Any], Any], tmp_path: Path) -> None:
    pipeline = ddpm(twelve(clip_sample=False))
    torch.nn.init.constant_(pipeline.unet.conv_out.bias, float("nan"))
    with pytest.raises(OctavoError, match="unet: its predictions are not finite"):
        estimated(pipeline, tmp_path)
