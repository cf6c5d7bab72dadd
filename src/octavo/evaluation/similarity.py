"""How far same-seed images of two pipelines are apart."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from octavo.errors import OctavoError
from octavo.evaluation.generate import Images


def psnr(images: Images, reference: Images) -> NDArray[np.float64]:
    """Peak signal-to-noise ratio of each image in dB: 10 log10(1 / mean squared error), peak 1. float64 [N].

    Both float [N, height, width, channels] in [0, 1]; image k of one against image k of the other. Equal images give
    infinity. Raises `OctavoError` if the shapes differ.

    >>> black = np.zeros((1, 2, 2, 1), dtype=np.float32)
    >>> psnr(black + 0.1, black).round(3)
    array([20.])
    """
    if images.shape != reference.shape:
        raise OctavoError(f"images: shape {images.shape} differs from the reference's {reference.shape}")
    errors = (images.astype(np.float64) - reference.astype(np.float64)) ** 2
    with np.errstate(divide="ignore"):
        decibels: NDArray[np.float64] = -10 * np.log10(errors.reshape(len(errors), -1).mean(axis=1))
    return decibels


def mean_interval(values: NDArray[np.float64]) -> tuple[float, float]:
    """Mean and half-width of its 95 % interval, 1.96 standard errors (normal approximation).

    >>> mean_interval(np.array([1.0, 1.0, 1.0]))
    (1.0, 0.0)
    """
    spread = values.std(ddof=1) / np.sqrt(len(values)) if len(values) > 1 else 0.0
    return float(values.mean()), float(1.96 * spread)
