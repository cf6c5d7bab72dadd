"""The bundled digit classifier: a feature extractor for 16x16 digits, as Inception is for photographs."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.resources import as_file, files
from typing import Any

from safetensors.torch import load_file
from torch import Tensor, nn

from octavo.errors import OctavoError
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

    >>> import torch
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


@dataclass(frozen=True)
class FeatureStatistics:
    """First and second moments of the classifier's features over one split.

    mean: [64] float64. covariance: [64, 64] float64, unbiased (divided by count - 1).
    count: the number of images they were taken over.
    """

    mean: Tensor
    covariance: Tensor
    count: int

    @classmethod
    def of(cls, features: Tensor) -> FeatureStatistics:
        """The statistics of features [N, D], N >= 2, accumulated in float64.

        >>> import torch
        >>> statistics = FeatureStatistics.of(torch.tensor([[0.0], [2.0]]))
        >>> statistics.mean.item(), statistics.covariance.item(), statistics.count
        (1.0, 2.0, 2)
        """
        features = features.double()
        centred = features - features.mean(0)
        return cls(features.mean(0), centred.T @ centred / (len(features) - 1), len(features))


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
