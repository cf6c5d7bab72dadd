"""How far same-seed images of two pipelines are apart."""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray

from octavo.errors import OctavoError
from octavo.evaluation.generate import Images
from octavo.evaluation.intervals import Estimate, mean_estimate

SMALLEST_SSIM = 6  # pixels: the window's margin of 5 is filled by reflection


def psnr(images: Images, reference: Images) -> NDArray[np.float64]:
    """Peak signal-to-noise ratio of each image in dB: 10 log10(1 / mean squared error), peak 1. float64 [N].

    Both float [N, height, width, channels] in [0, 1]; image k of one against image k of the other. Equal images give
    infinity. Raises `OctavoError` if the shapes differ.

    >>> black = np.zeros((1, 2, 2, 1), dtype=np.float32)
    >>> psnr(black + 0.1, black).round(3)
    array([20.])
    """
    with np.errstate(divide="ignore"):
        decibels: NDArray[np.float64] = -10 * np.log10(mean_squared_error(images, reference))
    return decibels


def mean_squared_error(images: Images, reference: Images) -> NDArray[np.float64]:
    """The mean squared error of each image, float64 [N]. Inputs and errors as for `psnr`."""
    if images.shape != reference.shape:
        raise OctavoError(f"images: shape {images.shape} differs from the reference's {reference.shape}")
    errors = (images.astype(np.float64) - reference.astype(np.float64)) ** 2
    means: NDArray[np.float64] = errors.reshape(len(errors), -1).mean(axis=1)
    return means


def pooled_psnr(images: Images, reference: Images) -> Estimate:
    """The PSNR of all images as one: 10 log10(1 / mean squared error over all), in dB.

    The interval is the t-interval of the images' mean squared errors, carried over: bad images weigh by how bad they
    are, where the mean of PSNRs hides them. Infinite if all pairs are equal; the upper end is infinite if the error's
    interval reaches 0.

    >>> black = np.zeros((2, 2, 2, 1), dtype=np.float32)
    >>> pooled_psnr(black + 0.1, black).value.__round__(3)
    20.0
    """
    error = mean_estimate(mean_squared_error(images, reference))

    def decibels(squared: float) -> float:
        return math.inf if squared <= 0 else -10 * math.log10(squared) if math.isfinite(squared) else math.nan

    return Estimate(
        decibels(error.value), decibels(error.high), decibels(error.low), f"{error.method} of squared errors"
    )


def ssim(images: Images, reference: Images) -> NDArray[np.float32]:
    """Structural similarity of each image, at most 1, float32 [N]; inputs as for `psnr`.

    By torchmetrics: Gaussian window of 11 pixels, sigma 1.5, k 0.01 and 0.03, range 1, borders filled by reflection.
    Source: Wang et al. 2004. Raises `OctavoError` if the shapes differ or a side has fewer than 6 pixels.

    >>> grey = np.full((1, 8, 8, 1), 0.5, dtype=np.float32)
    >>> ssim(grey, grey)
    array([1.], dtype=float32)
    """
    if images.shape != reference.shape:
        raise OctavoError(f"images: shape {images.shape} differs from the reference's {reference.shape}")
    if min(images.shape[1:3]) < SMALLEST_SSIM:
        raise OctavoError(f"images: SSIM needs {SMALLEST_SSIM} pixels a side, got {images.shape[1:3]}")
    try:
        from torchmetrics.functional.image import structural_similarity_index_measure
    except (ImportError, RuntimeError) as error:  # as it is beside a torch-fidelity without its torchvision
        raise OctavoError(
            f"torchmetrics: cannot be imported ({error}); install a torchvision that fits this torch, or remove "
            "torch-fidelity"
        ) from error
    values = []
    for first in range(0, len(images), 64):
        ours, theirs = (_nchw(array[first : first + 64]) for array in (images, reference))
        values.append(structural_similarity_index_measure(ours, theirs, data_range=1.0, reduction="none"))
    return torch.cat([torch.atleast_1d(value) for value in values]).numpy()


def _nchw(images: Images) -> torch.Tensor:
    return torch.from_numpy(images.astype(np.float32)).permute(0, 3, 1, 2).contiguous()
