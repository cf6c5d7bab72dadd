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
