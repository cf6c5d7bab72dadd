"""LPIPS: the perceptual distance of same-seed images, where its weights are at hand."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from octavo.errors import OctavoError
from octavo.evaluation.generate import Images
from octavo.files import cache_folder

SMALLEST = 32  # pixels a side: AlexNet's second pooling has nothing left below
MEAN, SPREAD = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)  # the shift and scale of images in [-1, 1]


def lpips(images: Images, reference: Images, weights: Path | None = None) -> NDArray[np.float64] | str:
    """LPIPS (AlexNet) of each image, float64 [N], 0 for equal images; or one line that says why there is none.

    Both float [N, height, width, 1 or 3] in [0, 1], 32 pixels a side or more. `weights`: a safetensors file, else
    `$OCTAVO_LPIPS`, else `lpips.safetensors` in the cache folder; docs/evaluation.md has the command that makes one.
    Source: Zhang et al. 2018 (1801.03924), eq. 1. Raises `OctavoError` if the shapes differ or the file is damaged.
    """
    if images.shape != reference.shape:
        raise OctavoError(f"images: shape {images.shape} differs from the reference's {reference.shape}")
    if min(images.shape[1:3]) < SMALLEST:
        return f"images have fewer than {SMALLEST} pixels a side"
    path = weights or Path(os.environ.get("OCTAVO_LPIPS", cache_folder() / "lpips.safetensors")).expanduser()
    if not path.is_file():
        return f"no weights at {path} (docs/evaluation.md says how to make them)"
    network = LPIPS()
    try:
        network.load_state_dict(load_file(path))
    except (OSError, RuntimeError, SafetensorError) as error:
        raise OctavoError(f"{path}: are not LPIPS weights ({str(error)[:200]}); make them again") from error
    values = []
    with torch.inference_mode():
        for first in range(0, len(images), 64):
            ours, theirs = (_prepared(array[first : first + 64]) for array in (images, reference))
            values.append(network(ours, theirs).double())
    return torch.cat(values).numpy()


class LPIPS(nn.Module):
    """Five layers of AlexNet, and five weights per channel: NCHW in [-1, 1], two sets => float32 [N].

        d(x, y) = sum_l mean_hw sum_c w_lc (x_lchw - y_lchw)^2,   features scaled to length 1 over the channels

    State: `net.{0,3,6,8,10}.{weight,bias}` as in torchvision's `alexnet().features`, `lin.{0..4}` [C].
    """

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            *[nn.Conv2d(3, 64, 11, stride=4, padding=2), nn.ReLU(), nn.MaxPool2d(3, stride=2)],
            *[nn.Conv2d(64, 192, 5, padding=2), nn.ReLU(), nn.MaxPool2d(3, stride=2)],
            *[nn.Conv2d(192, 384, 3, padding=1), nn.ReLU()],
            *[nn.Conv2d(384, 256, 3, padding=1), nn.ReLU()],
            *[nn.Conv2d(256, 256, 3, padding=1), nn.ReLU()],
        )
        self.lin = nn.ParameterList([nn.Parameter(torch.zeros(size)) for size in (64, 192, 384, 256, 256)])
        self.eval().requires_grad_(False)

    def forward(self, images: Tensor, reference: Tensor) -> Tensor:
        ours, theirs = self._shifted(images), self._shifted(reference)
        total = torch.zeros(len(images))
        weights = iter(self.lin)
        for layer in self.net:
            ours, theirs = layer(ours), layer(theirs)
            if isinstance(layer, nn.ReLU):
                apart = (_unit(ours) - _unit(theirs)).square()
                total = total + (next(weights).view(1, -1, 1, 1) * apart).sum(1).mean((1, 2))
        return total

    def _shifted(self, images: Tensor) -> Tensor:
        return (images - torch.tensor(MEAN).view(1, 3, 1, 1)) / torch.tensor(SPREAD).view(1, 3, 1, 1)


def _unit(features: Tensor) -> Tensor:
    """Length 1 over the channels, up to what keeps 0 at 0."""
    return features / (features.square().sum(1, keepdim=True) + 1e-8).sqrt()


def _prepared(images: Images) -> Tensor:
    tensor = torch.from_numpy(images.astype(np.float32)).permute(0, 3, 1, 2) * 2 - 1
    return tensor.expand(-1, 3, -1, -1)
