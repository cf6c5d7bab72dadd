"""What a network sees in images: the features that every distance between sets of images is taken of."""

from __future__ import annotations

import glob
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from octavo.errors import OctavoError

if TYPE_CHECKING:
    from octavo.evaluation.frechet import FeatureStatistics

GRAPH_SUFFIXES = (".xml", ".onnx")
NO_FEATURES = "none"


@dataclass(frozen=True)
class Features:
    """Features of N images, rows in the images' order, float32 on the CPU.

    pooled: [N, D], what Frechet and kernel distances, precision and recall are taken of.
    logits: [N, C], what the inception score is taken of; None where the network has no classes.
    spatial: [N, S], a flattened inner map, what the spatial Frechet distance (sFD) is taken of; None where there is
    none.
    """

    pooled: Tensor
    logits: Tensor | None = None
    spatial: Tensor | None = None

    def __len__(self) -> int:
        return len(self.pooled)

    def __getitem__(self, rows: slice) -> Features:
        """The features of some of the images."""
        logits = None if self.logits is None else self.logits[rows]
        spatial = None if self.spatial is None else self.spatial[rows]
        return Features(self.pooled[rows], logits, spatial)


class FeatureExtractor(Protocol):
    """One batch of images, uint8 NHWC, to its `Features`; each image is treated alone.

    `name` is for people. One that reads files has `contents` besides, by which what is kept of it is told (`identity`).
    """

    name: str

    def __call__(self, images: NDArray[np.uint8]) -> Features: ...


def identity(extractor: FeatureExtractor) -> str:
    """The extractor's name and the contents of its files: two of one identity give the same features."""
    return f"{extractor.name} {getattr(extractor, 'contents', '')}".strip()


def contents_of(path: Path) -> str:
    """SHA-256 (16 hex digits) of a network's file; of a graph's with those beside it, where its weights may lie."""
    digest = hashlib.sha256()
    graph = path.suffix in GRAPH_SUFFIXES
    for file in sorted(path.parent.glob(f"{glob.escape(path.stem)}.*")) if graph else [path]:
        digest.update(file.name.encode())
        with file.open("rb") as opened:
            digest.update(hashlib.file_digest(opened, "sha256").digest())
    return digest.hexdigest()[:16]


def load_features(spec: str) -> FeatureExtractor:
    """The feature extractor that `spec` names.

    "digits": the bundled classifier of 16x16 grey digits; other images are made grey and resized for it.
    "inception": FID's InceptionV3, its weights from a safetensors file (see `octavo.evaluation.inception`).
    Else a path of a network as OpenVINO IR (.xml) or ONNX, see `octavo.evaluation.graph_features`.

    Nothing is fetched, and nothing that is loaded can run code of its own. Raises `OctavoError` for another name, or
    weights that are not at hand, in one line that says how to get them.

    >>> load_features("digits")(np.zeros((2, 16, 16, 1), dtype=np.uint8)).pooled.shape
    torch.Size([2, 64])
    """
    if spec == "digits":
        from octavo.evaluation.digits import DigitFeatures

        return DigitFeatures()
    if spec == "inception":
        from octavo.evaluation.inception import InceptionFeatures

        return InceptionFeatures()
    if spec.endswith(GRAPH_SUFFIXES):
        from octavo.evaluation.graph_features import GraphFeatures

        return GraphFeatures(Path(spec))
    raise OctavoError(f"features: {spec!r} is not digits, inception, or a path of an .xml or .onnx network")


def chosen_features(spec: str) -> FeatureExtractor | None:
    """`load_features`, or None for "none": images are compared as pairs alone.

    >>> chosen_features("none") is None
    True
    """
    return None if spec == NO_FEATURES else load_features(spec)


def default_features(shape: tuple[int, ...]) -> str:
    """The features that fit images of this (height, width, channels).

    >>> default_features((16, 16, 1)), default_features((32, 32, 3))
    ('digits', 'inception')
    """
    from octavo.evaluation.digits import IMAGE_SIZE

    return "digits" if shape == (IMAGE_SIZE, IMAGE_SIZE, 1) else "inception"


def real_statistics(spec: str, shape: tuple[int, ...] | None = None) -> FeatureStatistics | None:
    """The statistics of real data that come with a feature extractor, or None where there are none.

    "digits": the 1,437 real digits that the bundled diffusion model was trained on. `shape`: (height, width, channels)
    of the images that will be compared with them; None for images of another kind, whose distance to digits says
    nothing.

    >>> real_statistics("digits").count
    1437
    >>> real_statistics("digits", (32, 32, 3)) is None
    True
    """
    if spec != "digits":
        return None
    from octavo.evaluation.digits import IMAGE_SIZE, reference_statistics

    if shape is not None and shape != (IMAGE_SIZE, IMAGE_SIZE, 1):
        return None
    return reference_statistics()["train"]


def extract(
    extractor: FeatureExtractor, images: NDArray[np.uint8], batch_size: int = 256, progress: bool = False
) -> Features:
    """The features of all images, uint8 [N, height, width, channels], batch by batch.

    Raises `OctavoError` for images that are not uint8 NHWC with 1 or 3 channels.
    """
    check_images(images)
    if batch_size < 1:
        raise OctavoError(f"batch_size: {batch_size} is not at least 1")
    starts = range(0, len(images), batch_size)
    bar = tqdm(starts, desc=extractor.name, unit="batch", disable=not progress)
    with torch.inference_mode():
        batches = [extractor(images[start : start + batch_size]) for start in bar]
    return Features(
        pooled=torch.cat([batch.pooled for batch in batches]),
        logits=_joined([batch.logits for batch in batches]),
        spatial=_joined([batch.spatial for batch in batches]),
    )


def check_images(images: NDArray[np.uint8], name: str = "images") -> None:
    """Raise `OctavoError` unless `images` is uint8 [N >= 1, height, width, 1 or 3]."""
    if images.ndim != 4 or images.shape[-1] not in (1, 3) or 0 in images.shape or images.dtype != np.uint8:
        shape = " x ".join(map(str, images.shape))
        raise OctavoError(
            f"{name}: expected uint8, N x height x width x 1 or 3 channels, got {images.dtype} {shape}"
        )


def _joined(parts: Sequence[Tensor | None]) -> Tensor | None:
    tensors = [part for part in parts if part is not None]
    return torch.cat(tensors) if tensors else None
