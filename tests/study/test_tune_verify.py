from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from octavo.errors import OctavoError
from octavo.evaluation.features import Features
from octavo.evaluation.frechet import FeatureStatistics
from octavo.evaluation.generate import generate, to_uint8
from octavo.evaluation.target import Target
from octavo.study.tune_options import Goal
from octavo.study.tune_spending import Spending
from octavo.study.tune_verify import VERIFY_STREAM, Verification

STEPS, IMAGES = 8, 24


class Spreads:
    name = "spreads"

    def __call__(self, images: Any) -> Features:
        return Features(torch.from_numpy(images.astype(np.float32).std((1, 2))))


@pytest.fixture(scope="module")
def real(pipeline: Any) -> Target:
    """The reference's own images, so that none is nearer."""
    images = generate(pipeline, IMAGES, steps=STEPS, seed=VERIFY_STREAM, batch_size=8, progress=False)
    return Target(Spreads(), FeatureStatistics.of(Spreads()(to_uint8(images)).pooled))


def verification(goal: str, target: Target, pipeline: Any, folder: Path) -> Verification:
    settings: dict[str, Any] = {"num_images": IMAGES, "seed": 0, "batch_size": 8, "inputs": None}
    reference = (pipeline, STEPS, STEPS)
    return Verification(Goal.of(goal), target, reference, folder, spending=Spending(), **settings)


def test_worse_than_the_reference_beyond_the_interval_is_not_verified(
    pipeline: Any, real: Target, tmp_path: Path
) -> None:
    one = verification("quality=reference", real, pipeline, tmp_path)
    worse, same = one(pipeline, 1, 1), one(pipeline, STEPS, STEPS)
    assert worse["difference"]["low"] > 0 and worse["verified"] is False
    assert same["difference"]["value"] == 0 and same["verified"] is True
    assert worse["difference"]["value"] == pytest.approx(
        worse["fd"]["value"] - worse["fd_reference"]["value"]
    )


def test_a_number_is_held_against_the_distance_and_a_time_promises_none(
    pipeline: Any, real: Target, tmp_path: Path
) -> None:
    told = verification("quality=1e9", real, pipeline, tmp_path)(pipeline, 1, 1)
    assert told["verified"] is True
    asked = told["fd"]["low"]
    for value, verified in ((0.99 * asked, False), (1.01 * asked, True)):
        again = verification(f"quality={value}", real, pipeline, tmp_path)(pipeline, 1, 1)
        assert again["verified"] is verified
    assert verification("latency=1", real, pipeline, tmp_path)(pipeline, 1, 1)["verified"] is None


def test_no_image_is_made_twice(
    pipeline: Any, real: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = verification("latency=1", real, pipeline, tmp_path)(pipeline, 2, 2)
    assert not list(tmp_path.glob("*/images-*")), "features are kept, images are not"
    monkeypatch.setattr("octavo.evaluation.shards.sample", None)
    assert verification("latency=1", real, pipeline, tmp_path)(pipeline, 2, 2) == told
    for path in tmp_path.glob("features-*"):
        path.write_bytes(b"damaged")
    with pytest.raises(OctavoError, match="not readable as features; delete it and start again"):
        verification("latency=1", real, pipeline, tmp_path)(pipeline, 2, 2)
