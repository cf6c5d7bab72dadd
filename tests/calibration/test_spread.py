"""A few pairs of many: from all of the trajectory, and evaluated only with what they fit."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import octavo
from octavo.calibration.activation_errors import activation_errors
from octavo.calibration.collect import PairStore
from octavo.calibration.evaluate import rows_at_once
from octavo.calibration.observations import observe
from octavo.calibration.rules import layer_rules
from octavo.calibration.spread import spread
from octavo.diffusion import CalibrationPair, collate


def pair(image: int, steps_left: int, **more: Any) -> CalibrationPair:
    args = {"sample": torch.full((1, 3), 1.0 + image), "timestep": torch.tensor(10 * steps_left), **more}
    rows = {"sample", *(name for name, value in more.items() if torch.is_tensor(value) and len(value) == 1)}
    return CalibrationPair(args, frozenset(rows), 1, image, step=0, steps_left=steps_left)


def store(folder: Path, batches: list[list[CalibrationPair]]) -> PairStore:
    found = PairStore(folder, len(batches))
    for i, batch in enumerate(batches):
        found.save(i, batch)
    return found


def bands(folder: Path, images: int = 16, count: int = 16) -> PairStore:
    """Batches as they are sorted: each of `images` images and one band of steps, from the noisy end."""
    return store(
        folder,
        [
            [pair(images * k + j, count * images - images * k - j) for j in range(images)]
            for k in range(count)
        ],
    )


@pytest.mark.parametrize("wanted", [2, 3, 5, 16, 17, 32, 40])
def test_no_end_is_preferred(wanted: int, tmp_path: Path) -> None:
    """Of each part of the trajectory as many as of any other, and of its two halves too."""
    found = [one.steps_left for at_once in spread(bands(tmp_path), wanted) for one in at_once]
    assert len(set(found)) == len(found) == wanted
    clean = sum(steps_left <= 128 for steps_left in found)
    assert abs(2 * clean - wanted) <= 1
    assert abs(sum(found) / wanted - 128.5) <= 16 + 64 / wanted  # a batch, and a quarter of a part
    parts = [sum(64 * k < steps_left <= 64 * (k + 1) for steps_left in found) for k in range(4)]
    assert max(parts) - min(parts) <= 1


def test_the_places_within_a_batch_differ_from_batch_to_batch(tmp_path: Path) -> None:
    found = [one.image % 16 for at_once in spread(bands(tmp_path), 16) for one in at_once]
    assert len(set(found)) == 16


def test_there_may_be_fewer_pairs_than_are_wanted(tmp_path: Path) -> None:
    few = bands(tmp_path, images=2, count=3)
    assert sum(map(len, spread(few, 100))) == 6


def test_an_evaluation_has_no_more_pairs_than_were_denoised_at_once(tmp_path: Path) -> None:
    found = spread(bands(tmp_path, images=3, count=4), 12)
    assert [len(at_once) for at_once in found] == [3, 3, 3, 3]


def numbers(*shape: int) -> torch.Tensor:
    return torch.linspace(-1, 2, math.prod(shape)).view(shape)


def texts(folder: Path) -> PairStore:
    """Two batches, each padded to its own longest text."""
    return store(
        folder,
        [
            [pair(image, 9 - image, text=numbers(1, 5 + 2 * (image // 4), 2)) for image in images]
            for images in (range(4), range(4, 7))
        ],
    )


def of_frames(folder: Path) -> PairStore:
    """What AnimateDiff hands over: a tensor of rows x frames, which is kept whole; the last batch is shorter."""
    return store(
        folder,
        [
            [pair(image, 9 - image, text=numbers(2 * len(images), 5, 2)) for image in images]
            for images in (range(4), range(4, 7))
        ],
    )


def of_shapes(folder: Path) -> PairStore:
    """What Qwen-Image hands over: a list with an entry for each image."""
    return store(
        folder,
        [
            [pair(image, 9 - image, shapes=[[1, 4, 4]] * len(images)) for image in images]
            for images in (range(4), range(4, 7))
        ],
    )


def of_masks(folder: Path) -> PairStore:
    """What Cosmos hands over: a tensor of one row for all, which a batch of one image takes for its own."""
    full = [pair(image, 9 - image) for image in range(4)]
    for one in full:
        one.args["mask"] = torch.zeros(1, 1)
    return store(folder, [full, [pair(4, 1, mask=torch.zeros(1, 1))]])


@pytest.mark.parametrize("make", [texts, of_frames, of_shapes, of_masks])
@pytest.mark.parametrize("wanted", [2, 4, 32])
def test_what_is_evaluated_together_was_denoised_together_or_fits(
    make: Any, wanted: int, tmp_path: Path
) -> None:
    pairs = make(tmp_path)
    found = spread(pairs, wanted)
    assert sum(map(len, found)) >= min(wanted, sum(map(len, pairs)))
    whole = [[one.image for one in rows] for batch in pairs for rows in rows_at_once(batch)]
    for at_once in found:
        batch = collate(at_once)  # raises where they do not fit
        if make in (of_frames, of_shapes):
            assert [one.image for one in at_once] in whole and len(batch["sample"]) == len(at_once)


@pytest.mark.parametrize("make", [texts, of_frames])
def test_a_network_whose_batches_differ_is_measured_as_it_is_observed(make: Any, tmp_path: Path) -> None:
    """Two layers and four passes: all seven pairs are wanted, of both batches."""

    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(3, 4), nn.Linear(2, 4)

        def forward(self, sample: Any, timestep: Any, text: Any, return_dict: bool = True) -> Any:
            read = self.second(text).mean(1)
            frames = len(read) // len(sample)
            of_frames = self.first(sample).repeat_interleave(frames, 0) * read
            return (of_frames.unflatten(0, (len(sample), frames)).mean(1),)

    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = Reads().eval()
    pairs = make(tmp_path)
    seen = observe(network, pairs, progress=False)
    rules = layer_rules(octavo.PTQ4DM(), ["first", "second"], [])
    errors = activation_errors(network, pairs, rules, seen)
    assert set(errors.layers) == {"first", "second"} and len(errors.bf16) == 7
    assert all(float(own.sum()) > 0 for own in errors.layers.values())
