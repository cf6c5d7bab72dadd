from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

from octavo.evaluation.inception_score import inception_score, inception_score_estimate


def test_agrees_with_torchmetrics() -> None:
    from torchmetrics.image.inception import InceptionScore

    logits = 3 * torch.randn(200, 10, generator=torch.Generator().manual_seed(0))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns of memory, and of the spread over one split
        theirs = InceptionScore(feature=nn.Identity(), splits=1)
        theirs.update(logits)
        expected = theirs.compute()[0].item()
    assert inception_score(logits) == pytest.approx(expected, rel=1e-5)


def test_ends_of_its_range() -> None:
    assert inception_score(torch.zeros(7, 10)) == pytest.approx(1.0)
    assert inception_score(1e4 * torch.eye(5)) == pytest.approx(5.0)


def test_interval_holds_the_value_and_shrinks() -> None:
    logits = 3 * torch.randn(4000, 10, generator=torch.Generator().manual_seed(0))
    few, many = inception_score_estimate(logits[:200]), inception_score_estimate(logits)
    assert few.low < few.value < few.high
    assert 2 < (few.high - few.low) / (many.high - many.low) < 10
