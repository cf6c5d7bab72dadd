"""Weights within the limit of pairs: none breaks it, none could be nearer, and what must not change does not."""

from __future__ import annotations

import pytest
import torch

from octavo.quantization import QuantSpec, round_nearest
from octavo.quantization.gptq import output_error, round_gptq, round_layer
from octavo.quantization.groups import to_nearest
from octavo.quantization.pairs import (
    PAIR_SUM,
    breaks_limit,
    paired_order,
    partners,
    to_nearest_pairs,
    widened,
)
from octavo.quantization.specs import QParams

FREE = QuantSpec(8, granularity="per_channel", narrow=True)
LIMITED = QuantSpec(8, granularity="per_channel", narrow=True, pair_limit=True)
SHAPES = [(24, 32), (16, 12, 3, 3), (8, 8, 5), (4, 4, 1, 3, 3), (6, 4)]


def is_within(integers: torch.Tensor) -> bool:
    """The limit, told by pairs one by one."""
    rows = (
        integers.flatten(2).tolist()
        if integers.ndim > 2
        else [[[q] for q in row] for row in integers.tolist()]
    )
    return all(
        a * b <= 0 or abs(a) + abs(b) <= 128
        for row in rows
        for one, other in zip(row[0::2], row[1::2], strict=True)
        for a, b in zip(one, other, strict=True)
    )


def wide(*shape: int, seed: int = 0) -> torch.Tensor:
    """Weights of which many pairs break the limit."""
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@pytest.mark.parametrize("shape", SHAPES)
def test_partners_are_neighbouring_inputs_at_the_same_place(shape: tuple[int, ...]) -> None:
    columns = torch.arange(torch.Size(shape[1:]).numel()).view(shape[1:])
    partner = partners(torch.Size(shape))
    assert partner is not None and torch.equal(partner[partner], columns.flatten())
    for i in range(shape[1]):
        assert torch.equal(partner.view(shape[1:])[i], columns[i + 1 if i % 2 == 0 else i - 1])


@pytest.mark.parametrize("inputs", [1, 3, 6, 10])
def test_inputs_that_are_no_multiple_of_4_have_no_pairs(inputs: int) -> None:
    weight = wide(4, inputs, 3, 3)
    assert partners(weight.shape) is None
    ours, theirs = round_nearest(weight, LIMITED), round_nearest(weight, FREE)
    assert torch.equal(ours[0], theirs[0]) and torch.equal(ours[1].scale, theirs[1].scale)


def test_no_pair_of_integers_is_nearer() -> None:
    """Against every pair of integers within the limit, at values on, near, off and far beyond its borders."""
    generator = torch.Generator().manual_seed(0)
    values = torch.cat(
        [
            torch.rand(150, 2, generator=generator) * 260 - 130,
            torch.randint(-260, 261, (150, 2), generator=generator) / 2,
            torch.randint(120, 136, (60, 1), generator=generator) / 2 + torch.tensor([[0.0, 1.0]]),
            torch.rand(150, 2, generator=generator) * 800 - 400,
        ]
    )
    ours = to_nearest_pairs(values, torch.ones(1, 1), torch.tensor([1, 0]), LIMITED)
    grid = torch.cartesian_prod(*[torch.arange(-127, 128)] * 2).float()
    within = grid[~((grid.prod(1) > 0) & (grid.abs().sum(1) > PAIR_SUM))]
    nearest = torch.cdist(values, within, compute_mode="donot_use_mm_for_euclid_dist").amin(dim=1)
    assert is_within(ours)
    torch.testing.assert_close((ours - values).norm(dim=1), nearest, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("metric", ["mse", "minmax", "kl", "cosine"])
def test_rounding_to_nearest_keeps_the_limit(shape: tuple[int, ...], metric: str) -> None:
    weight = wide(*shape)
    free, _ = round_nearest(weight, FREE, metric)
    integers, qparams = round_nearest(weight, LIMITED, metric)
    assert breaks_limit(free) and not is_within(free)
    assert not breaks_limit(integers) and is_within(integers)
    scale = qparams.scale.view(-1, *[1] * (len(shape) - 1))
    seven, of_seven = round_nearest(weight, QuantSpec(7, granularity="per_channel", narrow=True), metric)
    error = (weight - integers * scale).square().sum()
    assert error < (weight - seven * of_seven.scale.view_as(scale)).square().sum(), "better than 7 bits"


def test_weights_that_keep_it_anyway_are_rounded_as_without_it() -> None:
    weight = wide(8, 16)
    weight[:, 1::2] = -weight[:, 1::2].abs() * weight[:, 0::2].sign()
    ours, theirs = round_nearest(weight, LIMITED), round_nearest(weight, FREE)
    assert torch.equal(ours[0], theirs[0]) and torch.equal(ours[1].scale, theirs[1].scale)


def test_only_channels_that_break_it_get_another_scale() -> None:
    rows = wide(6, 32)
    rows[::2, 1::2] = -rows[::2, 1::2].abs() * rows[::2, 0::2].sign()
    partner = partners(rows.shape)
    assert partner is not None
    before = QParams(rows.abs().amax(dim=1) / 127, torch.zeros(6, dtype=torch.int32))
    after = widened(rows, before, partner, LIMITED)
    assert torch.equal(after.scale[::2], before.scale[::2])
    factor = (after.scale / before.scale)[1::2]
    assert bool((factor > 1).all() and (factor <= 2 + 1e-6).all())

    def error(qparams: QParams) -> torch.Tensor:
        scale = qparams.scale[:, None]
        return (rows - to_nearest_pairs(rows, scale, partner, LIMITED) * scale).square().sum(dim=1)

    assert bool((error(after)[1::2] < 0.5 * error(before)[1::2]).all())


def test_columns_are_taken_in_pairs_by_the_larger_of_the_two() -> None:
    size = torch.rand(24, generator=torch.Generator().manual_seed(1))
    partner = partners(torch.Size([1, 4, 6]))
    assert partner is not None
    order = paired_order(size, partner)
    assert sorted(order.tolist()) == list(range(24))
    assert torch.equal(partner[order[0::2]], order[1::2])
    larger = torch.maximum(size, size[partner])[order[0::2]]
    assert bool((larger.diff() <= 0).all())


def moment_of(columns: int, seed: int = 2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(4 * columns, columns, generator=generator) @ torch.randn(
        columns, columns, generator=generator
    )
    return x.T @ x / len(x)


@pytest.mark.parametrize("shape", [(24, 32), (16, 12, 3, 3), (8, 152, 1, 1)])
@pytest.mark.parametrize("order", [True, False])
def test_second_order_rounding_keeps_it_and_gains_as_much(shape: tuple[int, ...], order: bool) -> None:
    weight = wide(*shape)
    nearest, qparams = round_nearest(weight, LIMITED)
    rows, scale = weight.flatten(1), qparams.scale[:, None]
    moment = moment_of(rows.shape[1])
    integers = round_gptq(
        rows, moment, scale, LIMITED, activation_order=order, partner=partners(weight.shape)
    )
    assert is_within(integers.view(shape))
    ours, plain = (output_error(rows, q.flatten(1), scale, moment) for q in (integers, nearest))
    assert bool((ours <= plain * (1 + 1e-6)).all())
    assert float(ours.sum()) < 0.5 * float(plain.sum())


def test_without_a_partner_second_order_rounding_is_what_it_was() -> None:
    """A column that is its own partner is under no limit: the same integers as without any."""
    weight, moment = wide(12, 20), moment_of(20)
    scale = weight.abs().amax(dim=1, keepdim=True) / 127
    alone = round_gptq(weight, moment, scale, FREE, partner=torch.arange(20))
    assert torch.equal(alone, round_gptq(weight, moment, scale, FREE)) and breaks_limit(alone)


def test_pairs_that_two_blocks_share_keep_it_too() -> None:
    """Of a wide layer blocks of columns are rounded apart; here each cuts a pair in two."""
    weight = wide(32, 12, seed=3)
    _, qparams = round_nearest(weight, FREE)  # not widened, so that many pairs are at the limit
    moments = torch.stack([moment_of(3, seed) for seed in range(4)])
    rounded = round_layer(weight, moments, 1, qparams, LIMITED)
    assert is_within(rounded.integers)
    free = round_layer(weight, moments, 1, qparams, FREE)
    assert breaks_limit(free.integers)


def test_of_a_grouped_convolution_each_group_has_its_pairs() -> None:
    weight = wide(8, 4, 3, 3, seed=4)
    nearest, qparams = round_nearest(weight, LIMITED)
    rounded = round_layer(weight, torch.stack([moment_of(36, 0), moment_of(36, 1)]), 2, qparams, LIMITED)
    assert is_within(nearest) and is_within(rounded.integers) and not torch.equal(nearest, rounded.integers)


def test_inputs_that_are_always_0() -> None:
    weight, moment = wide(6, 8), torch.zeros(8, 8)
    moment[0, 0], moment[4, 4], moment[5, 5] = 1.0, 2.0, 1.0
    _, qparams = round_nearest(weight, LIMITED)
    integers = round_gptq(weight, moment, qparams.scale[:, None], LIMITED, partner=partners(weight.shape))
    assert is_within(integers)
    nearest = to_nearest_pairs(weight, qparams.scale[:, None], partners(weight.shape), LIMITED)  # type: ignore[arg-type]
    never = [2, 3, 6, 7]
    assert torch.equal(integers[:, never], nearest[:, never].to(torch.int8))
    assert torch.equal(
        to_nearest(weight, qparams.scale[:, None], FREE).sign()[:, 4:6], integers[:, 4:6].sign()
    )
