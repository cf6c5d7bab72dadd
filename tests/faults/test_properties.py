"""Properties of the affine maths, the observers and the packing, on inputs that nobody thought of."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from octavo.errors import OctavoError
from octavo.quantization import HistogramObserver, QParams, QuantSpec, qparams_from_range
from octavo.quantization.affine import SMALLEST_SCALE, dequantize, fake_quantize, quantize, round_to_grid
from octavo.quantization.groups import divide, groups_shape, most_multiplier, multiply
from octavo.quantization.packing import pack, unpack

few = settings(max_examples=60, derandomize=True, database=None, deadline=None)
floats = st.floats(-(2.0**99), 2.0**99, width=32, allow_subnormal=False)
specs = st.builds(QuantSpec, bits=st.integers(2, 8), symmetric=st.booleans())
lists = st.lists(floats, min_size=1, max_size=40)
states = st.lists(st.lists(floats, max_size=20), min_size=1, max_size=6)


def _qparams(spec: QuantSpec, values: list[float]) -> QParams:
    return qparams_from_range(spec, min(values), max(values))


@few
@given(specs, lists)
def test_every_integer_comes_back_from_its_number(spec: QuantSpec, values: list[float]) -> None:
    qparams = _qparams(spec, values)
    integers = torch.arange(spec.qmin, spec.qmax + 1, dtype=torch.int16).to(spec.dtype)
    assert torch.equal(quantize(dequantize(integers, qparams), qparams, spec), integers)


@few
@given(specs, lists)
def test_no_number_within_the_range_moves_by_more_than_half_a_step(
    spec: QuantSpec, values: list[float]
) -> None:
    qparams, x = _qparams(spec, values), torch.tensor(values)
    step = float(qparams.scale)
    # of asymmetric integers the zero point rounds too, so an end may lie half a step beyond the grid
    most = step * (0.5 if spec.symmetric else 1.0) + 1e-5 * float(x.abs().max())
    assert float((fake_quantize(x, qparams, spec).double() - x.double()).abs().max()) <= most
    assert step >= SMALLEST_SCALE


@few
@given(specs, lists, lists)
def test_rounding_keeps_order_and_zero_and_is_done_once(
    spec: QuantSpec, values: list[float], x: list[float]
) -> None:
    qparams, numbers = _qparams(spec, values), torch.tensor(x).sort().values
    integers = quantize(numbers, qparams, spec).int()
    assert bool((integers.diff() >= 0).all())
    assert spec.qmin <= int(integers.min()) <= int(integers.max()) <= spec.qmax
    assert float(fake_quantize(torch.zeros(()), qparams, spec)) == 0
    once = fake_quantize(numbers, qparams, spec)
    assert torch.equal(fake_quantize(once, qparams, spec), once)
    assert torch.equal(round_to_grid(numbers, qparams, spec), integers.float())


@few
@given(specs, lists, lists)
def test_the_map_is_torchs_own(spec: QuantSpec, values: list[float], x: list[float]) -> None:
    qparams, numbers = _qparams(spec, values), torch.tensor(x)
    theirs = torch.fake_quantize_per_tensor_affine(
        numbers, float(qparams.scale), int(qparams.zero_point), spec.qmin, spec.qmax
    )
    ours = fake_quantize(numbers, qparams, spec)
    # torch casts to an integer before it clamps, which far beyond the range is undefined
    inside = (numbers / qparams.scale).abs() < 2**30
    assert torch.equal(ours[inside], theirs[inside])


@few
@given(states, st.integers(0, 2**16))
def test_observers_merged_in_any_order_are_one_pass(parts: list[list[float]], seed: int) -> None:
    one, several = HistogramObserver(), [HistogramObserver() for _ in parts]
    one.observe(torch.tensor([value for part in parts for value in part]))
    for observer, part in zip(several, parts, strict=True):
        observer.observe(torch.tensor(part))
    random.Random(seed).shuffle(several)
    first, *others = several
    for other in others:
        first.merge(other)
    _assert_equal(first, one)
    read = HistogramObserver()
    read.load_state(first.state())
    _assert_equal(read, one)


def _assert_equal(a: HistogramObserver, b: HistogramObserver) -> None:
    for name, value in a.state().items():
        assert torch.equal(value, b.state()[name]), name


@few
@given(lists)
def test_observers_count_every_value(values: list[float]) -> None:
    observer = HistogramObserver()
    observer.observe(torch.tensor(values))
    assert int(observer.counts.sum()) == len(values)
    assert (observer.low, observer.high) == (torch.tensor(values).min(), torch.tensor(values).max())


shapes = st.lists(st.integers(1, 5), min_size=2, max_size=4)


@few
@given(shapes, st.integers(0, 2**16))
def test_packed_integers_come_back(shape: list[int], seed: int) -> None:
    integers = torch.randint(-8, 8, shape, generator=torch.Generator().manual_seed(seed)).to(torch.int8)
    packed = pack(integers)
    assert packed.shape == (shape[0], -(-integers[0].numel() // 2)) and packed.dtype == torch.uint8
    assert torch.equal(unpack(packed, integers.shape), integers)
    with pytest.raises(OctavoError, match="packed"):
        unpack(packed, torch.Size([shape[0] + 1, *shape[1:]]))
    with pytest.raises(OctavoError, match="packed"):
        unpack(packed.int(), integers.shape)


@few
@given(shapes, st.integers(2, 7), st.integers(2, 4), st.integers(0, 2**16))
def test_groups_multiplied_are_divided_again(shape: list[int], size: int, bits: int, seed: int) -> None:
    spec = QuantSpec(bits, granularity="per_group", narrow=True, group_size=size)
    generator = torch.Generator().manual_seed(seed)
    integers = torch.randint(spec.qmin, spec.qmax + 1, shape, generator=generator).to(torch.int8)
    multiplier = torch.randint(
        1, most_multiplier(spec) + 1, groups_shape(integers.shape, size), generator=generator
    ).to(torch.uint8)
    assert torch.equal(divide(multiply(integers, multiplier, spec), multiplier, spec), integers)
