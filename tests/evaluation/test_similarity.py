from __future__ import annotations

import math

import numpy as np
import pytest

from octavo.errors import OctavoError
from octavo.evaluation.similarity import pooled_psnr, psnr, ssim


def pair(size: int = 16, channels: int = 3) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    reference = rng.random((5, size, size, channels)).astype(np.float32)
    return np.clip(reference + rng.normal(0, 0.1, reference.shape), 0, 1).astype(np.float32), reference


def test_ssim_by_the_formula() -> None:
    """Wang et al.'s formula at every pixel of images whose border is reflected."""
    images, reference = pair(13, 1)
    weights = np.exp(-(np.arange(-5, 6) ** 2) / (2 * 1.5**2))
    window = np.outer(weights, weights) / weights.sum() ** 2

    def mean(values: np.ndarray) -> np.ndarray:
        around = np.lib.stride_tricks.sliding_window_view(np.pad(values, 5, mode="reflect"), (11, 11))
        return (around * window).sum((2, 3))

    x, y = images[0, ..., 0].astype(float), reference[0, ..., 0].astype(float)
    var_x, var_y, both = (
        mean(x * x) - mean(x) ** 2,
        mean(y * y) - mean(y) ** 2,
        mean(x * y) - mean(x) * mean(y),
    )
    expected = (2 * mean(x) * mean(y) + 1e-4) * (2 * both + 9e-4)
    expected /= (mean(x) ** 2 + mean(y) ** 2 + 1e-4) * (var_x + var_y + 9e-4)
    assert ssim(images, reference)[0] == pytest.approx(expected.mean(), rel=1e-4)


def test_ssim_is_per_image_in_order_whatever_the_batch() -> None:
    images, reference = pair()
    images[2] = reference[2]
    values = ssim(images, reference)
    assert (
        values.shape == (5,) and values[2] == pytest.approx(1, abs=1e-6) and values[[0, 1, 3, 4]].max() < 0.99
    )
    many = ssim(np.tile(images, (20, 1, 1, 1)), np.tile(reference, (20, 1, 1, 1)))
    np.testing.assert_allclose(many, np.tile(values, 20), rtol=1e-5)
    assert ssim(images[:1], reference[:1]).shape == (1,)


def test_ssim_of_what_it_cannot_take() -> None:
    images, reference = pair()
    with pytest.raises(OctavoError, match="shape"):
        ssim(images[:2], reference)
    with pytest.raises(OctavoError, match="pixels a side"):
        ssim(images[:, :4], reference[:, :4])


def test_pooled_psnr_is_of_the_mean_error() -> None:
    images, reference = pair()
    pooled = pooled_psnr(images, reference)
    errors = (images.astype(float) - reference.astype(float)) ** 2
    assert pooled.value == pytest.approx(10 * math.log10(1 / errors.mean()))
    assert pooled.low < pooled.value < pooled.high
    assert pooled.value <= psnr(images, reference).mean()  # Jensen


def test_pooled_psnr_of_equal_images_and_of_one_bad_one() -> None:
    images, reference = pair()
    assert pooled_psnr(reference, reference).value == math.inf
    images[1:] = reference[1:]
    one_bad = pooled_psnr(images, reference)
    assert math.isfinite(one_bad.value) and math.isfinite(one_bad.low) and one_bad.high == math.inf


def test_a_torchmetrics_that_cannot_be_imported_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """As beside a torch-fidelity whose torchvision is missing."""
    import sys

    monkeypatch.setitem(sys.modules, "torchmetrics.functional.image", None)
    with pytest.raises(OctavoError, match="torchmetrics: cannot be imported"):
        ssim(*pair())
