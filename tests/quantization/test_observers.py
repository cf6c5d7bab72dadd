from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from octavo.errors import OctavoError
from octavo.quantization import METRICS, HistogramObserver, QParams, QuantSpec, fake_quantize, search_values
from octavo.quantization.ranges import Ends

SPECS = [QuantSpec(8), QuantSpec(8, False)]


def gaussian(n: int, generator: torch.Generator) -> torch.Tensor:
    return torch.randn(n, generator=generator)


def silu(n: int, generator: torch.Generator) -> torch.Tensor:
    return torch.nn.functional.silu(2 * torch.randn(n, generator=generator))


def student(n: int, generator: torch.Generator) -> torch.Tensor:
    """Student's t with 3 degrees of freedom: a few values 50 times the typical one."""
    chi_square = sum(torch.randn(n, generator=generator).square() for _ in range(3))
    return torch.randn(n, generator=generator) / (chi_square / 3).sqrt()


def observed(*parts: torch.Tensor) -> HistogramObserver:
    observer = HistogramObserver()
    for part in parts:
        observer.observe(part)
    return observer


def ends(qparams: QParams, spec: QuantSpec) -> torch.Tensor:
    return qparams.scale * (torch.tensor([spec.qmin, spec.qmax]) - qparams.zero_point)


@pytest.mark.parametrize(
    ("spec", "metric", "which"),
    [
        *((spec, metric, "joint") for spec in SPECS for metric in METRICS),
        (QuantSpec(8, False), "mse", "separate"),
        (QuantSpec(4, False), "mse", "separate"),
    ],
)
@pytest.mark.parametrize("draw", [gaussian, silu, student])
def test_ranges_agree_with_an_exact_search(
    draw: Callable[[int, torch.Generator], torch.Tensor],
    spec: QuantSpec,
    metric: str,
    which: Ends,
    generator: torch.Generator,
) -> None:
    x = draw(100_000, generator)
    found = observed(*x.split(30_001)).qparams(spec, metric, which)
    exact = search_values(x, spec, metric, which)
    difference = (ends(found, spec) - ends(exact, spec)).abs().max()
    full = (x.max() - x.min()) if not spec.symmetric else 2 * x.abs().max()
    if spec.bits == 8:  # with 16 levels the zero point's own rounding moves the ends by more than a candidate
        assert difference <= 0.01 * full  # at most one of the 100 candidates away
    distance = METRICS[metric].distance
    if distance is not None and metric != "kl":  # and not noticeably worse on the values themselves
        loss = [distance(x, fake_quantize(x, qparams, spec), None, -1) for qparams in (found, exact)]
        assert loss[0] <= 1.001 * loss[1]


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("value", [0.0, 5.0, -0.003, 1e-30, -3e38])
def test_constant_and_zero_values(metric: str, value: float) -> None:
    x = torch.full((100,), value)
    for spec in SPECS:
        found, exact = observed(x).qparams(spec, metric), search_values(x, spec, metric)
        assert torch.equal(found.scale, exact.scale) and torch.equal(found.zero_point, exact.zero_point)


def test_state_does_not_depend_on_order_batches_or_merging(generator: torch.Generator) -> None:
    x = torch.randn(3000, generator=generator) * torch.logspace(-6, 4, 3000)
    whole = observed(x).state()
    backwards = observed(*x.flip(0).split(1)).state()
    merged = HistogramObserver()
    for part in (x[2000:], x[:1], x[1:2000]):
        merged.merge(observed(part))
    merged.merge(HistogramObserver())
    for name, value in whole.items():
        assert torch.equal(value, backwards[name]), name
        assert torch.equal(value, merged.state()[name]), name


def test_counts_are_those_of_a_direct_count(generator: torch.Generator) -> None:
    x = torch.randn(10_000, generator=generator)
    x[:4] = torch.tensor([-4.0, 0.0, -1e-30, 3.9999998])
    x = x.clamp(-4, 3.9999998)
    observer = observed(x[5000:] / 64, x)
    both = torch.cat([x[5000:] / 64, x]).double()
    assert observer.exponent == -10
    index = torch.div(both, 2.0**-10, rounding_mode="floor").long() + 4096
    assert torch.equal(observer.counts, torch.bincount(index, minlength=8192))
    assert (observer.low, observer.high) == (x.min().item(), x.max().item())


@pytest.mark.parametrize(
    "end", [1.0, -1.0, -0.9999999, 1.0000001, 2.0**-100, -(2.0**-88), 2.0**-149, 3.4e38, -(2.0**127)]
)
def test_the_ends_always_fit(end: float) -> None:
    observer = observed(torch.tensor([end, 0.0]))
    assert observer.counts.sum() == 2
    assert observer.counts.numel() == 8192


def test_memory_is_fixed(generator: torch.Generator) -> None:
    observer = HistogramObserver()
    sizes = set()
    for scale in (1e-3, 1.0, 1e3):
        observer.observe(scale * torch.randn(100_000, generator=generator))
        sizes.add(sum(value.untyped_storage().nbytes() for value in observer.state().values()))
    assert len(sizes) == 1 and sizes.pop() < 70_000


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_values_are_refused_and_nothing_is_counted(bad: float) -> None:
    observer = observed(torch.ones(3))
    with pytest.raises(OctavoError, match="NaN or infinity"):
        observer.observe(torch.tensor([2.0, bad]))
    assert torch.equal(observer.state()["counts"], observed(torch.ones(3)).counts)
    assert observer.high == 1


def test_layouts_and_dtypes(generator: torch.Generator) -> None:
    x = torch.randn(2, 3, 8, 8, generator=generator).bfloat16()
    expected = observed(x.float()).state()
    for same in (x, x.to(memory_format=torch.channels_last), x.transpose(0, 3), x.float().requires_grad_()):
        assert torch.equal(observed(same).state()["counts"], expected["counts"])
    assert observed(torch.ones(0), torch.tensor(3.0)).counts.sum() == 1
    assert observed(torch.ones(1).expand(5)).counts.sum() == 5


def test_state_round_trip() -> None:
    for observer in (observed(torch.linspace(-3, 1, 100)), HistogramObserver()):
        other = HistogramObserver()
        other.load_state(observer.state())
        assert all(torch.equal(value, other.state()[name]) for name, value in observer.state().items())


@pytest.mark.parametrize(
    "change",
    [
        {"counts": torch.zeros(8192, dtype=torch.int64)},
        {"counts": torch.zeros(10, dtype=torch.int64)},
        {"counts": torch.full((8192,), -1)},
        {"exponent": torch.tensor(3)},
        {"range": torch.tensor([1.0, -1.0])},
        {"range": torch.tensor([0.0, float("inf")])},
        {"range": torch.tensor([0.0, float("nan")])},
        {"range": torch.tensor(1.0)},
    ],
)
def test_a_state_that_cannot_be_is_refused(change: dict[str, torch.Tensor]) -> None:
    state = {**observed(torch.linspace(-3, 1, 100)).state(), **change}
    with pytest.raises(OctavoError, match="observer state"):
        HistogramObserver().load_state(state)
    del state["counts"]
    with pytest.raises(OctavoError, match="observer state"):
        HistogramObserver().load_state(state)


def test_nothing_observed_is_an_error() -> None:
    with pytest.raises(OctavoError, match="nothing was observed"):
        HistogramObserver().qparams(QuantSpec())
    with pytest.raises(OctavoError, match="per_tensor"):
        observed(torch.ones(3)).qparams(QuantSpec(granularity="per_channel"))


def test_float64_just_below_a_power_of_two_is_counted_as_float32() -> None:
    observer = HistogramObserver()
    observer.observe(torch.tensor([1 - 1e-12, 0.5], dtype=torch.float64))
    assert int(observer.counts.sum()) == 2 and observer.high == 1.0
