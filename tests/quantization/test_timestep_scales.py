"""Scales by timestep group: never worse than one scale, one zero point for all, and what they say of their error."""

from __future__ import annotations

import pytest
import torch

from octavo.errors import OctavoError
from octavo.quantization import HistogramObserver, QParams, QuantSpec, fake_quantize, search_grouped_scales
from octavo.quantization.metrics import METRICS


def values(kind: str) -> list[torch.Tensor]:
    """Three groups, whose loudness differs, of 4096 values each."""
    generator = torch.Generator().manual_seed(0)
    groups = [torch.randn(4096, generator=generator) * loud for loud in (0.3, 1.0, 4.0)]
    return [torch.nn.functional.silu(x) for x in groups] if kind == "silu" else groups


def observed(groups: list[torch.Tensor]) -> list[HistogramObserver]:
    observers = [HistogramObserver() for _ in groups]
    for observer, x in zip(observers, groups, strict=True):
        observer.observe(x)
    return observers


def squared_error(x: torch.Tensor, qparams: QParams, spec: QuantSpec, factor: float = 1.0) -> float:
    return float((fake_quantize(x * factor, qparams, spec) / factor - x).double().square().sum())


@pytest.mark.parametrize("kind", ["normal", "silu"])
@pytest.mark.parametrize("spec", [QuantSpec(8), QuantSpec(8, False), QuantSpec(4, False)], ids=str)
def test_the_error_falls_and_is_what_it_says(kind: str, spec: QuantSpec) -> None:
    groups = values(kind)
    found = search_grouped_scales(observed(groups), spec)
    (whole,) = observed([torch.cat(groups)])
    before = squared_error(torch.cat(groups), whole.qparams(spec), spec)
    after = sum(
        squared_error(x, found.qparams, spec, float(factor))
        for x, factor in zip(groups, found.factors, strict=True)
    )
    assert spec.qmin <= int(found.qparams.zero_point) <= spec.qmax
    assert not spec.symmetric or int(found.qparams.zero_point) == 0
    assert after < 0.95 * before
    assert found.error == pytest.approx(after / before, rel=0.1)
    assert found.factors[0] > found.factors[1] > found.factors[2]


def test_groups_that_are_alike_gain_nothing() -> None:
    x = values("silu")[1]
    found = search_grouped_scales(observed([x, x]), QuantSpec(8, symmetric=False))
    assert float(found.factors[0]) == float(found.factors[1]) == pytest.approx(1.0)
    assert 0.9 < found.error < 1.05


@pytest.mark.parametrize("metric", METRICS)
def test_every_metric_chooses_wider_scales_for_louder_groups(metric: str) -> None:
    groups = values("silu")
    spec = QuantSpec(8, symmetric=False)
    found = search_grouped_scales(observed(groups), spec, metric)
    assert bool((found.factors.diff() <= 0).all()) and found.factors[0] > 1.3 * found.factors[2]
    if metric == "minmax":
        scale, z = float(found.qparams.scale), int(found.qparams.zero_point)
        for x, factor in zip(groups, found.factors.tolist(), strict=True):
            assert float(x.min()) >= (spec.qmin - z - 0.01) * scale / factor
            assert float(x.max()) <= (spec.qmax - z + 0.01) * scale / factor


def test_groups_of_zeros_and_of_nothing() -> None:
    zeros = search_grouped_scales(observed([torch.zeros(8), torch.ones(8)]), QuantSpec(8, symmetric=False))
    assert bool(zeros.factors.isfinite().all() and (zeros.factors > 0).all())
    with pytest.raises(OctavoError, match="nothing was observed"):
        search_grouped_scales([*observed([torch.ones(8)]), HistogramObserver()], QuantSpec(8))
