"""Scales of groups: whole multiples of their channel's, small enough for int8, and as good as brute force finds."""

from __future__ import annotations

import itertools

import pytest
import torch

from octavo.errors import OctavoError
from octavo.quantization import METRICS, QParams, QuantSpec, quantize, search_values
from octavo.quantization.groups import (
    LARGEST,
    check_multipliers,
    column_scale,
    divide,
    most_multiplier,
    multiply,
    search_groups,
)
from octavo.quantization.rounding import round_nearest

CHANNELS = QuantSpec(4, granularity="per_channel", narrow=True)


def groups(size: int, bits: int = 4, narrow: bool = True) -> QuantSpec:
    return QuantSpec(bits, granularity="per_group", narrow=narrow, group_size=size)


def uneven(shape: tuple[int, ...], size: int, generator: torch.Generator) -> torch.Tensor:
    """A weight whose groups differ in size by up to e^2."""
    weight = torch.randn(shape, generator=generator)
    rows = weight.view(shape[0], -1)
    for first in range(0, rows.shape[1], size):
        rows[:, first : first + size] *= (2 * torch.rand(shape[0], 1, generator=generator)).exp()
    return weight


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(("shape", "size"), [((6, 64), 16), ((5, 8, 3, 3), 16), ((3, 10), 64), ((4, 7), 2)])
def test_what_executes_fits_the_kernels_and_is_a_multiple(
    shape: tuple[int, ...], size: int, metric: str, generator: torch.Generator
) -> None:
    weight = uneven(shape, size, generator)
    integers, qparams = round_nearest(weight, groups(size), metric)
    columns = weight[0].numel()
    assert integers.dtype == torch.int8 and integers.shape == weight.shape
    assert int(integers.abs().max()) <= LARGEST
    assert qparams.scale.shape == shape[:1] and qparams.multiplier is not None
    assert qparams.multiplier.shape == (shape[0], -(-columns // size))
    for c, k in itertools.product(range(shape[0]), range(columns)):
        m = int(qparams.multiplier[c, k // size])
        assert m >= 1 and int(integers.view(shape[0], -1)[c, k]) % m == 0
        assert abs(int(integers.view(shape[0], -1)[c, k]) // m) <= 7


@pytest.mark.parametrize("metric", ["mse", "l1", "cosine"])
def test_uneven_groups_are_nearer_than_a_scale_for_the_channel(
    metric: str, generator: torch.Generator
) -> None:
    weight = uneven((16, 16, 3, 3), 24, generator)
    errors = []
    for spec in (groups(24), CHANNELS):
        integers, qparams = round_nearest(weight, spec, metric)
        sim = integers.flatten(1) * qparams.scale[:, None]
        errors.append(METRICS[metric].distance(weight.flatten(1), sim))  # type: ignore[misc]
    assert bool((errors[0] < errors[1]).all())
    assert float(errors[0].sum()) < 0.7 * float(errors[1].sum())


def test_as_good_as_every_base_scale_with_every_multiplier(generator: torch.Generator) -> None:
    """Three groups, 400 base scales, all 9^3 multipliers: what rounding the wanted scales to multiples can lose."""
    size, excess = 8, []
    for row in uneven((6, 3 * size), size, generator):
        ours, qparams = round_nearest(row[None], groups(size))
        error = float((row - ours[0] * qparams.scale).abs().pow(2.4).sum())
        parts = row.view(3, size)
        best = float("inf")
        top = float(row.abs().max()) / 7
        for i in range(400):
            base = top / 12 ** (i / 399)
            step = base * torch.arange(1, 10).view(-1, 1, 1)
            losses = (((parts / step).round().clamp(-7, 7) * step - parts).abs().pow(2.4)).sum(-1)
            best = min(best, float(losses.amin(0).sum()))
        excess.append(error / best)
    assert min(excess) > 0.99
    assert max(excess) < 1.25 and sum(excess) / len(excess) < 1.1


def test_one_group_is_as_good_as_a_channel(generator: torch.Generator) -> None:
    weight = torch.randn(8, 40, generator=generator)
    scale = search_values(weight, CHANNELS).scale
    qparams = search_groups(weight, groups(40))
    step = column_scale(qparams, 40, groups(40))[:, 0]
    torch.testing.assert_close(step, scale, rtol=0.1, atol=0)


def test_zeros_and_a_group_of_zeros(generator: torch.Generator) -> None:
    weight = torch.randn(3, 12, generator=generator)
    weight[0], weight[1, :4] = 0, 0
    integers, qparams = round_nearest(weight, groups(4))
    assert not bool(integers[0].any()) and not bool(integers[1, :4].any()) and bool(integers[1, 4:].any())
    assert bool((qparams.scale > 0).all())


def test_other_channels_and_blocks_change_nothing(
    generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = uneven((9, 40), 8, generator)
    whole, qparams = round_nearest(weight, groups(8))
    monkeypatch.setattr("octavo.quantization.groups.BLOCK", 80)
    again, other = round_nearest(weight, groups(8))
    assert torch.equal(whole, again) and torch.equal(qparams.scale, other.scale)
    alone, _ = round_nearest(weight[4:5], groups(8))
    assert torch.equal(alone, whole[4:5])


@pytest.mark.parametrize(
    ("bits", "narrow", "most"), [(4, True, 18), (4, False, 15), (3, True, 42), (2, True, 127)]
)
def test_every_product_is_an_int8_number_and_comes_back(bits: int, narrow: bool, most: int) -> None:
    spec = groups(3, bits, narrow)
    assert most_multiplier(spec) == most
    values = torch.arange(spec.qmin, spec.qmax + 1, dtype=torch.int8).repeat(most, 1)
    multiplier = torch.arange(1, most + 1, dtype=torch.uint8)[:, None].repeat(1, -(-values.shape[1] // 3))
    product = multiply(values, multiplier, spec)
    assert torch.equal(product.int(), values.int() * torch.arange(1, most + 1, dtype=torch.int32)[:, None])
    assert torch.equal(divide(product, multiplier, spec), values)


def test_multipliers_that_do_not_fit_are_refused() -> None:
    shape = torch.Size([2, 3, 3])
    good = torch.ones(2, 3, dtype=torch.uint8)
    check_multipliers("here", good, shape, groups(4))
    check_multipliers("here", None, shape, CHANNELS)
    for wrong in (good * 0, good * 19, good[:, :2], good[:1]):
        with pytest.raises(OctavoError, match=r"^here: .* not \[2, 3\] numbers from 1 to 18$"):
            check_multipliers("here", wrong, shape, groups(4))
    for multiplier, spec in ((None, groups(4)), (good, CHANNELS)):
        with pytest.raises(OctavoError, match="per_group"):
            check_multipliers("here", multiplier, shape, spec)


def test_what_knows_no_groups_says_so() -> None:
    weight = torch.ones(2, 4)
    with pytest.raises(OctavoError, match="search_groups"):
        search_values(weight, groups(2))
    scale = torch.ones(2)
    qparams = QParams(scale, torch.zeros(2, dtype=torch.int32), torch.ones(2, 2, dtype=torch.uint8))
    with pytest.raises(OctavoError, match="groups"):
        quantize(weight, qparams, groups(2))
    for wrong in (torch.ones(3, 2, dtype=torch.uint8), torch.ones(2, 2), torch.ones(2, dtype=torch.uint8)):
        with pytest.raises(OctavoError, match="multiplier"):
            QParams(scale, torch.zeros(2, dtype=torch.int32), wrong)


def test_values_that_are_not_finite_are_refused() -> None:
    with pytest.raises(OctavoError, match="NaN or infinity"):
        round_nearest(torch.tensor([[1.0, float("nan")]]), groups(2))
    with pytest.raises(OctavoError, match="metric"):
        round_nearest(torch.ones(1, 2), groups(2), "l3")
