"""What distances to real data are taken to: a user's own images, or statistics that come with the features."""

from __future__ import annotations

from pathlib import Path

from octavo.errors import OctavoError
from octavo.evaluation.compare import FEWEST
from octavo.evaluation.features import NO_FEATURES, Features, extract, load_features, real_statistics
from octavo.evaluation.frechet import FeatureStatistics
from octavo.evaluation.images import read_images


def real_data(
    spec: str, real_images: Path | None, shape: tuple[int, ...]
) -> Features | FeatureStatistics | None:
    """The features, by the extractor `spec`, of `real_images` (.npz or a folder), or statistics that come with it.

    `shape`: (height, width, channels) of the images that are compared; see `real_statistics`. None where there are
    none. Raises `OctavoError` for too few real images, and for any where no features are asked for.
    """
    if spec == NO_FEATURES and real_images is not None:
        raise OctavoError("--real-images: are compared by features; leave out --features none")
    if real_images is None:
        return real_statistics(spec, shape)
    images = read_images(real_images)
    if len(images) < FEWEST:
        raise OctavoError(f"--real-images: {real_images} holds {len(images)}; give at least {FEWEST}")
    return extract(load_features(spec), images)
