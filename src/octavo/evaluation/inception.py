"""FID's InceptionV3 as a feature extractor, its weights from a safetensors file that the user has made once."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from octavo.errors import OctavoError
from octavo.evaluation.features import Features, contents_of
from octavo.files import cache_folder

SIZE = 299
NUM_CLASSES = 1008
SPATIAL_CHANNELS = 7


class InceptionFeatures:
    """FID's InceptionV3 as a feature extractor: uint8 NHWC of any size, 1 or 3 channels => `Features`.

    pooled [N, 2048], the average pool (FID, KID, precision and recall); logits [N, 1008] without the last bias (IS);
    spatial [N, 2023], the first 7 channels of the 17x17 map mixed_6/conv (sFID, Nash et al. 2021, 2103.03841). Grey
    is repeated for colour. Images are resized to 299x299 as TensorFlow 1 did it for FID, without half-pixel centres.

    Weights: `weights`, else `$OCTAVO_INCEPTION`, else `inception.safetensors` in the cache folder, in torch-fidelity's
    names; docs/evaluation.md has the command that makes the file. Raises `OctavoError` where it is absent or damaged.
    """

    name = "inception"

    def __init__(self, weights: Path | None = None) -> None:
        chosen = os.environ.get("OCTAVO_INCEPTION", cache_folder() / "inception.safetensors")
        path = weights or Path(chosen).expanduser()
        if not path.is_file():
            raise OctavoError(
                f"{path}: no Inception weights here; make the file by the command under 'Inception weights' in "
                "docs/evaluation.md (it fetches and converts FID's own), or set OCTAVO_INCEPTION to its path; "
                "--features none (of `evaluate` and `report`) does without, and gives PSNR, SSIM and costs"
            )
        self.contents = contents_of(path)
        self._network = FIDInception()
        try:
            # Old checkpoints lack the batch norms' counters, which evaluation does not use.
            counters = {name: value for name, value in self._network.state_dict().items() if value.ndim == 0}
            self._network.load_state_dict({**counters, **load_file(path)})
        except (OSError, RuntimeError, SafetensorError) as error:
            raise OctavoError(
                f"{path}: are not FID's Inception weights ({str(error)[:200]}); make them again"
            ) from error

    @torch.inference_mode()
    def __call__(self, images: NDArray[np.uint8]) -> Features:
        tensor = torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).float()
        parts = [self._network(part) for part in tensor.expand(-1, 3, -1, -1).split(32)]
        pooled, logits, spatial = (torch.cat(list(column)) for column in zip(*parts, strict=True))
        return Features(pooled, logits, spatial)


def resize_like_tensorflow(images: Tensor, size: int = SIZE) -> Tensor:
    """Bilinear NCHW => N C size size, as TensorFlow 1 resized: new pixel i lies at i * old / new, no half pixel.

    >>> resize_like_tensorflow(torch.tensor([[[[0.0, 2.0], [0.0, 2.0]]]]), 4)[0, 0, 0]
    tensor([0., 1., 2., 2.])
    """
    rows, columns = (_bilinear_matrix(old, size) for old in images.shape[-2:])
    return rows @ images @ columns.T


def _bilinear_matrix(old: int, new: int) -> Tensor:
    places = torch.arange(new, dtype=torch.float64) * old / new
    low = places.floor().long()
    share = (places - low).float()
    matrix = torch.zeros(new, old)
    index = torch.arange(new)
    matrix[index, low] += 1 - share
    matrix[index, (low + 1).clamp(max=old - 1)] += share
    return matrix


class FIDInception(nn.Module):
    """The InceptionV3 that FID is measured by: TensorFlow's 2015 network, which differs from torchvision's.

    N x 3 x H x W float32 in [0, 255] => pooled [N, 2048], logits [N, 1008] without bias, spatial [N, 2023].
    Its average pools leave the padding out, and its last block pools by maximum. Sources: Szegedy et al. 2015
    (1512.00567); the names of the state are torch-fidelity's, so that its converted weights load.
    """

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = _Conv(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = _Conv(32, 32, 3)
        self.Conv2d_2b_3x3 = _Conv(32, 64, 3, padding=1)
        self.Conv2d_3b_1x1 = _Conv(64, 80, 1)
        self.Conv2d_4a_3x3 = _Conv(80, 192, 3)
        self.Mixed_5b = _BlockA(192, 32)
        self.Mixed_5c = _BlockA(256, 64)
        self.Mixed_5d = _BlockA(288, 64)
        self.Mixed_6a = _BlockB(288)
        self.Mixed_6b = _BlockC(768, 128)
        self.Mixed_6c = _BlockC(768, 160)
        self.Mixed_6d = _BlockC(768, 160)
        self.Mixed_6e = _BlockC(768, 192)
        self.Mixed_7a = _BlockD(768)
        self.Mixed_7b = _BlockE(1280, pool_by_maximum=False)
        self.Mixed_7c = _BlockE(2048, pool_by_maximum=True)
        self.fc = nn.Linear(2048, NUM_CLASSES)
        self.eval().requires_grad_(False)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = (resize_like_tensorflow(images) - 128) / 128
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = F.max_pool2d(x, 3, stride=2)
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x))
        x = F.max_pool2d(x, 3, stride=2)
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x)))
        x = self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))
        spatial = self.Mixed_6d.branch1x1(x)[:, :SPATIAL_CHANNELS].flatten(1)
        x = self.Mixed_6e(self.Mixed_6d(x))
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x)))
        pooled = x.mean((2, 3))
        return pooled, pooled @ self.fc.weight.T, spatial


class _Conv(nn.Module):
    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: int | tuple[int, int],
        stride: int = 1,
        padding: int | tuple[int, int] = 0,
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(out_channels, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


def _average(x: Tensor) -> Tensor:
    return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


class _BlockA(nn.Module):
    def __init__(self, channels: int, pool_features: int) -> None:
        super().__init__()
        self.branch1x1 = _Conv(channels, 64, 1)
        self.branch5x5_1 = _Conv(channels, 48, 1)
        self.branch5x5_2 = _Conv(48, 64, 5, padding=2)
        self.branch3x3dbl_1 = _Conv(channels, 64, 1)
        self.branch3x3dbl_2 = _Conv(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = _Conv(96, 96, 3, padding=1)
        self.branch_pool = _Conv(channels, pool_features, 1)

    def forward(self, x: Tensor) -> Tensor:
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        five = self.branch5x5_2(self.branch5x5_1(x))
        return torch.cat([self.branch1x1(x), five, double, self.branch_pool(_average(x))], 1)


class _BlockB(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.branch3x3 = _Conv(channels, 384, 3, stride=2)
        self.branch3x3dbl_1 = _Conv(channels, 64, 1)
        self.branch3x3dbl_2 = _Conv(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = _Conv(96, 96, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch3x3(x), double, F.max_pool2d(x, 3, stride=2)], 1)


class _BlockC(nn.Module):
    def __init__(self, channels: int, inner: int) -> None:
        super().__init__()
        wide, tall = (1, 7), (7, 1)
        self.branch1x1 = _Conv(channels, 192, 1)
        self.branch7x7_1 = _Conv(channels, inner, 1)
        self.branch7x7_2 = _Conv(inner, inner, wide, padding=(0, 3))
        self.branch7x7_3 = _Conv(inner, 192, tall, padding=(3, 0))
        self.branch7x7dbl_1 = _Conv(channels, inner, 1)
        self.branch7x7dbl_2 = _Conv(inner, inner, tall, padding=(3, 0))
        self.branch7x7dbl_3 = _Conv(inner, inner, wide, padding=(0, 3))
        self.branch7x7dbl_4 = _Conv(inner, inner, tall, padding=(3, 0))
        self.branch7x7dbl_5 = _Conv(inner, 192, wide, padding=(0, 3))
        self.branch_pool = _Conv(channels, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        single = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        double = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        double = self.branch7x7dbl_5(self.branch7x7dbl_4(double))
        return torch.cat([self.branch1x1(x), single, double, self.branch_pool(_average(x))], 1)


class _BlockD(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.branch3x3_1 = _Conv(channels, 192, 1)
        self.branch3x3_2 = _Conv(192, 320, 3, stride=2)
        self.branch7x7x3_1 = _Conv(channels, 192, 1)
        self.branch7x7x3_2 = _Conv(192, 192, (1, 7), padding=(0, 3))
        self.branch7x7x3_3 = _Conv(192, 192, (7, 1), padding=(3, 0))
        self.branch7x7x3_4 = _Conv(192, 192, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        three = self.branch3x3_2(self.branch3x3_1(x))
        seven = self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(x)))
        return torch.cat([three, self.branch7x7x3_4(seven), F.max_pool2d(x, 3, stride=2)], 1)


class _BlockE(nn.Module):
    def __init__(self, channels: int, pool_by_maximum: bool) -> None:
        super().__init__()
        self.pool_by_maximum = pool_by_maximum
        self.branch1x1 = _Conv(channels, 320, 1)
        self.branch3x3_1 = _Conv(channels, 384, 1)
        self.branch3x3_2a = _Conv(384, 384, (1, 3), padding=(0, 1))
        self.branch3x3_2b = _Conv(384, 384, (3, 1), padding=(1, 0))
        self.branch3x3dbl_1 = _Conv(channels, 448, 1)
        self.branch3x3dbl_2 = _Conv(448, 384, 3, padding=1)
        self.branch3x3dbl_3a = _Conv(384, 384, (1, 3), padding=(0, 1))
        self.branch3x3dbl_3b = _Conv(384, 384, (3, 1), padding=(1, 0))
        self.branch_pool = _Conv(channels, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        single = self.branch3x3_1(x)
        double = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        pool = F.max_pool2d(x, 3, stride=1, padding=1) if self.pool_by_maximum else _average(x)
        return torch.cat(
            [
                self.branch1x1(x),
                *(self.branch3x3_2a(single), self.branch3x3_2b(single)),
                *(self.branch3x3dbl_3a(double), self.branch3x3dbl_3b(double)),
                self.branch_pool(pool),
            ],
            1,
        )
