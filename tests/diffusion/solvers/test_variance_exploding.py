"""A score SDE whose variance explodes: its scheduler has `step_pred` in place of `step`, and no alpha-bars."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import ScoreSdeVeScheduler
from tiny import tiny_exploding_pipeline

import octavo
from octavo.diffusion import call_pipeline, capture_pairs, generators, probe
from octavo.diffusion.analytic import estimate_gamma
from octavo.diffusion.samplers import with_scheduler
from octavo.diffusion.solvers.variance_exploding import corrected_by_image
from octavo.errors import OctavoError
from octavo.evaluation.generate import generate, generate_solving
from octavo.study.tune import tune
from octavo.study.tune_options import Goal, TuneOptions

STEPS = 5


@pytest.fixture(scope="module")
def exploding() -> Any:
    return tiny_exploding_pipeline()


def plain(pipeline: Any, first: int, count: int) -> np.ndarray:
    """Diffusers' own call, without Octavo."""
    seeds = generators(0, first, count)
    made = pipeline(batch_size=count, generator=seeds, num_inference_steps=STEPS, output_type="np")
    return np.asarray(made.images)


def test_an_image_does_not_depend_on_those_beside_it(exploding: Any) -> None:
    ours = generate(exploding, 3, steps=STEPS, batch_size=3, progress=False)
    alone = [plain(exploding, k, 1)[0] for k in range(3)]
    np.testing.assert_allclose(ours, alone, atol=1e-4)
    np.testing.assert_allclose(
        ours, generate(exploding, 3, steps=STEPS, batch_size=2, progress=False), atol=1e-4
    )
    assert np.abs(plain(exploding, 0, 3) - ours).max() > 0.02, "diffusers' corrector norms the batch"
    assert "step_correct" not in vars(exploding.scheduler) and "step_pred" not in vars(exploding.scheduler)


def test_the_corrector_is_diffusers_for_a_batch_of_one() -> None:
    scheduler = ScoreSdeVeScheduler(snr=0.2)
    scheduler.set_timesteps(3)
    scheduler.set_sigmas(3)
    state, score = (torch.randn(3, 3, 4, 4, generator=generators(k, 0, 1)[0]) for k in (5, 6))
    score = score * torch.tensor([1.0, 10.0, 100.0]).reshape(3, 1, 1, 1)
    with corrected_by_image(scheduler):
        ours = scheduler.step_correct(score, state, generators(0, 0, 3)).prev_sample
        (again,) = scheduler.step_correct(score, state, generators(0, 0, 3), return_dict=False)
        one = scheduler.step_correct(score[:1], state[:1], generators(0, 0, 1)[0]).prev_sample
    assert torch.equal(ours, again) and torch.equal(one, ours[:1])
    for k in range(3):
        own = scheduler.step_correct(score[k : k + 1], state[k : k + 1], generators(0, k, 1)).prev_sample
        assert torch.equal(ours[k : k + 1], own)


def test_calibration_sees_the_corrector_and_the_predictor_of_each_step(exploding: Any) -> None:
    seen = probe(exploding, num_inference_steps=STEPS)
    assert seen.num_steps == STEPS and "timestep" in seen.parameters
    pairs = capture_pairs(
        exploding, [[STEPS, 2, 1], [3]], generators=generators(0, 0, 2), num_inference_steps=STEPS
    )
    assert [(pair.image, pair.steps_left) for pair in pairs] == [
        (0, STEPS),
        (0, STEPS),
        (0, 2),
        (0, 2),
        (0, 1),
        (0, 1),
        (1, 3),
        (1, 3),
    ]
    sigmas = 0.01 * 100.0 ** np.linspace(1, 1e-5, STEPS)
    told = [float(pair.args["timestep"]) for pair in pairs]
    np.testing.assert_allclose(told, sigmas[[0, 0, 3, 3, 4, 4, 2, 2]], rtol=1e-4)
    assert not torch.equal(pairs[0].args["sample"], pairs[1].args["sample"])


def test_what_needs_alpha_bars_is_refused(exploding: Any, tmp_path: Path) -> None:
    wanted = r"^scheduler: ScoreSdeVeScheduler has no alpha-bars \(alphas_cumprod\)"
    options = TuneOptions(metric="psnr")
    for refused in (
        lambda: octavo.search_trajectory(exploding, 3),
        lambda: octavo.search_trajectory(exploding, 3, "linear"),
        lambda: octavo.with_trajectory(exploding, octavo.Trajectory((9, 3), 10, "epsilon", "by hand")),
        lambda: estimate_gamma(exploding),
        lambda: generate_solving(exploding, "adaptive", 1, progress=False),
        lambda: tune(exploding, Goal.of("latency=1"), tmp_path / "tuned", options=options),
    ):
        with pytest.raises(OctavoError, match=wanted):
            refused()
    with pytest.raises(OctavoError, match="DDIMScheduler does not fit ScoreSdeVeScheduler's configuration"):
        with_scheduler(exploding, "ddim")
    with pytest.raises(OctavoError, match=r"eta .*: is DDIM's, and ScoreSdeVeScheduler has none"):
        call_pipeline(exploding, generators=generators(0, 0, 1), num_inference_steps=2, inputs={"eta": 1.0})
    with pytest.raises(OctavoError, match=r"steps: 2,001 is more than the 2,000 timesteps"):
        generate(exploding, 1, steps=2001, progress=False)
