"""Two sets of images compared, end to end but for the network that made them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import fields

import numpy as np
import pytest
import torch

from octavo.errors import OctavoError
from octavo.evaluation.compare import compare
from octavo.evaluation.comparison import Comparison
from octavo.evaluation.digits import DigitFeatures, reference_statistics
from octavo.evaluation.features import extract
from octavo.evaluation.frechet import FeatureStatistics, fd_infinity, frechet_distance
from octavo.evaluation.inception_score import inception_score
from octavo.evaluation.intervals import Estimate
from octavo.evaluation.kernel import polynomial_kernel
from octavo.evaluation.similarity import psnr, ssim

STUDENT = {9: 2.2621572, 19: 2.0930241, 159: 1.9749962}
"""The 97.5 % quantiles of Student's t, from a table."""

Interval = tuple[float, float, float]


def strokes(count: int, seed: int = 0) -> np.ndarray:
    """Float images of bars of random place and strength, something like digits: [N, 16, 16, 1] in [0, 1]."""
    rng = np.random.default_rng(seed)
    images = np.zeros((count, 16, 16, 1), dtype=np.float32)
    for image in images:
        row, column = rng.integers(2, 14, 2)
        image[row - 1 : row + 1] = rng.random()
        image[:, column - 1 : column + 1] = rng.random()
    return images


def noisy(images: np.ndarray, amount: float = 0.1) -> np.ndarray:
    noise = np.random.default_rng(9).normal(0, amount, images.shape)
    return np.clip(images + noise, 0, 1).astype(np.float32)


def eight_bit(images: np.ndarray) -> np.ndarray:
    return (255 * images).round().astype(np.uint8)


@pytest.fixture(scope="module")
def extractor() -> DigitFeatures:
    return DigitFeatures()


@pytest.fixture(scope="module")
def reference() -> np.ndarray:
    return strokes(160)


@pytest.fixture(scope="module")
def paired(extractor: DigitFeatures, reference: np.ndarray) -> Comparison:
    images = noisy(reference)
    return compare(
        eight_bit(images),
        eight_bit(reference),
        extractor=extractor,
        real=reference_statistics()["train"],
        paired=True,
        floats=images,
        reference_floats=reference,
        permutations=200,
        extrapolate=True,
    )


def test_figures_are_those_of_their_own_rooms(extractor, reference, paired: Comparison) -> None:
    images = noisy(reference)
    ours, theirs = extract(extractor, eight_bit(images)), extract(extractor, eight_bit(reference))
    real = reference_statistics()["train"]
    assert paired.fd.value == pytest.approx(frechet_distance(ours.pooled, theirs.pooled), rel=1e-6)
    assert paired.sfd is not None and paired.sfd.value == pytest.approx(
        frechet_distance(ours.spatial, theirs.spatial), rel=1e-6
    )
    assert paired.fd_real is not None and paired.fd_real_reference is not None
    assert paired.fd_real.value == pytest.approx(frechet_distance(ours.pooled, real))
    assert paired.fd_real_difference is not None
    assert paired.fd_real_difference.value == pytest.approx(
        paired.fd_real.value - paired.fd_real_reference.value
    )
    assert paired.psnr is not None and paired.psnr.value == pytest.approx(psnr(images, reference).mean())
    assert paired.p_same == 1 / 201  # noise is always added, so pairs differ
    assert paired.count == 160 and paired.features == "digits"


def by_jackknife(statistic: Callable[[torch.Tensor], float], groups: int = 20) -> Interval:
    """Value and ends by the book (Efron and Tibshirani, eq. 11.5): `statistic` of the rows that stay, of 160."""
    group = torch.arange(160) % groups
    without = np.array([statistic(torch.nonzero(group != g)[:, 0]) for g in range(groups)])
    half = STUDENT[groups - 1] * ((groups - 1) * without.var()) ** 0.5
    value = statistic(torch.arange(160))
    return value, value - half, value + half


def by_mean(values: np.ndarray) -> Interval:
    half = STUDENT[159] * values.astype(float).std(ddof=1) / 160**0.5
    return float(values.mean()), float(values.mean() - half), float(values.mean() + half)


def kid_of_pairs(a: torch.Tensor, b: torch.Tensor) -> float:
    """Gretton et al. 2012, eq. 4: no image with itself, nor with the other of its pair."""
    apart = ~torch.eye(len(a), dtype=torch.bool)
    aa, bb, ab = (polynomial_kernel(x, y)[apart].mean() for x, y in ((a, a), (b, b), (a, b)))
    return float(aa + bb - 2 * ab)


def share_within(points: torch.Tensor, others: torch.Tensor) -> float:
    """Kynkaanniemi et al. 2019, eq. 2: the share of points as near to another as its third neighbour is."""
    points, others = points.double(), others.double()
    radii = torch.cdist(others, others).sort(1).values[:, 3]
    return float((torch.cdist(points, others) <= radii + 1e-9).any(1).double().mean())


def test_every_interval_is_the_one_made_by_hand(extractor, reference, paired: Comparison) -> None:
    """Of which images, cut into which groups, pairs together, to which real data: all that compare() decides."""
    images = noisy(reference)
    ours, theirs = extract(extractor, eight_bit(images)), extract(extractor, eight_bit(reference))
    a, b, real = ours.pooled, theirs.pooled, reference_statistics()["train"]
    assert ours.spatial is not None and theirs.spatial is not None
    assert ours.logits is not None and theirs.logits is not None
    spatial_a, spatial_b, logits_a, logits_b = ours.spatial, theirs.spatial, ours.logits, theirs.logits
    order = np.random.default_rng(0).random((16, 160))

    def infinite(features: torch.Tensor, stay: torch.Tensor) -> float:
        return fd_infinity(features[stay], real, order=order[:, stay.numpy()])

    def difference(stay: torch.Tensor) -> float:
        return frechet_distance(a[stay], real) - frechet_distance(b[stay], real)

    error = by_mean(((images.astype(float) - reference) ** 2).mean((1, 2, 3)))
    pooled_psnr = tuple(-10 * math.log10(error[k]) for k in (0, 2, 1))  # the larger error is the lower end
    expected: dict[str, tuple[float, ...]] = {
        "fd": by_jackknife(lambda stay: frechet_distance(a[stay], b[stay])),
        "sfd": by_jackknife(lambda stay: frechet_distance(spatial_a[stay], spatial_b[stay])),
        "kid": by_jackknife(lambda stay: kid_of_pairs(a[stay], b[stay])),
        "precision": by_jackknife(lambda stay: share_within(a[stay], b[stay])),
        "recall": by_jackknife(lambda stay: share_within(b[stay], a[stay])),
        "inception_score": by_jackknife(lambda stay: inception_score(logits_a[stay])),
        "inception_score_reference": by_jackknife(lambda stay: inception_score(logits_b[stay])),
        "fd_real": by_jackknife(lambda stay: frechet_distance(a[stay], real)),
        "fd_real_reference": by_jackknife(lambda stay: frechet_distance(b[stay], real)),
        "fd_real_difference": by_jackknife(difference),
        "fd_infinity": by_jackknife(lambda stay: infinite(a, stay), groups=10),
        "fd_infinity_reference": by_jackknife(lambda stay: infinite(b, stay), groups=10),
        "psnr": by_mean(psnr(images, reference)),
        "psnr_pooled": pooled_psnr,
        "ssim": by_mean(ssim(images, reference)),
    }
    found = {f.name: getattr(paired, f.name) for f in fields(paired)}
    assert {name for name, value in found.items() if isinstance(value, Estimate)} == expected.keys()
    for name, (value, low, high) in expected.items():
        estimate = found[name]
        assert low < value < high, f"{name}: with no spread, nothing is tested"
        found_widths = estimate.value - estimate.low, estimate.high - estimate.value
        assert estimate.value == pytest.approx(value, rel=1e-5), name
        assert found_widths == pytest.approx((value - low, high - value), rel=1e-3), name


def test_json_and_text(paired: Comparison) -> None:
    record = paired.as_json()
    assert json.loads(json.dumps(record, allow_nan=False)) == record
    assert (record["fd"]["low"], record["fd"]["value"]) == (paired.fd.low, paired.fd.value)
    assert "jackknife" in record["fd"]["method"]
    assert "kid_real" not in record and record["permutations"] == 200
    text = paired.as_text()
    for part in ("160 same-seed pairs", "PSNR, dB", "FD to real", "they differ (p = 0.00498", "note: LPIPS"):
        assert part in text


def test_images_without_floats_are_compared_at_8_bits(extractor, reference, paired: Comparison) -> None:
    images = eight_bit(noisy(reference))
    plain = compare(images, eight_bit(reference), extractor=extractor, paired=True, permutations=9)
    assert plain.psnr is not None and paired.psnr is not None
    assert plain.psnr.value == pytest.approx(paired.psnr.value, abs=0.1) and plain.psnr != paired.psnr
    assert plain.fd_real is None and plain.p_same_real is None and plain.fd_infinity is None


def test_a_set_against_itself(extractor, reference) -> None:
    images = eight_bit(reference)
    same = compare(images, images, extractor=extractor, paired=True, permutations=20)
    assert same.fd.value < 1e-6 and abs(same.kid.value) < 1e-6 and same.p_same == 1
    assert same.psnr is not None and same.psnr.value == math.inf
    assert any("all pairs are equal" in note for note in same.notes)
    json.dumps(same.as_json(), allow_nan=False)
    half = images.copy()
    half[::2] = eight_bit(noisy(reference))[::2]
    some = compare(half, images, extractor=extractor, paired=True, permutations=20)
    assert some.psnr is not None and math.isfinite(some.psnr.value)
    assert any("80 of 160 pairs are equal" in note for note in some.notes)


def test_unpaired_and_of_unequal_number(extractor, reference) -> None:
    others = eight_bit(strokes(200, seed=5))
    result = compare(others, eight_bit(reference), extractor=extractor, paired=False, permutations=99)
    assert result.count == 160 and any("first 160" in note for note in result.notes)
    assert result.psnr is None and result.ssim is None
    assert result.p_same is not None and result.p_same > 0.02  # draws of one distribution
    assert "images on either side" in result.as_text()


def test_real_images_give_every_figure_to_real(extractor, reference) -> None:
    real = extract(extractor, eight_bit(strokes(150, seed=7)))
    images = eight_bit(noisy(reference))
    result = compare(
        images, eight_bit(reference), extractor=extractor, real=real, paired=True, permutations=9
    )
    statistics = FeatureStatistics.of(real.pooled)
    by_statistics = compare(
        images, eight_bit(reference), extractor=extractor, real=statistics, paired=True, permutations=9
    )
    assert result.fd_real == by_statistics.fd_real and by_statistics.kid_real is None
    assert "of their moments alone" in by_statistics.as_text() and "alone" not in result.as_text()
    for name in ("fd", "sfd", "kid", "precision", "recall"):
        ours, theirs = getattr(result, f"{name}_real"), getattr(result, f"{name}_real_reference")
        worse = ours.value < theirs.value if name in ("precision", "recall") else ours.value > theirs.value
        assert worse, name


def test_grey_beside_colour(extractor, reference) -> None:
    grey = eight_bit(reference)[:20]
    colour = np.repeat(grey, 3, axis=-1)
    result = compare(colour, grey, extractor=extractor, paired=True, permutations=9)
    assert result.psnr is not None and result.psnr.value == math.inf


def test_what_cannot_be_compared_is_one_line(extractor, reference) -> None:
    images = eight_bit(reference)
    with pytest.raises(OctavoError, match="too few to compare"):
        compare(images[:7], images, extractor=extractor, paired=False)
    with pytest.raises(OctavoError, match="compare them unpaired"):
        compare(images[:, :8], images, extractor=extractor, paired=True)
    with pytest.raises(OctavoError, match="floats: shape"):
        compare(images, images, extractor=extractor, paired=True, permutations=9, floats=reference[:5])
    few = extract(extractor, images[:7])
    with pytest.raises(OctavoError, match="real: 7 images are too few"):
        compare(images, images, extractor=extractor, real=few, paired=True)
    with pytest.raises(OctavoError, match="reference_images: expected uint8"):
        compare(images, reference, extractor=extractor, paired=True)
