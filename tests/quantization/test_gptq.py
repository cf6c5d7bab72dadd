"""GPTQ against what it must never lose to (rounding to nearest) and what it cannot beat (every integer tried)."""

from __future__ import annotations

import itertools

import pytest
import torch

from octavo.errors import OctavoError
from octavo.quantization import gptq
from octavo.quantization.gptq import output_error, round_gptq, round_layer
from octavo.quantization.groups import column_scale, divide, multiply
from octavo.quantization.rounding import round_nearest
from octavo.quantization.specs import QParams, QuantSpec


def problem(channels: int, columns: int, bits: int, seed: int, rank: int | None = None):  # type: ignore[no-untyped-def]
    """A weight, the second moment of correlated inputs, and nearest rounding on the scales of a range search."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(channels, columns, generator=generator)
    mixing = torch.randn(columns, rank or columns, generator=generator)
    x = torch.randn(4 * columns, rank or columns, generator=generator) @ mixing.T + 0.5
    spec = QuantSpec(bits=bits, granularity="per_channel", narrow=True)
    nearest, qparams = round_nearest(weight, spec)
    return weight, x, x.T @ x / len(x), spec, nearest, qparams


def every_integer(
    weight: torch.Tensor, moment: torch.Tensor, qparams: QParams, spec: QuantSpec
) -> torch.Tensor:
    """The least error of each channel over all integer weights."""
    grid = torch.tensor(
        list(itertools.product(range(spec.qmin, spec.qmax + 1), repeat=weight.shape[1])), dtype=torch.float64
    )
    best = []
    for row, scale in zip(weight.double(), qparams.scale.double(), strict=True):
        difference = row - grid * scale
        best.append(((difference @ moment.double()) * difference).sum(dim=1).min())
    return torch.stack(best)


@pytest.mark.parametrize("order", [False, True])
@pytest.mark.parametrize(("columns", "bits"), [(9, 4), (144, 4), (144, 8), (300, 8), (300, 3)])
def test_never_worse_than_nearest_and_mostly_much_better(columns: int, bits: int, order: bool) -> None:
    weight, x, moment, spec, nearest, qparams = problem(24, columns, bits, seed=columns + bits)
    ours = round_gptq(weight, moment, qparams.scale[:, None], spec, activation_order=order)
    errors = [
        ((weight - q.float() * qparams.scale[:, None]) @ x.T).square().mean(dim=1) for q in (ours, nearest)
    ]
    assert bool((errors[0] <= errors[1] * (1 + 1e-6)).all())
    assert float(errors[0].sum()) < (0.6 if columns > 100 else 0.8) * float(errors[1].sum())
    assert int(ours.min()) >= spec.qmin and int(ours.max()) <= spec.qmax


def test_close_to_every_integer_tried() -> None:
    """Column by column is not optimal, but on small layers it mostly finds the optimum (88 of 96 here)."""
    found, total, excess = 0, 0, []
    for seed in range(12):
        weight, _, moment, spec, _, qparams = problem(8, 4, 3, seed)
        best = every_integer(weight, moment, qparams, spec)
        error = output_error(
            weight, round_gptq(weight, moment, qparams.scale[:, None], spec), qparams.scale, moment.double()
        )
        assert bool((error >= best * (1 - 1e-9)).all())
        found += int((error <= best * (1 + 1e-6)).sum())
        excess.append((error.sum() / best.sum()).item())
        total += len(best)
    assert found >= 0.85 * total
    assert sum(excess) / len(excess) < 1.15


def test_uncorrelated_inputs_leave_nothing_to_make_good() -> None:
    weight, _, _, spec, nearest, qparams = problem(8, 20, 4, seed=1)
    moment = torch.diag(torch.rand(20, generator=torch.Generator().manual_seed(2)) + 0.1)
    assert torch.equal(round_gptq(weight, moment, qparams.scale[:, None], spec), nearest)


def test_the_error_is_the_error_of_the_outputs() -> None:
    weight, x, moment, _, nearest, qparams = problem(5, 12, 4, seed=3)
    outputs = (
        ((weight - nearest.float() * qparams.scale[:, None]).double() @ x.T.double()).square().mean(dim=1)
    )
    torch.testing.assert_close(
        output_error(weight, nearest, qparams.scale, moment), outputs, rtol=1e-5, atol=0
    )


def groups_problem(channels: int, columns: int, size: int, seed: int, bits: int = 4):  # type: ignore[no-untyped-def]
    """As `problem`, with a scale for each group; the scales as `[C, K]`."""
    weight, x, moment, _, _, _ = problem(channels, columns, bits, seed)
    weight *= torch.rand(channels, -(-columns // size)).repeat_interleave(size, 1)[:, :columns] + 0.1
    spec = QuantSpec(bits=bits, granularity="per_group", narrow=True, group_size=size)
    nearest, qparams = round_nearest(weight, spec)
    return weight, x, moment, spec, nearest, qparams, column_scale(qparams, columns, spec)


@pytest.mark.parametrize("order", [False, True])
@pytest.mark.parametrize(("columns", "size"), [(9, 4), (144, 32), (300, 64)])
def test_with_groups_never_worse_than_nearest(columns: int, size: int, order: bool) -> None:
    torch.manual_seed(columns)
    weight, x, moment, spec, nearest, qparams, scale = groups_problem(24, columns, size, seed=columns)
    q = round_gptq(weight, moment, scale, spec, activation_order=order)
    ours = multiply(q, qparams.multiplier, spec)
    errors = [((weight - w * qparams.scale[:, None]) @ x.T).square().mean(dim=1) for w in (ours, nearest)]
    assert bool((errors[0] <= errors[1] * (1 + 1e-6)).all())
    assert float(errors[0].sum()) < (0.6 if columns > 100 else 0.8) * float(errors[1].sum())
    assert int(q.min()) >= spec.qmin and int(q.max()) <= spec.qmax
    torch.testing.assert_close(
        output_error(weight, q, scale, moment),
        output_error(weight, ours, qparams.scale, moment),
        rtol=1e-5,
        atol=0,
    )


def test_with_groups_close_to_every_integer_tried() -> None:
    found, total, excess = 0, 0, []
    for seed in range(12):
        torch.manual_seed(seed)
        weight, _, moment, spec, _, _, scale = groups_problem(8, 4, 2, seed, bits=3)
        best = []
        for row, steps in zip(weight, scale, strict=True):
            one = QParams(torch.ones(1), torch.zeros(1, dtype=torch.int32))
            # (w - s q) M (w - s q) = (w / s - q) M' (w / s - q) with M' = s M s
            within = moment * steps[:, None] * steps
            best.append(every_integer((row / steps)[None], within, one, spec))
        error = output_error(weight, round_gptq(weight, moment, scale, spec), scale, moment)
        least = torch.cat(best)
        assert bool((error >= least * (1 - 1e-5)).all())
        found += int((error <= least * (1 + 1e-5)).sum())
        excess.append((error.sum() / least.sum()).item())
        total += len(least)
    assert found >= 0.85 * total
    assert sum(excess) / len(excess) < 1.15


def test_fewer_inputs_than_columns_and_dead_columns() -> None:
    weight, _, moment, spec, nearest, qparams = problem(6, 40, 4, seed=4, rank=5)
    moment[7], moment[:, 7] = 0, 0
    ours = round_gptq(weight, moment, qparams.scale[:, None], spec)
    assert torch.equal(ours[:, 7], nearest[:, 7])
    error = [output_error(weight, q, qparams.scale, moment).sum() for q in (ours, nearest)]
    assert error[0] < 0.2 * error[1]
    assert torch.equal(round_gptq(weight, torch.zeros(40, 40), qparams.scale[:, None], spec), nearest)


def test_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, _, moment, spec, _, qparams = problem(8, 60, 4, seed=5)
    whole = round_gptq(weight, moment, qparams.scale[:, None], spec)
    monkeypatch.setattr("octavo.quantization.gptq.BLOCK", 7)
    assert torch.equal(round_gptq(weight, moment, qparams.scale[:, None], spec), whole)


def test_mistakes_are_told() -> None:
    weight, _, moment, spec, _, qparams = problem(3, 5, 4, seed=6)
    with pytest.raises(OctavoError, match=r"moment: .* does not fit"):
        round_gptq(weight, moment[:4, :4], qparams.scale[:, None], spec)
    with pytest.raises(OctavoError, match="not finite"):
        round_gptq(weight, moment * float("nan"), qparams.scale[:, None], spec)
    for scale in (qparams.scale, torch.ones(3, 4), torch.ones(5, 3)):
        with pytest.raises(OctavoError, match=r"scale: .* does not fit 3 channels of 5 columns"):
            round_gptq(weight, moment, scale, spec)


def test_a_layers_errors_are_those_of_its_integers() -> None:
    weight, _, moment, spec, nearest, qparams = problem(8, 20, 4, seed=6)
    found = round_layer(weight, moment[None], 1, qparams, spec)
    for integers, error in ((nearest, found.nearest_error), (found.integers, found.error)):
        assert error == pytest.approx(float(output_error(weight, integers, qparams.scale, moment).sum()))
    assert found.error < found.nearest_error


def test_channels_that_are_not_better_for_it_are_rounded_to_nearest(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, _, moment, spec, nearest, qparams = problem(8, 20, 4, seed=6)
    monkeypatch.setattr(gptq, "_columns", lambda weight, *_: torch.zeros(weight.shape, dtype=torch.int8))
    monkeypatch.setattr(
        gptq,
        "_descend",
        lambda weight, integers, *_: integers,
    )
    found = round_layer(weight, moment[None], 1, qparams, spec)
    assert torch.equal(found.integers, nearest) and found.error == found.nearest_error


def _inputs(kind: str, x: torch.Tensor) -> torch.Tensor:
    x = x / x.std()
    if kind == "far":
        return x + 100
    if kind == "constant":
        return x[:1].repeat(len(x), 1)
    weak = torch.ones(x.shape[1])
    weak[::7] = 1e-3
    return x * weak if kind == "weak" else x


@pytest.mark.parametrize("kind", ["plain", "far", "constant", "weak"])
def test_rounding_in_float32_is_as_good_as_in_float64(kind: str) -> None:
    """Means 100 times the deviation, inputs that never change, every seventh 1,000 times smaller than the others."""
    weight, x, _, spec, _, qparams = problem(16, 300, 8, seed=9)
    x = _inputs(kind, x).double()
    moment = x.T @ x / len(x)
    errors = []
    for dtype in (torch.float32, torch.float64):
        found = round_layer(weight, moment.to(dtype)[None], 1, qparams, spec)
        errors.append(float(output_error(weight, found.integers, qparams.scale, moment).sum()))
    floor = 1e-5 * found.nearest_error  # of constant inputs nothing but what float32 rounds is left
    assert errors[0] <= 1.02 * errors[1] + floor
    assert errors[0] < 0.7 * found.nearest_error
    if kind != "constant":
        assert found.error == pytest.approx(errors[1], rel=1e-9)


def test_a_moment_of_another_dtype() -> None:
    weight, x, _, spec, _, qparams = problem(8, 20, 8, seed=6)
    whole = x.round().T @ x.round()
    ours = round_gptq(weight, whole.to(torch.int32), qparams.scale[:, None], spec)
    assert torch.equal(ours, round_gptq(weight, whole, qparams.scale[:, None], spec))


def test_output_channels_do_not_depend_on_how_many_are_taken_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, _, moment, spec, _, qparams = problem(8, 20, 4, seed=6)
    whole = round_layer(weight, moment[None], 1, qparams, spec)
    monkeypatch.setattr(gptq, "ROWS", 3)
    parts = round_layer(weight, moment[None], 1, qparams, spec)
    assert torch.equal(parts.integers, whole.integers)
    assert parts[1:] == pytest.approx(whole[1:])


def test_a_layer_is_rounded_by_its_parts() -> None:
    """Groups: channels with their own columns. Blocks: columns, for all channels."""
    weight, _, _, spec, _, qparams = problem(6, 8, 4, seed=7)
    moments = torch.stack([problem(6, 8, 4, seed)[2] for seed in (8, 9)])
    grouped = round_layer(weight.view(6, 2, 2, 2), moments, 2, qparams, spec).integers
    assert grouped.shape == (6, 2, 2, 2)
    for rows, moment in ((slice(0, 3), moments[0]), (slice(3, 6), moments[1])):
        mine = qparams.scale[rows, None]
        assert torch.equal(grouped.flatten(1)[rows], round_gptq(weight[rows], moment, mine, spec))
    blocks = torch.stack([problem(6, 4, 4, seed)[2] for seed in (8, 9)])
    blocked = round_layer(weight, blocks, 1, qparams, spec).integers
    for part, moment in ((slice(0, 4), blocks[0]), (slice(4, 8), blocks[1])):
        assert torch.equal(
            blocked[:, part], round_gptq(weight[:, part], moment, qparams.scale[:, None], spec)
        )


def test_a_layer_with_groups_is_rounded_by_its_parts() -> None:
    """Blocks of columns cut through groups; a convolution's groups have their own columns' scales."""
    torch.manual_seed(0)
    weight, _, _, spec, _, qparams, scale = groups_problem(6, 8, 3, seed=7)
    blocks = torch.stack([problem(6, 4, 4, seed)[2] for seed in (8, 9)])
    blocked = divide(round_layer(weight, blocks, 1, qparams, spec).integers, qparams.multiplier, spec)
    for part, moment in ((slice(0, 4), blocks[0]), (slice(4, 8), blocks[1])):
        assert torch.equal(blocked[:, part], round_gptq(weight[:, part], moment, scale[:, part], spec))
    moments = torch.stack([problem(6, 8, 4, seed)[2] for seed in (8, 9)])
    grouped = round_layer(weight.view(6, 2, 2, 2), moments, 2, qparams, spec).integers.flatten(1)
    for rows, moment in ((slice(0, 3), moments[0]), (slice(3, 6), moments[1])):
        mine = round_gptq(weight[rows], moment, scale[rows], spec)
        assert torch.equal(divide(grouped, qparams.multiplier, spec)[rows], mine)
