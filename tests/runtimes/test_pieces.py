"""A kernel for each piece of an output: the same numbers, and no tensor copied apart."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers.models.activations import GEGLU, SwiGLU
from diffusers.models.upsampling import Upsample2D
from torch import nn

from octavo.quantization import (
    FLOAT,
    QuantSpec,
    SubPixelUpsample2D,
    qparams_from_range,
    quantize_layer,
    replace,
    round_nearest,
    walk,
)
from octavo.runtimes.audit import audit_compiled
from octavo.runtimes.calls import take_apart
from octavo.runtimes.core import openvino_core
from octavo.runtimes.integer_graph import to_integer_graph
from octavo.runtimes.pieces import kernels_by_piece, kernels_in_pieces
from octavo.runtimes.saturation import adds_in_16_bits


class Network(nn.Module):
    """One module between two layers; the sample first, as a denoiser has it."""

    def __init__(self, before: nn.Module, module: nn.Module, behind: nn.Module) -> None:
        super().__init__()
        self.before, self.module, self.behind = before, module, behind

    def forward(self, sample: torch.Tensor, size: Any = None) -> torch.Tensor:
        x = self.before(sample)
        x = self.module(x) if size is None else self.module(x, size)
        y: torch.Tensor = self.behind(x)
        return y


def upsampling() -> Network:
    upsample = SubPixelUpsample2D.of(Upsample2D(16, use_conv=True, out_channels=24))
    return Network(nn.Conv2d(4, 16, 1), upsample, nn.Conv2d(24, 4, 1))


def gated(kind: Any) -> Network:
    return Network(nn.Linear(8, 32), kind(32, 48), nn.Linear(48, 8))


def quantized(network: Network, x: torch.Tensor, bits: int = 8, multiplier: bool = False) -> Network:
    """Every layer, by what it reads of `x`; with a bias of its own for each output channel."""
    seen: dict[str, torch.Tensor] = {}
    noise = torch.Generator().manual_seed(0)
    hooks = [
        layer.register_forward_pre_hook(lambda module, args, name=name: seen.update({name: args[0]}))
        for name, layer in walk(network)
    ]
    with torch.no_grad():
        network(x)
    for hook in hooks:
        hook.remove()
    for name, layer in list(walk(network)):
        weights, inputs = QuantSpec(8, True, "per_channel", narrow=True), QuantSpec(bits)
        integers, scales = round_nearest(layer.weight, weights)
        m = torch.linspace(0.5, 2, layer.weight.shape[1]) if multiplier else None
        low, high = float(seen[name].min()) * 2, float(seen[name].max()) * 2
        nn.init.normal_(layer.bias, generator=noise)  # type: ignore[arg-type]
        ranges = qparams_from_range(inputs, low, high)
        replace(network, name, quantize_layer(layer, weights, inputs, integers, scales, ranges, m))
    return network.eval()


CASES = {
    "places": (upsampling, (3, 4, 5, 6)),
    "geglu": (lambda: gated(GEGLU), (3, 7, 8)),
    "swiglu": (lambda: gated(SwiGLU), (3, 7, 8)),
}


@pytest.fixture(params=CASES)
def case(request: Any) -> tuple[Network, torch.Tensor]:
    make, shape = CASES[request.param]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make(), torch.randn(shape)


@pytest.mark.parametrize("pointwise", [False, True])
@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize(("bits", "multiplier"), [(8, False), (8, True), (FLOAT, False)])
def test_the_numbers_are_the_same(
    case: Any, bits: int, multiplier: bool, split: bool, pointwise: bool
) -> None:
    network, x = case
    network = quantized(network, x, bits, multiplier)
    layers = [name for name, module in network.named_modules() if hasattr(module, "weight_int8")]
    with torch.no_grad():
        plain = network(x)
        with kernels_by_piece(network, layers if split else (), pointwise):
            goes_plain = split and isinstance(network.module, SubPixelUpsample2D)
            assert ("forward" in vars(network.module)) != goes_plain
            ours = network(x)
    assert "forward" not in vars(network.module) and "forward" not in vars(
        network.module.children().__next__()
    )
    if bits == FLOAT:  # nothing is rounded
        torch.testing.assert_close(ours, plain, atol=1e-5, rtol=1e-5)
    differ = ~torch.isclose(ours, plain, atol=1e-5, rtol=1e-5)  # sums in another order flip single roundings
    assert differ.float().mean() < 0.01 and (ours - plain).norm() < 0.01 * plain.norm()


def test_an_output_of_odd_size_goes_its_plain_way() -> None:
    network, x = upsampling(), torch.randn(2, 4, 5, 6)
    network = quantized(network, x)
    with torch.no_grad():
        plain = network(x, (9, 12))
        with kernels_by_piece(network):
            assert torch.equal(network(x, (9, 12)), plain) and plain.shape[2:] == (9, 12)


@pytest.mark.parametrize("pointwise", [False, True])
@pytest.mark.parametrize("are_split", [False, True])
def test_the_graph_copies_nothing_apart_and_runs_in_int8(case: Any, are_split: bool, pointwise: bool) -> None:
    """Of a layer that takes two kernels, a sub-pixel convolution goes its plain way."""

    network, x = case
    network = quantized(network, x)
    call = take_apart(network.forward, (x,), {})
    layers = [name for name, module in network.named_modules() if hasattr(module, "weight_int8")]
    split = layers if are_split else []
    model = to_integer_graph(network, call, split, pointwise=pointwise)
    model.reshape(list(x.shape))
    (in_pieces,) = kernels_in_pieces(model, network).values()
    is_places = isinstance(network.module, SubPixelUpsample2D)
    assert (
        in_pieces
        == {(True, False): 4, (True, True): 2, (False, False): 2, (False, True): 4}[is_places, are_split]
    )
    compiled = openvino_core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    kinds = [node.get_rt_info()["layerType"].astype(str) for node in compiled.get_runtime_model().get_ops()]
    if not (is_places and are_split):
        assert not {"Split", "StridedSlice", "Slice", "Pad", "Interpolate"} & set(kinds)
    rows = audit_compiled(compiled, layers, split, kernels_in_pieces(model, network))
    assert len(rows) == 3 and all(row.ok for row in rows), rows
    (name,) = kernels_in_pieces(model, network)
    more = audit_compiled(compiled, layers, split, {name: in_pieces + 1})
    assert [row.layer for row in more if not row.ok] == [name], "a kernel that is missing is told"
    if adds_in_16_bits() and not are_split:
        return  # where these sums overflow: such a CPU is given both kernels
    with torch.no_grad():
        plain = network(x)
    assert (torch.from_numpy(compiled(x.numpy())[0]) - plain).norm() < 0.01 * plain.norm(), (
        "single rounding flips"
    )


def test_what_somebody_else_changed_is_left_alone() -> None:
    network, x = gated(GEGLU), torch.randn(2, 3, 8)
    network = quantized(network, x)
    network.module.forward = lambda x: x[..., :1].expand(-1, -1, 48)  # type: ignore[method-assign,assignment]
    own = network.module.forward
    with kernels_by_piece(network):
        assert network.module.forward is own
    assert network.module.forward is own
