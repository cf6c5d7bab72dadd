"""The bundled digit classifier: a feature extractor for 16x16 digits, as Inception is for photographs."""

from __future__ import annotations

from importlib.resources import as_file, files
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor, nn

from octavo.errors import OctavoError
from octavo.evaluation.features import Features
from octavo.evaluation.frechet import FeatureStatistics
from octavo.evaluation.images import to_network
from octavo.files import read_json

IMAGE_SIZE = 16
NUM_FEATURES = 64
NUM_CLASSES = 10
SPLITS = ("train", "held_out")

_FOLDER = files("octavo") / "data" / "digits_classifier"


def _block(in_channels: int, out_channels: int, kernel_size: int = 3, stride: int = 1) -> nn.Sequential:
    padding = kernel_size // 2
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.SiLU(),
    )


class DigitClassifier(nn.Module):
    """Three convolutions, one linear layer that makes the features, one that makes the logits.

    N x 1 x 16 x 16, float32 in [-1, 1] => features N x 64, logits N x 10 (both float32).

    The features are taken in front of the last non-linearity: a Frechet distance supposes them
    Gaussian, and rectified ones are far from it. In training mode the batch-norm statistics are
    updated; `load_digit_classifier` returns the network in evaluation mode, where every image is
    treated alone. Raises `OctavoError` for images of another shape.

    >>> features, logits = DigitClassifier().eval()(torch.zeros(2, 1, 16, 16))
    >>> features.shape, logits.shape
    (torch.Size([2, 64]), torch.Size([2, 10]))
    """

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            _block(1, 32, kernel_size=5, stride=2),
            _block(32, 64),
            nn.MaxPool2d(2),
            _block(64, 96),
            nn.Flatten(),
            nn.Dropout(0.3),
            nn.Linear(96 * (IMAGE_SIZE // 4) ** 2, NUM_FEATURES),
        )
        self.head = nn.Sequential(nn.SiLU(), nn.Dropout(0.3), nn.Linear(NUM_FEATURES, NUM_CLASSES))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        if images.ndim != 4 or images.shape[1:] != (1, IMAGE_SIZE, IMAGE_SIZE):
            shape = " x ".join(map(str, images.shape))
            raise OctavoError(f"images: expected N x 1 x {IMAGE_SIZE} x {IMAGE_SIZE}, got {shape}")
        features = self.body(images)
        return features, self.head(features)


class DigitFeatures:
    """The bundled classifier as a feature extractor: uint8 NHWC of any size, 1 or 3 channels => `Features`.

    Images that are not grey 16x16 are made so (`octavo.evaluation.images.to_network`: grey by BT.601, areas averaged).
    pooled [N, 64] and logits [N, 10] are the classifier's; spatial [N, 112] is the first 7 channels of its 4x4 map
    after the pooling, as sFID takes the first 7 of an inner map of Inception.

    >>> DigitFeatures()(np.zeros((3, 32, 32, 3), dtype=np.uint8)).spatial.shape
    torch.Size([3, 112])
    """

    name = "digits"

    def __init__(self) -> None:
        self._classifier = load_digit_classifier()

    @torch.inference_mode()
    def __call__(self, images: NDArray[np.uint8]) -> Features:
        body = self._classifier.body
        inner = body[:3](to_network(images, 1, IMAGE_SIZE, IMAGE_SIZE) * 2 - 1)
        pooled = body[3:](inner)
        return Features(pooled, self._classifier.head(pooled), inner[:, :7].flatten(1))


def load_digit_classifier() -> DigitClassifier:
    """The bundled classifier, in evaluation mode, without gradients, on the CPU in float32.

    Its held-out accuracy is `classifier_record()["held_out_accuracy"]`.

    >>> sum(parameter.numel() for parameter in load_digit_classifier().parameters())
    173930
    """
    classifier = DigitClassifier()
    classifier.load_state_dict(_tensors("classifier.safetensors"))
    return classifier.eval().requires_grad_(False)


def classifier_record() -> dict[str, Any]:
    """How the bundled classifier was made: held-out accuracy, seed, command, versions.

    >>> classifier_record()["held_out_accuracy"] > 0.98
    True
    """
    with as_file(_FOLDER / "classifier.json") as path:
        record: dict[str, Any] = read_json(path)
    return record


def reference_statistics() -> dict[str, FeatureStatistics]:
    """The features' statistics over the real digits of each split: `train` (1,437) and `held_out` (360).

    >>> reference_statistics()["held_out"].count
    360
    """
    stored = _tensors("reference_statistics.safetensors")
    return {
        split: FeatureStatistics(
            mean=stored[f"{split}.mean"],
            covariance=stored[f"{split}.covariance"],
            count=int(stored[f"{split}.count"]),
        )
        for split in SPLITS
    }


def _tensors(name: str) -> dict[str, Tensor]:
    with as_file(_FOLDER / name) as path:
        return load_file(path)
