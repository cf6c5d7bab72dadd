"""What Frechet distances are taken of and to: features, and the statistics of real data in them, or of none."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from octavo.evaluation.features import (
    FeatureExtractor,
    Features,
    default_features,
    identity,
    load_features,
)
from octavo.evaluation.frechet import FeatureStatistics
from octavo.evaluation.real_data import real_data
from octavo.work import digest_value


@dataclass(frozen=True)
class Target:
    """What Frechet distances are taken of and to; `of_model`: to the model's own images in many steps."""

    extractor: FeatureExtractor
    statistics: FeatureStatistics | None

    @property
    def of_model(self) -> bool:
        return self.statistics is None

    @property
    def name(self) -> str:
        """The features' identity, and SHA-256 (16 hex digits) of the moments distances are taken to, or "of model".

        Raises `OctavoError` for moments that are no tensors.
        """
        if self.statistics is None:
            return f"{identity(self.extractor)} of model"
        digest = hashlib.sha256()
        digest_value(digest, vars(self.statistics), "target")
        return f"{identity(self.extractor)} {digest.hexdigest()[:16]}"

    @classmethod
    def of(
        cls, features: str | None = None, real_images: Path | None = None, shape: tuple[int, ...] = (0, 0, 0)
    ) -> Target:
        """Features by name, or those that fit images of `shape` (height, width, channels), and statistics of real data.

        Raises `OctavoError` for features that are not at hand, or too few real images.
        """
        spec = features or default_features(shape)
        extractor = load_features(spec)
        real = real_data(spec, real_images, shape)
        return cls(extractor, FeatureStatistics.of(real.pooled) if isinstance(real, Features) else real)
