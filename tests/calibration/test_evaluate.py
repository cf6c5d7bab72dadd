from __future__ import annotations

from typing import Any

import torch
from torch import nn

from octavo.calibration.evaluate import evaluate, rows_at_once
from octavo.diffusion import CalibrationPair


class Seen(nn.Module):
    """Notes the samples of each call. It has no parameters: a quantized network without biases has none either."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("anything", torch.zeros(1))
        self.calls: list[list[float]] = []

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor, return_dict: bool) -> tuple[Any, ...]:
        assert not return_dict and len(sample) == len(timestep)
        self.calls.append(sample.flatten().tolist())
        return (sample,)


def batch(images: list[int], first: int = 0) -> list[CalibrationPair]:
    cut = frozenset({"sample"})
    return [
        CalibrationPair({"sample": torch.full((1, 1), float(first + i)), "timestep": i}, cut, 1, image, 0, 1)
        for i, image in enumerate(images)
    ]


def test_no_more_rows_at_once_than_images_were_denoised_at_once() -> None:
    pairs = batch([3, 3, 5, 5, 5, 8])
    assert list(rows_at_once(pairs)) == [pairs[:3], pairs[3:]]
    network = Seen()
    evaluate(network, [pairs, batch([1, 2], first=6)])
    assert network.calls == [[0, 1, 2], [3, 4, 5], [6, 7]]


def test_every_nth_evaluation_is_counted_across_batches() -> None:
    network = Seen()
    evaluate(network, (batch([0, 0, 0], first=3 * i) for i in range(3)), every=4)
    assert network.calls == [[0], [4], [8]]


def test_pairs_that_do_not_fit_into_one_batch_are_evaluated_apart() -> None:
    """Guidance by two calls at each step: image 0 with its prompt, with the negative one, image 1 likewise."""
    cut = frozenset({"text"})
    pairs = [
        CalibrationPair({"text": torch.zeros(1, length), "timestep": 1}, cut, 1, image, 0, 1)
        for image in (0, 1)
        for length in (5, 2)
    ]
    assert list(rows_at_once(pairs)) == [pairs[::2], pairs[1::2]]
    flags = [
        CalibrationPair({"text": torch.zeros(1, 2), "unguided": k % 2 == 0}, cut, 1, k // 2, 0, 1)
        for k in range(4)
    ]
    assert list(rows_at_once(flags)) == [flags[::2], flags[1::2]]
