from __future__ import annotations

import json
import math
from statistics import NormalDist

import pytest
import torch
from torch import Tensor

from octavo.diffusion import (
    DISTRIBUTIONS,
    NDTC,
    AsPublished,
    Single,
    SkewNormal,
    distribution,
    draw,
    draw_labelled,
)
from octavo.diffusion.timesteps import from_dict
from octavo.errors import OctavoError

N = 40_000


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def assert_frequencies(drawn: Tensor, expected: list[float]) -> None:
    """drawn in 1..T against its probabilities, each within 5 standard deviations."""
    counts = torch.bincount(drawn, minlength=len(expected) + 1)
    assert len(counts) == len(expected) + 1 and counts[0] == 0
    for count, p in zip(counts[1:].tolist(), expected, strict=True):
        assert abs(count / N - p) <= 5 * math.sqrt(max(p * (1 - p), 1e-4) / N)


def clamped_normal(mean: float, std: float, num_steps: int) -> list[float]:
    """Probabilities of clamp(floor(Normal), 0, T) with 0 counted as 1, from the normal's CDF."""
    cdf = NormalDist(mean, std).cdf
    inner = [cdf(t + 1) - cdf(t) for t in range(2, num_steps)]
    return [cdf(2), *inner, 1 - cdf(num_steps)]


@pytest.mark.parametrize(
    ("params", "mean", "std"),
    [({}, 8.0, 10.0), ({"mean": 0.3, "std": 0.1}, 6.0, 2.0), ({"std": "sqrt"}, 8.0, math.sqrt(10))],
)
def test_ndtc_is_a_floored_and_clamped_normal(params: dict[str, object], mean: float, std: float) -> None:
    drawn = draw("ndtc", N, 20, rng(), **params)
    assert drawn.dtype == torch.int64
    assert_frequencies(drawn, clamped_normal(mean, std, 20))


def test_ndtc_moments_away_from_the_ends() -> None:
    drawn = draw(NDTC(mean=0.5, std=0.05), N, 1000, rng()).double()
    assert drawn.mean().item() == pytest.approx(499.5, abs=1.5)  # floor lowers the mean by a half
    assert drawn.std().item() == pytest.approx(50, rel=0.02)


def test_uniform_reaches_every_step_equally() -> None:
    assert_frequencies(draw("uniform", N, 7, rng()), [1 / 7] * 7)


@pytest.mark.parametrize(("at", "step"), [(0.0, 1), (0.004, 1), (0.5, 50), (0.996, 100), (1.0, 100)])
def test_single(at: float, step: int) -> None:
    assert draw("single", 3, 100, rng(), at=at).tolist() == [step] * 3


@pytest.mark.parametrize("shape", [-6.0, 0.0, 3.0])
def test_skew_normal_moments(shape: float) -> None:
    drawn = draw(SkewNormal(location=0.5, scale=0.05, shape=shape), N, 10_000, rng()).double()
    d = shape / math.sqrt(1 + shape**2)
    m = d * math.sqrt(2 / math.pi)
    skewness = (4 - math.pi) / 2 * m**3 / (1 - m**2) ** 1.5
    assert drawn.mean().item() == pytest.approx(5000 + 500 * m - 0.5, abs=10)
    assert drawn.std().item() == pytest.approx(500 * math.sqrt(1 - m**2), rel=0.02)
    assert ((drawn - drawn.mean()) / drawn.std()).pow(3).mean().item() == pytest.approx(skewness, abs=0.06)


def test_skew_normal_default_looks_at_the_clean_half() -> None:
    drawn = draw("skew_normal", N, 1000, rng()).double()
    assert drawn.mean().item() / 1000 == pytest.approx(0.39, abs=0.02)
    assert drawn.median() < drawn.mean()


def test_as_published_captures_what_the_research_loop_stores() -> None:
    num_steps = 12
    # The loop counts up from the noisy end; after step `counter`, num_steps - counter - 1 steps are left.
    stored = {index: num_steps - index - 1 for index in range(num_steps)}
    captured, label = draw_labelled("as_published", 2000, num_steps, rng())
    assert set(label.tolist()) == set(range(1, num_steps + 1))
    for caught, index in zip(captured.tolist(), (label - 1).tolist(), strict=True):
        assert caught == max(stored[index], 1)


def test_as_published_has_the_known_shares() -> None:
    captured, label = draw_labelled(AsPublished(), N, 250, rng())
    assert (label == 1).double().mean().item() == pytest.approx(0.159, abs=0.01)
    assert (label == 250).double().mean().item() == pytest.approx(0.069, abs=0.01)
    assert (captured > 125).double().mean().item() == pytest.approx(0.59, abs=0.01)


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_every_distribution_is_in_range_repeatable_and_storable(name: str) -> None:
    spread = distribution(name)
    for num_steps in (1, 2, 50):
        first, label = draw_labelled(name, 500, num_steps, rng(3))
        for steps_left in (first, label):
            assert steps_left.dtype == torch.int64 and steps_left.shape == (500,)
            assert steps_left.min() >= 1 and steps_left.max() <= num_steps
        assert torch.equal(first, draw(spread, 500, num_steps, rng(3)))
        assert name == "as_published" or torch.equal(first, label)
    assert from_dict(json.loads(json.dumps(spread.to_dict()))) == spread


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: distribution("normal"), "no distribution 'normal'"),
        (lambda: distribution("ndtc", sigma=1), "ndtc has no 'sigma', only mean, std"),
        (lambda: distribution("uniform", at=1), "uniform has no 'at', only no parameters"),
        (lambda: distribution("ndtc", mean=1.5), "mean=1.5 is not between 0 and 1"),
        (lambda: distribution("ndtc", std="cube"), "std='cube' is not at least 0 or \"sqrt\""),
        (lambda: distribution("ndtc", std=math.nan), "std=nan"),
        (lambda: distribution("single", at=True), "at=True"),
        (lambda: distribution("skew_normal", scale=-1), "scale=-1 is not at least 0"),
        (lambda: distribution("skew_normal", shape="x"), "shape='x' is not a number"),
        (lambda: from_dict({"mean": 0.4}), "no 'name'"),
        (lambda: draw("ndtc", 0, 10, rng()), "num_samples: 0"),
        (lambda: draw("ndtc", 1, 0, rng()), "num_steps: 0"),
        (lambda: draw(Single(), 1, 10, rng(), at=1), "at belongs inside Single"),
    ],
)
def test_errors_are_one_line(call: object, message: str) -> None:
    with pytest.raises(OctavoError) as caught:
        call()  # type: ignore[operator]
    assert message in str(caught.value) and "\n" not in str(caught.value)
