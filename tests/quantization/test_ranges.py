from __future__ import annotations

import math
from collections import defaultdict
from typing import Any

import pytest
import torch

from octavo.errors import OctavoError
from octavo.quantization import METRICS, QuantSpec, fake_quantize, qparams_from_range, ranges, search_values
from octavo.quantization.grid import count, exponent_of, points_of

CHANNELS = QuantSpec(8, granularity="per_channel", narrow=True)


def brute_force(x: torch.Tensor, qmin: int, qmax: int) -> float:
    """The symmetric L2.4 search once more, with torch's own fake quantization and no shared code."""
    losses = []
    for i in range(1, 101):
        scale = float((x.abs().max().double() * i / 100 / qmax).float())
        error = torch.fake_quantize_per_tensor_affine(x, scale, 0, qmin, qmax) - x
        losses.append((error.double().abs().pow(2.4).sum().item(), -i, scale))
    return min(losses)[2]


def kl_by_definition(x: torch.Tensor, x_sim: torch.Tensor, counts: torch.Tensor, step: float) -> float:
    """`sum P log(P / Q)` for one row, P and Q written out bin by bin."""
    held = [abs(a - b) <= step / 2 * 1.0001 for a, b in zip(x.tolist(), x_sim.tolist(), strict=True)]
    inside = [i for i, is_held in enumerate(held) if is_held]
    if not inside:
        return math.inf
    p, cells = dict.fromkeys(inside, 0.0), defaultdict[float, list[float]](list)
    for i, count_i in enumerate(counts.tolist()):
        p[min(max(i, inside[0]), inside[-1]) if not held[i] else i] += count_i
        if held[i]:
            cells[x_sim[i].item()].append(count_i)
    kept, total = sum(sum(cell) for cell in cells.values()), counts.sum().item()
    q = {i: sum(cells[x_sim[i].item()]) / len(cells[x_sim[i].item()]) for i in inside}
    return sum(p[i] / total * math.log(p[i] / total / (q[i] / kept)) for i in inside)


def kl_losses(row: torch.Tensor, spec: QuantSpec) -> list[float]:
    """The KL distance of candidates 1..100 of one channel, searched alone, one candidate at a time."""
    low, high = row.aminmax()
    exponent = exponent_of(low.item(), high.item(), 1024)
    counts = count(row, exponent, 1024)
    counts[512] = 0
    points, counts = points_of(counts, exponent)
    points = points.clamp(low, high)
    losses = []
    for i in range(1, 101):
        qparams = qparams_from_range(spec, low.double() * i / 100, high.double() * i / 100)
        step = qparams.scale.item()
        loss = kl_by_definition(points, fake_quantize(points, qparams, spec), counts, step)
        losses.append(loss if step >= 2.0**exponent else math.inf)
    return losses


@pytest.mark.parametrize(("bits", "fan_in"), [(8, 9), (8, 100), (8, 1728), (4, 100), (4, 1728), (2, 1728)])
def test_kl_search_of_all_channels_agrees_with_one_by_one(
    bits: int, fan_in: int, generator: torch.Generator
) -> None:
    spec = QuantSpec(bits, granularity="per_channel", narrow=True)
    powers = torch.linspace(1, 3, 6)[
        :, None
    ]  # from dense to heavy-tailed: rows occupy unlike numbers of bins
    normal = torch.randn(6, fan_in, generator=generator)
    weight = normal.sign() * normal.abs() ** powers * torch.logspace(-3, 3, 6)[:, None]
    weight = torch.cat([weight, torch.zeros(1, fan_in)])
    scales = search_values(weight, spec, "kl").scale
    for row, scale in zip(weight[:-1], scales[:-1].tolist(), strict=True):
        losses = kl_losses(row, spec)
        widest = max(i for i, loss in enumerate(losses, 1) if loss < min(losses) + 1e-10)
        expected = qparams_from_range(spec, *(end.double() * widest / 100 for end in row.aminmax())).scale
        assert scale == pytest.approx(expected.item(), rel=1e-6)


def test_kl_search_is_the_same_in_small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(50, 300, generator=torch.Generator().manual_seed(0))
    whole = search_values(weight, CHANNELS, "kl").scale
    monkeypatch.setattr("octavo.quantization.ranges.BLOCK", 4 * 300)  # four channels at a time
    assert torch.equal(search_values(weight, CHANNELS, "kl").scale, whole)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_weight_search_agrees_with_brute_force(bits: int, generator: torch.Generator) -> None:
    spec = QuantSpec(bits, granularity="per_channel", narrow=True)
    weight = torch.randn(6, 4, 3, 3, generator=generator) ** 3
    found = search_values(weight, spec).scale
    assert found.tolist() == [brute_force(row.flatten(), spec.qmin, spec.qmax) for row in weight]


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_what_is_left_out_would_have_lost(
    bits: int, symmetric: bool, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec, normal = QuantSpec(bits, symmetric=symmetric), torch.randn(5000, generator=generator)
    values = [
        normal,
        torch.nn.functional.silu(2 * normal),
        normal**5,
        normal.relu(),
        normal.exp() - 0.5,
        normal * 1e-18,
    ]
    found, tried = [], []
    for looks in (ranges.LOOKS, 1000):  # with looks at whether narrower ranges can win, and without
        evaluations: list[int] = []
        monkeypatch.setattr(ranges, "LOOKS", looks)
        monkeypatch.setattr(
            ranges, "fake_quantize", lambda *args, e=evaluations: e.append(1) or fake_quantize(*args)
        )
        found.append([])
        for x in values:
            exponent = exponent_of(float(x.min()), float(x.max()), ranges.BINS)
            counts = count(x, exponent, ranges.BINS)
            by_histogram = ranges.search_histogram(counts, exponent, x.min(), x.max(), spec)
            for qparams in (search_values(x, spec), by_histogram):
                found[-1].append((qparams.scale.item(), qparams.zero_point.item()))
        tried.append(len(evaluations))
    assert found[0] == found[1]
    assert tried[0] < (0.7 if bits == 8 else 1) * tried[1]


def test_separate_ends_never_lose_to_joint_ends(generator: torch.Generator) -> None:
    x = torch.nn.functional.silu(2 * torch.randn(20_000, generator=generator))
    spec = QuantSpec(4, symmetric=False)
    losses = {}
    for ends in ("joint", "separate"):
        qparams = search_values(x, spec, "mse", ends)
        back = torch.fake_quantize_per_tensor_affine(x, qparams.scale, qparams.zero_point, 0, 15)
        losses[ends] = (back - x).abs().pow(2.4).sum().item()
    assert losses["separate"] < 0.9 * losses["joint"]


def test_minmax_takes_the_full_range() -> None:
    x = torch.tensor([[-1.0, 0.5], [0.0, 254.0]])
    assert torch.allclose(search_values(x, CHANNELS, "minmax").scale, torch.tensor([1 / 127, 2.0]))
    per_tensor = search_values(x, QuantSpec(8, False), "minmax")
    assert (per_tensor.scale.item(), per_tensor.zero_point.item()) == (1.0, 1)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("spec", [CHANNELS, QuantSpec(8), QuantSpec(8, False), QuantSpec(3, False)])
def test_constant_and_zero_values_stay_what_they_are(metric: str, spec: QuantSpec) -> None:
    for value in (0.0, 5.0, -0.003):
        x = torch.full((3, 7), value)
        qparams = search_values(x, spec, metric)
        assert torch.isfinite(qparams.scale).all() and (qparams.scale > 0).all()
        scale, zero_point = qparams.scale.max(), qparams.zero_point.max()
        back = torch.fake_quantize_per_tensor_affine(x, scale, zero_point, spec.qmin, spec.qmax)
        torch.testing.assert_close(back, x, rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize("metric", METRICS)
def test_a_channel_is_searched_alone(metric: str, generator: torch.Generator) -> None:
    weight = torch.randn(40, 2000, generator=generator) * torch.logspace(-3, 3, 40)[:, None]
    together = search_values(weight, CHANNELS, metric).scale
    alone = torch.cat([search_values(weight[i : i + 1], CHANNELS, metric).scale for i in (0, 17, 39)])
    torch.testing.assert_close(together[[0, 17, 39]], alone, rtol=0, atol=0)


def test_an_outlier_is_clipped_by_l1_and_kept_by_minmax(generator: torch.Generator) -> None:
    x = torch.cat([torch.randn(10_000, generator=generator), torch.tensor([60.0])])
    scales = {name: search_values(x, QuantSpec(4), name).scale.item() for name in METRICS}
    assert scales["l1"] < scales["minmax"] / 8
    assert scales["kl"] < scales["minmax"] / 4
    assert scales["mse"] < scales["minmax"]


@pytest.mark.parametrize(
    ("x", "options", "message"),
    [
        (torch.tensor([1.0, float("nan")]), {}, "NaN or infinity"),
        (torch.tensor([1.0, float("inf")]), {}, "NaN or infinity"),
        (torch.ones(0), {}, "no values"),
        (torch.ones(2), {"metric": "l3"}, "metric: 'l3' is not one of mse, l1"),
        (torch.ones(2), {"ends": "both"}, "ends: 'both'"),
    ],
)
def test_bad_arguments_are_refused(x: torch.Tensor, options: dict[str, str], message: str) -> None:
    with pytest.raises(OctavoError, match=message):
        search_values(x, QuantSpec(), **options)


@pytest.mark.parametrize("metric", ["mse", "l1"])
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("narrow", [True, False])
def test_candidates_that_cannot_win_are_left_out_and_nothing_else(
    metric: str, bits: int, narrow: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(bits)
    rows = torch.randn(24, 200, generator=generator)
    rows[8:16] **= 5  # tails so heavy that narrow ranges win
    rows[16] = 0.0
    spec = QuantSpec(bits, symmetric=True, granularity="per_channel", narrow=narrow)
    tried: list[int] = []

    def counted(*args: Any) -> torch.Tensor:
        tried.append(1)
        return fake_quantize(*args)

    monkeypatch.setattr(ranges, "fake_quantize", counted)
    found = search_values(rows, spec, metric).scale
    seen = len(tried)
    monkeypatch.setattr(ranges, "LOOKS", 2 * ranges.CANDIDATES)
    assert torch.equal(found, search_values(rows, spec, metric).scale)
    assert len(tried) - seen == ranges.CANDIDATES
    if bits == 8 and metric == "mse":
        light = rows[:8]
        monkeypatch.setattr(ranges, "LOOKS", 5)
        tried.clear()
        search_values(light, spec, metric)
        assert len(tried) < ranges.CANDIDATES / 2


def test_nor_ranges_whose_zero_point_is_rounded_into_them() -> None:
    """The step of a range within another may be put half a step farther out than the outer one's."""
    rare = [-0.2457, -0.1969, 0.5411, -0.2328, -0.2765, 0.6597, 2.1495, -0.2259, 2.9602, -0.2569, 1.8708]
    x, spec = torch.tensor([*rare, *[-0.2457] * 33]), QuantSpec(5, symmetric=False)
    found = search_values(x, spec, "l1")
    assert float((fake_quantize(x, found, spec) - x).abs().sum()) < 0.87  # 1.70 where it was left out
