"""The layers against integers that are added up as int64, with no shared code."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from octavo.errors import OctavoError
from octavo.quantization import (
    FakeQuantizer,
    QParams,
    QuantConv1d,
    QuantConv2d,
    QuantLinear,
    QuantSpec,
    empty_layer,
    fake_quantize,
    integer_layers,
    qparams_from_range,
    quantize_layer,
    round_nearest,
)

WEIGHTS = QuantSpec(8, granularity="per_channel", narrow=True)
FULL_WEIGHTS = QuantSpec(8, granularity="per_channel")
U8, S8 = QuantSpec(8, symmetric=False), QuantSpec(8)
FLOAT_INPUTS = QuantSpec(32)
EXACT = 2**24


def qparams(scale: float, zero_point: int = 0) -> QParams:
    return QParams(torch.tensor(scale), torch.tensor(zero_point, dtype=torch.int32))


def per_channel(scale: torch.Tensor) -> QParams:
    return QParams(scale.float(), torch.zeros(len(scale), dtype=torch.int32))


def int64_sums(layer: Any, q: torch.Tensor) -> torch.Tensor:
    """`sum_k (q[k] - z) w[c, k]` in int64, kernel position by kernel position."""
    centred = q - int(layer.input_zero_point)
    weight = layer.weight_int8.long()
    if isinstance(layer, QuantLinear):
        return (centred.unsqueeze(-2) * weight).sum(-1)
    if isinstance(layer, QuantConv1d):
        centred, weight = centred.unsqueeze(2), weight.unsqueeze(2)
    stride, dilation = ((1,) * (2 - len(v)) + tuple(v) for v in (layer.stride, layer.dilation))
    size = weight.shape[2:]
    if layer.padding == "same":
        total = [d * (k - 1) for d, k in zip(dilation, size, strict=True)]
        sides = [(t // 2, t - t // 2) for t in total]
    elif layer.padding == "valid":
        sides = [(0, 0), (0, 0)]
    else:
        padding = (0,) * (2 - len(layer.padding)) + tuple(layer.padding)
        sides = [(p, p) for p in padding]
    if layer.padding_mode == "zeros":
        centred = F.pad(centred, (*sides[1], *sides[0]))
    else:
        centred = F.pad(centred.double(), (*sides[1], *sides[0]), mode=layer.padding_mode).long()
    height, width = (
        (centred.shape[2 + i] - dilation[i] * (size[i] - 1) - 1) // stride[i] + 1 for i in range(2)
    )
    per_group = layer.in_channels // layer.groups
    out = torch.zeros(len(q), layer.out_channels, height, width, dtype=torch.int64)
    for c, i, j in itertools.product(range(layer.out_channels), range(size[0]), range(size[1])):
        first = c * layer.groups // layer.out_channels * per_group
        top, left = i * dilation[0], j * dilation[1]
        window = centred[
            :,
            first : first + per_group,
            top : top + (height - 1) * stride[0] + 1 : stride[0],
            left : left + (width - 1) * stride[1] + 1 : stride[1],
        ]
        out[:, c] += (window * weight[c, :, i, j].view(1, -1, 1, 1)).sum(1)
    return out.squeeze(2) if isinstance(layer, QuantConv1d) else out


def expected(layer: Any, q: torch.Tensor) -> torch.Tensor:
    """The one rescaling of the int64 sums, in float32."""
    shape = (-1,) if isinstance(layer, QuantLinear) else (-1, *[1] * (layer.weight_int8.ndim - 2))
    y = int64_sums(layer, q).float() * (layer.input_scale * layer.weight_scale).view(shape)
    return y if layer.bias is None else y + layer.bias.view(shape)


def integer_layer(
    layer: nn.Module, input_spec: QuantSpec, zero_point: int, generator: torch.Generator
) -> Any:
    """`layer` with random full-range integers and dyadic scales, so that integers survive the float input."""
    shape = layer.weight.shape
    weight = torch.randint(-128, 128, shape, generator=generator, dtype=torch.int8)
    scale = per_channel(2.0 ** torch.randint(-9, -4, shape[:1], generator=generator))
    return quantize_layer(layer, FULL_WEIGHTS, input_spec, weight, scale, qparams(2.0**-5, zero_point))


def random_integers(
    shape: tuple[int, ...], spec: QuantSpec, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Integers with both ends among them, and the place of each within the float input's rounding cell."""
    q = torch.randint(spec.qmin, spec.qmax + 1, shape, generator=generator)
    q.view(-1)[:2] = torch.tensor([spec.qmin, spec.qmax])
    return q, torch.rand(shape, generator=generator) * 0.9 - 0.45


@pytest.mark.filterwarnings("ignore:`torch.jit.trace:DeprecationWarning")
def test_a_trace_computes_no_weight_that_the_network_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """A whole float copy of a network stayed in the heap's holes: torch's tracer reads whatever `dir` names."""
    layer = quantize_layer(
        nn.Linear(2, 2), WEIGHTS, U8, *round_nearest(torch.eye(2), WEIGHTS, "minmax"), qparams(0.1)
    )
    weight, read = layer.weight, []
    monkeypatch.setattr(type(layer), "weight", property(lambda self: read.append(self) or weight))
    traced = torch.jit.trace(nn.Sequential(layer), torch.ones(1, 2))
    assert torch.equal(traced(torch.ones(1, 2)), layer(torch.ones(1, 2)))
    assert not read and layer.weight is weight and len(read) == 1


CONVOLUTIONS: list[tuple[type[nn.Module], dict[str, Any]]] = [
    (nn.Conv2d, {"kernel_size": 3, "padding": 1}),
    (nn.Conv2d, {"kernel_size": 3, "padding": 1, "stride": 2}),
    (nn.Conv2d, {"kernel_size": 3, "padding": (2, 0), "dilation": (2, 1), "groups": 2}),
    (nn.Conv2d, {"kernel_size": (1, 3), "stride": (2, 1), "groups": 4, "bias": False}),
    (nn.Conv2d, {"kernel_size": 1}),
    (nn.Conv2d, {"kernel_size": 4, "padding": "same"}),
    (nn.Conv2d, {"kernel_size": 3, "padding": "valid"}),
    (nn.Conv2d, {"kernel_size": 3, "padding": 1, "padding_mode": "reflect"}),
    (nn.Conv2d, {"kernel_size": 3, "padding": 2, "padding_mode": "circular", "stride": 2}),
    (nn.Conv2d, {"kernel_size": 3, "padding": 1, "padding_mode": "replicate"}),
    (nn.Conv1d, {"kernel_size": 3, "padding": 1}),
    (nn.Conv1d, {"kernel_size": 3, "padding": 4, "dilation": 2, "stride": 2, "groups": 4}),
    (nn.Conv1d, {"kernel_size": 1, "bias": False}),
]


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize(("kind", "options"), CONVOLUTIONS)
@pytest.mark.parametrize(("spec", "zero_point"), [(U8, 0), (U8, 77), (U8, 255), (S8, 0)])
def test_convolutions_are_the_integer_kernel(
    kind: type[nn.Module],
    options: dict[str, Any],
    spec: QuantSpec,
    zero_point: int,
    generator: torch.Generator,
) -> None:
    layer = integer_layer(kind(8, 12, **options), spec, zero_point, generator)
    q, within = random_integers((2, 8, 7, 9) if kind is nn.Conv2d else (2, 8, 11), spec, generator)
    x = (q - zero_point + within) * layer.input_scale
    assert torch.equal(layer(x), expected(layer, q))


@pytest.mark.parametrize(
    "options",
    [
        {"kernel_size": (3, 1, 1), "padding": (1, 0, 0)},
        {"kernel_size": 3, "padding": 1, "stride": (1, 2, 2)},
        {"kernel_size": (2, 3, 1), "groups": 4, "dilation": (2, 1, 1), "bias": False},
        {"kernel_size": 3, "padding": 1, "padding_mode": "replicate"},
    ],
)
@pytest.mark.parametrize(("spec", "zero_point"), [(U8, 77), (S8, 0)])
def test_convolutions_over_time_are_the_integer_kernel(
    options: dict[str, Any], spec: QuantSpec, zero_point: int, generator: torch.Generator
) -> None:
    """By torch's own convolution of float64, in which sums of integers are exact below 2^53."""
    conv = nn.Conv3d(8, 12, **options)
    layer = integer_layer(conv, spec, zero_point, generator)
    q, within = random_integers((2, 8, 5, 6, 7), spec, generator)
    exact = copy.deepcopy(conv).double()
    exact.weight.data, exact.bias = layer.weight_int8.double(), None
    with torch.no_grad():
        sums = exact((q - zero_point).double()).float()
    y = sums * (layer.input_scale * layer.weight_scale).view(-1, 1, 1, 1)
    if layer.bias is not None:
        y = y + layer.bias.view(-1, 1, 1, 1)
    assert torch.equal(layer((q - zero_point + within) * layer.input_scale), y)


@pytest.mark.parametrize("shape", [(5, 16), (2, 3, 16), (16,)])
@pytest.mark.parametrize(("spec", "zero_point"), [(U8, 0), (U8, 131), (S8, 0), (QuantSpec(4, False), 5)])
def test_linear_is_the_integer_kernel(
    shape: tuple[int, ...], spec: QuantSpec, zero_point: int, generator: torch.Generator
) -> None:
    layer = integer_layer(nn.Linear(16, 6), spec, zero_point, generator)
    q, within = random_integers(shape, spec, generator)
    x = (q - zero_point + within) * layer.input_scale
    assert torch.equal(layer(x), expected(layer, q))


@pytest.mark.parametrize(("spec", "zero_point"), [(U8, 0), (U8, 100), (S8, 0)])
def test_inputs_beyond_the_range_saturate(
    spec: QuantSpec, zero_point: int, generator: torch.Generator
) -> None:
    layer = integer_layer(nn.Linear(4, 3), spec, zero_point, generator)
    x = torch.tensor([[-1e30, 1e30, -1e4, 1e4]])
    q = torch.tensor([[spec.qmin, spec.qmax, spec.qmin, spec.qmax]])
    assert torch.equal(layer(x), expected(layer, q))


def test_padding_is_real_zero() -> None:
    conv = nn.Conv2d(1, 1, 3, padding=1, bias=False)
    weight = torch.full((1, 1, 3, 3), 127, dtype=torch.int8)
    layer = QuantConv2d.from_float(conv, WEIGHTS, U8, weight, per_channel(torch.ones(1)), qparams(1.0, 200))
    assert layer(torch.zeros(1, 1, 4, 4)).abs().max() == 0
    assert layer(torch.ones(1, 1, 1, 1)).item() == 127


@pytest.mark.parametrize(
    ("activation", "weight"), [(255, 127), (255, -128), (-255, -128), (-255, 127), (127, 127), (-128, -128)]
)
def test_largest_sums_that_are_exact(activation: int, weight: int) -> None:
    """As many terms of the largest size as stay below 2^24, all of one sign: still the exact integer."""
    terms = (EXACT - 1) // abs(activation * weight)
    spec, zero_point = (S8, 0) if abs(activation) < 200 else (U8, 0 if activation > 0 else 255)
    linear = nn.Linear(terms, 1, bias=False)
    integers = torch.full((1, terms), weight, dtype=torch.int8)
    layer = QuantLinear.from_float(
        linear, FULL_WEIGHTS, spec, integers, per_channel(torch.ones(1)), qparams(1.0, zero_point)
    )
    assert layer(torch.full((1, terms), float(activation))).item() == terms * activation * weight


def test_deviation_beyond_2_to_the_24_is_what_the_documentation_says(generator: torch.Generator) -> None:
    """Stable Diffusion's largest kernel, 2560 channels of 3x3, with sums all of one sign."""
    layer = integer_layer(nn.Conv2d(2560, 2, 3, bias=False), U8, 0, generator)
    layer.weight_int8.random_(64, 128, generator=generator)
    layer.weight_scale.fill_(1.0)
    layer.input_scale.fill_(1.0)
    q = torch.randint(128, 256, (1, 2560, 4, 4), generator=generator)
    exact = int64_sums(layer, q)
    assert exact.max() > 16 * EXACT
    relative = ((layer(q.float()).double() - exact) / exact).abs().max()
    assert 0 < relative < 5e-6  # 1.5e-6 where registers hold 16 partial sums (AVX512), 3.9e-6 where 8 (AVX2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("layer", "shape"), [(nn.Conv2d(4, 4, 3, padding=1), (2, 4, 5, 5)), (nn.Linear(6, 3), (4, 6))]
)
def test_half_inputs_are_computed_in_float32(
    layer: nn.Module, shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator
) -> None:
    quantized = integer_layer(layer, U8, 120, generator)
    x = torch.randn(shape, generator=generator).to(dtype)
    assert quantized(x).dtype == dtype
    assert torch.equal(quantized(x), quantized(x.float()).to(dtype))


@pytest.mark.parametrize("cast", ["bfloat16", "half", "double", "to", "type"])
def test_casts_leave_integers_and_scales_alone(cast: str, generator: torch.Generator) -> None:
    quantized = integer_layer(nn.Conv2d(3, 5, 3), U8, 3, generator)
    quantized.weight_scale.fill_(1.0001)
    model = nn.Sequential(quantized, FakeQuantizer(S8, qparams(0.1001)))
    before = copy.deepcopy(dict(model.named_buffers()))
    if cast == "to":
        model.to(torch.bfloat16)
    elif cast == "type":
        model.type(torch.float16)
    else:
        getattr(model, cast)()
    for name, buffer in model.named_buffers():
        assert buffer.dtype == before[name].dtype, name
        assert torch.equal(buffer, before[name]), name
    assert quantized.bias.dtype != torch.float32  # the bias tells the model's dtype
    assert "weight_scale" in quantized.state_dict()


def test_cast_and_move_together() -> None:
    layer = QuantLinear(nn.Linear(2, 3), WEIGHTS, U8, device="cpu")
    layer.to("meta", torch.bfloat16)
    assert {str(buffer.device) for buffer in layer.buffers()} == {"meta"}
    assert layer.weight_scale.dtype == torch.float32
    layer.to_empty(device="cpu")
    assert layer.weight_int8.dtype == torch.int8 and layer.weight_int8.device.type == "cpu"


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Conv2d(8, 8, 3, padding=1), (2, 8, 6, 6)),
        (nn.Conv1d(8, 8, 3, padding=1), (2, 8, 10)),
        (nn.Linear(8, 8), (2, 5, 8)),
    ],
)
def test_simulates_fake_quantized_tensors(
    layer: nn.Module, shape: tuple[int, ...], generator: torch.Generator
) -> None:
    """What a tracer sees, the float operation on fake-quantized tensors, differs by float rounding only."""
    with torch.no_grad():
        layer.weight.copy_(torch.randn(layer.weight.shape, generator=generator))
    x = torch.randn(shape, generator=generator)
    integers, weight_qparams = round_nearest(layer.weight, WEIGHTS)
    input_qparams = qparams(0.0251, 119)
    quantized = quantize_layer(layer, WEIGHTS, U8, integers, weight_qparams, input_qparams)
    assert torch.equal(
        quantized.weight,
        fake_quantize(layer.weight.detach(), weight_qparams, WEIGHTS),
    )
    floats = copy.deepcopy(layer)
    floats.weight = nn.Parameter(quantized.weight)
    torch.testing.assert_close(
        quantized(x), floats(fake_quantize(x, input_qparams, U8)).detach(), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Conv2d(8, 6, 3, padding=1), (2, 8, 7, 9)),
        (nn.Conv2d(8, 6, 3, groups=2), (2, 8, 7, 9)),
        (nn.Conv1d(8, 6, 3), (2, 8, 11)),
        (nn.Linear(30, 6), (5, 30)),
    ],
)
def test_groups_are_the_same_integer_kernel(
    layer: nn.Module, shape: tuple[int, ...], generator: torch.Generator
) -> None:
    """One scale per channel still: the multipliers are within the integers, which are near the weight."""
    spec = QuantSpec(4, granularity="per_group", narrow=True, group_size=16)
    layer.weight.data[:, ::3] *= 4
    integers, weight_qparams = round_nearest(layer.weight, spec)
    quantized = quantize_layer(layer, spec, U8, integers, weight_qparams, qparams(2.0**-5, 77))
    q, within = random_integers(shape, U8, generator)
    x = (q - 77 + within) * quantized.input_scale
    torch.testing.assert_close(quantized(x), expected(quantized, q), rtol=1e-6, atol=1e-6)
    error = (quantized.weight - layer.weight.detach()).norm() / layer.weight.detach().norm()
    assert 0.01 < float(error) < 0.2
    assert "w4a8, group_size=16" in repr(quantized)


def test_groups_that_do_not_fit_are_refused() -> None:
    linear = nn.Linear(6, 2)
    spec = QuantSpec(4, granularity="per_group", narrow=True, group_size=4)
    zeros, m = torch.zeros(2, dtype=torch.int32), torch.tensor([[1, 3], [2, 1]], dtype=torch.uint8)
    integers = torch.tensor([[1, -7, 2, 0, 21, -3], [14, -2, 0, 2, 5, 1]], dtype=torch.int8)

    def build(integers: torch.Tensor, m: torch.Tensor | None, spec: QuantSpec = spec) -> Any:
        weight_qparams = QParams(torch.ones(2), zeros, m)
        return quantize_layer(linear, spec, U8, integers, weight_qparams, qparams(1.0))

    assert torch.equal(build(integers, m).group_multiplier, m)
    for change, message in (
        ((integers, None), "multipliers for weights per_group"),
        ((integers, m, WEIGHTS), "multipliers for weights per_group"),
        ((integers, m * 0), "from 1 to 18"),
        ((integers, m * 19), "from 1 to 18"),
        ((integers, m[:, :1]), "from 1 to 18"),
        ((integers + 1, m), "no multiples"),
        ((integers * 2, m), "outside"),
    ):
        with pytest.raises(OctavoError, match=message):
            build(*change)


def test_state_dict_loads_into_an_empty_layer(generator: torch.Generator) -> None:
    conv = nn.Conv2d(4, 6, 3, padding=1)
    full = integer_layer(conv, U8, 9, generator)
    assert {name: value.dtype for name, value in full.state_dict().items()} == {
        "bias": torch.float32,
        "weight_int8": torch.int8,
        "weight_scale": torch.float32,
        "input_scale": torch.float32,
        "input_zero_point": torch.int32,
    }
    empty = QuantConv2d(conv, FULL_WEIGHTS, U8)
    assert all(tensor.is_meta for tensor in empty.state_dict().values())
    empty.load_state_dict(full.state_dict(), assign=True)
    x = torch.randn(1, 4, 5, 5, generator=generator)
    assert torch.equal(empty(x), full(x))


def test_the_float_layer_is_left_alone_and_its_mode_kept(generator: torch.Generator) -> None:
    linear = nn.Linear(3, 3).eval().to(torch.float16)
    quantized = integer_layer(linear, U8, 0, generator)
    assert not quantized.training and quantized.bias.dtype == torch.float32
    quantized.bias.data.zero_()
    assert linear.bias.abs().max() > 0
    assert "w8a8" in repr(quantized)


def test_what_does_not_fit_is_refused() -> None:
    linear, integers = nn.Linear(3, 2), torch.zeros(2, 3, dtype=torch.int8)
    good: dict[str, Any] = {
        "layer": linear,
        "weight_spec": WEIGHTS,
        "input_spec": U8,
        "weight_int8": integers,
        "weight_qparams": per_channel(torch.ones(2)),
        "input_qparams": qparams(1.0),
    }
    QuantLinear.from_float(**good)
    for change, message in (
        ({"weight_spec": S8}, "per_channel"),
        ({"weight_spec": QuantSpec(8, False, "per_channel")}, "symmetric"),
        ({"input_spec": WEIGHTS}, "per_tensor"),
        ({"weight_int8": integers.T}, "weight_int8"),
        ({"weight_int8": integers.int()}, "weight_int8"),
        ({"weight_int8": integers - 128}, "outside"),
        ({"weight_qparams": qparams(1.0)}, "weight_qparams"),
        ({"input_qparams": per_channel(torch.ones(2))}, "input_qparams"),
    ):
        with pytest.raises(OctavoError, match=message):
            QuantLinear.from_float(**{**good, **change})
    with pytest.raises(TypeError, match="QuantConv2d takes the place of Conv2d"):
        QuantConv2d.from_float(**good)


@pytest.mark.parametrize("kind", [nn.Conv2d, nn.Linear])
@pytest.mark.parametrize("weights", [FULL_WEIGHTS, QuantSpec(4, granularity="per_channel", narrow=True)])
def test_float_activations_meet_the_dequantized_weight(
    kind: Any, weights: QuantSpec, generator: torch.Generator
) -> None:
    """Nothing of the input is rounded or cut off, before or after a state dict."""
    layer = kind(8, 12, 3, padding=1) if kind is nn.Conv2d else kind(8, 12)
    x = torch.randn(2, 8, 5, 5, generator=generator) if kind is nn.Conv2d else torch.randn(3, 8)
    x = 1e4 * x
    integers, of_weights = round_nearest(layer.weight, weights, "minmax")
    nothing = qparams_from_range(FLOAT_INPUTS, -1.0, 1.0)
    new = quantize_layer(layer, weights, FLOAT_INPUTS, integers, of_weights, nothing)
    exact = copy.deepcopy(layer)
    exact.weight.data = new.weight
    with torch.no_grad():
        # outputs are of 1e4: last bits, where a CPU's kernel adds the bias at another place
        torch.testing.assert_close(new(x), exact(x), rtol=1e-5, atol=5e-3)
        assert new(x.half()).dtype == torch.float16
    other = empty_layer(layer, weights, FLOAT_INPUTS, device="cpu")
    other.load_state_dict(new.state_dict())
    with torch.no_grad():
        assert torch.equal(other(x), new(x))
    assert f"w{weights.bits}afloat" in repr(new) and not list(integer_layers(nn.Sequential(new)))
