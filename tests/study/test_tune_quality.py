from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from octavo.evaluation.features import Features
from octavo.evaluation.frechet import FeatureStatistics
from octavo.evaluation.target import Target
from octavo.study.tune_quality import Quality

IMAGES: dict[str, Any] = {"num_images": 6, "seed": 0, "batch_size": 4, "inputs": None}


class Means:
    name = "means"

    def __call__(self, images: Any) -> Features:
        return Features(torch.from_numpy(images.astype(np.float32).mean((1, 2))))


class Spreads:
    name = "spreads"

    def __call__(self, images: Any) -> Features:
        return Features(torch.from_numpy(images.astype(np.float32).std((1, 2))))


def target(mean: float, extractor: Any = Means) -> Target:
    moments = torch.full((3,), mean).double(), torch.eye(3).double()
    return Target(extractor(), FeatureStatistics(*moments, 50))


def test_a_distance_to_other_data_or_in_other_features_is_not_taken_for_one_that_is_known(
    pipeline: Any, tmp_path: Path
) -> None:
    def distance(folder: str, **settings: Any) -> float:
        return Quality("fd", tmp_path / folder, **IMAGES, **settings)(pipeline, 2)

    first = distance("one", target=target(120.0))
    assert distance("one", target=target(5000.0)) == distance("fresh", target=target(5000.0)) != first
    assert distance("one", target=target(120.0, Spreads)) != first
    assert distance("one", target=target(120.0)) == first


def test_decibels_to_another_reference_are_not_taken_for_those_that_are_known(
    pipeline: Any, tmp_path: Path
) -> None:
    def decibels(folder: str, steps: int) -> float:
        return Quality("psnr", tmp_path / folder, reference=(pipeline, steps), **IMAGES)(pipeline, 2)

    first = decibels("one", 4)
    assert decibels("one", 3) == decibels("fresh", 3) != first
    assert decibels("one", 4) == first


def test_the_references_images_are_kept_and_those_of_a_score_are_not(
    pipeline: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Quality("psnr", tmp_path, reference=(pipeline, 3), **IMAGES)(pipeline, 2)
    assert len(list(tmp_path.glob("*/images-*.safetensors"))) == 2
    sampled: list[int] = []
    from octavo.evaluation import shards

    real = shards.sample
    monkeypatch.setattr(
        shards,
        "sample",
        lambda *args, steps, **more: sampled.append(steps) or real(*args, steps=steps, **more),
    )
    Quality("psnr", tmp_path, reference=(pipeline, 3), **IMAGES)(pipeline, 4)
    assert sampled == [4, 4]
