from __future__ import annotations

import pytest
import torch

from octavo.errors import OctavoError
from octavo.quantization import QParams, QuantSpec, dequantize, fake_quantize, qparams_from_range, quantize

BITS = range(2, 9)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("symmetric", [True, False])
def test_per_tensor_is_bit_equal_to_torch(bits: int, symmetric: bool, generator: torch.Generator) -> None:
    spec = QuantSpec(bits, symmetric)
    for magnitude in (1e-6, 1e-2, 1.0, 3e3):
        x = torch.randn(4001, generator=generator) * magnitude
        qparams = qparams_from_range(spec, x.min() * 0.5, x.max() * 0.7)
        halves = (torch.arange(-300, 300) + 0.5) * qparams.scale
        x = torch.cat([x, halves, torch.zeros(1)])
        theirs = torch.fake_quantize_per_tensor_affine(
            x, qparams.scale, qparams.zero_point, spec.qmin, spec.qmax
        )
        assert torch.equal(fake_quantize(x, qparams, spec), theirs)
        assert torch.equal(dequantize(quantize(x, qparams, spec), qparams), theirs)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("symmetric", [True, False])
def test_per_channel_is_bit_equal_to_torch(bits: int, symmetric: bool, generator: torch.Generator) -> None:
    spec = QuantSpec(bits, symmetric, "per_channel")
    x = torch.randn(16, 3, 5, 5, generator=generator) * torch.logspace(-5, 3, 16).view(-1, 1, 1, 1)
    qparams = qparams_from_range(spec, x.amin((1, 2, 3)) * 0.9, x.amax((1, 2, 3)) * 0.6)
    theirs = torch.fake_quantize_per_channel_affine(
        x, qparams.scale, qparams.zero_point, 0, spec.qmin, spec.qmax
    )
    assert torch.equal(fake_quantize(x, qparams, spec), theirs)
    assert torch.equal(dequantize(quantize(x, qparams, spec), qparams), theirs)


@pytest.mark.parametrize("spec", [QuantSpec(8), QuantSpec(8, False), QuantSpec(3), QuantSpec(3, False)])
@pytest.mark.parametrize(("low", "high"), [(-1.0, 3.0), (2.0, 5.0), (-7.0, -1.0), (0.0, 0.0), (-1e37, 1e37)])
def test_zero_is_exact_and_the_range_is_covered(spec: QuantSpec, low: float, high: float) -> None:
    qparams = qparams_from_range(spec, low, high)
    assert qparams.scale > 0
    assert spec.qmin <= qparams.zero_point <= spec.qmax
    ends = torch.tensor([0.0, low, high])
    back = fake_quantize(ends, qparams, spec)
    assert back[0] == 0
    assert ((back - ends).abs() <= qparams.scale * 0.501).all()


def test_degenerate_ranges_give_scales_whose_products_and_reciprocals_are_finite() -> None:
    qparams = qparams_from_range(QuantSpec(8), 0.0, 1e-40)
    assert torch.isfinite(1 / qparams.scale)
    assert qparams.scale * qparams.scale >= torch.finfo(torch.float32).tiny
    assert fake_quantize(torch.zeros(3), qparams, QuantSpec(8)).tolist() == [0, 0, 0]


@pytest.mark.parametrize(("low", "high"), [(1.0, -1.0), (float("nan"), 1.0), (0.0, float("inf"))])
def test_bad_ranges_are_refused(low: float, high: float) -> None:
    with pytest.raises(OctavoError, match="range"):
        qparams_from_range(QuantSpec(), low, high)


def test_saturation_reaches_both_ends() -> None:
    x = torch.tensor([-1e30, 1e30])
    for spec in (QuantSpec(8), QuantSpec(8, narrow=True), QuantSpec(8, False), QuantSpec(2)):
        q = quantize(x, qparams_from_range(spec, -1.0, 1.0), spec)
        assert q.tolist() == [spec.qmin, spec.qmax]
        assert q.dtype == spec.dtype


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype, generator: torch.Generator) -> None:
    x = torch.randn(500, generator=generator).to(dtype)
    spec = QuantSpec(8)
    qparams = qparams_from_range(spec, -2.0, 2.0)
    assert torch.equal(quantize(x, qparams, spec), quantize(x.float(), qparams, spec))
    assert fake_quantize(x, qparams, spec).dtype == dtype


def test_channels_must_meet_dimension_0() -> None:
    qparams = QParams(torch.ones(3), torch.zeros(3, dtype=torch.int32))
    with pytest.raises(OctavoError, match="3 channels"):
        quantize(torch.ones(2, 3), qparams, QuantSpec(granularity="per_channel"))
