"""Traces without an evaluation: the same graph, and an evaluation after all where a network asks for numbers."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import numpy as np
import openvino
import pytest
import torch
import torch.nn.functional as F
from tiny_families import build
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import octavo
from octavo.diffusion import find_denoiser, first_call
from octavo.runtimes import convert, integer_graph
from octavo.runtimes.calls import take_apart
from octavo.runtimes.core import openvino_core
from octavo.runtimes.integer_graph import to_integer_graph
from octavo.runtimes.network import float32_copy
from octavo.runtimes.tried_trace import tried
from octavo.runtimes.unevaluated import NeedsValues, unevaluated


class Network(nn.Module):
    """A function of one image between two products, as a denoiser."""

    def __init__(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.first, self.last = nn.Conv2d(4, 8, 3, padding=1), nn.Linear(8, 8)
        self.function = function

    def forward(self, sample: torch.Tensor) -> torch.Tensor:
        y = self.function(self.first(sample).permute(0, 2, 3, 1))
        return self.last(y)


@pytest.fixture
def without(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each trace did without an evaluation; that the networks here are tests' own is no reason not to."""
    found, real = [], convert.tried

    def noted(*args: Any) -> Any:
        result = real(*args)
        found.append(result is not None)
        return result

    monkeypatch.setattr(convert, "tried", noted)
    monkeypatch.setattr(convert, "has_foreign_code", lambda network: False)
    return found


def agrees(function: Callable[[torch.Tensor], torch.Tensor]) -> bool:
    """Whether the converted network computes what it does in torch."""
    network = Network(function).eval()
    x = torch.randn(3, 4, 6, 6, generator=torch.Generator().manual_seed(1))
    model = convert.to_openvino(network, take_apart(network.forward, (x,), {}))
    y = openvino_core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})(x.numpy())[0]
    with torch.no_grad():
        return np.allclose(y, network(x).numpy(), atol=1e-5)


def operations(model: openvino.Model) -> list[tuple[Any, ...]]:
    def value(node: Any) -> bytes:
        return node.data.tobytes() if node.get_type_name() == "Constant" else b""

    def name(node: Any) -> str:  # but for numbers that count on, and of inputs, which are told by their ports
        named = node.get_type_name() != "Parameter"
        return re.sub(r"_\d+", "", node.get_friendly_name()) if named else ""

    return [
        (
            node.get_type_name(),
            name(node),
            str(node.get_attributes()),
            [str(port.get_partial_shape()) for port in node.outputs()],
            value(node),
        )
        for node in model.get_ordered_ops()
    ]


@pytest.mark.filterwarnings(
    "ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning"
)
@pytest.mark.parametrize("name", ["sd", "dit", "flux", "svd"])
def test_the_graph_is_the_same(name: str, without: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    """Its operations, their names and shapes, and all constants, as of a trace that is evaluated."""
    original, inputs = build(name)
    recipe = octavo.PTQ4DM(samples=2, steps=2, metric="minmax")
    quantized = octavo.quantize(original, recipe, batch_size=2, inputs=inputs, progress=False)
    args, kwargs = first_call(quantized, batch_size=2, inputs=inputs)
    denoiser = float32_copy(find_denoiser(quantized)[1])
    call = take_apart(denoiser.forward, args, kwargs)
    ours = operations(to_integer_graph(denoiser, call))
    assert without == [True]
    monkeypatch.setattr(integer_graph, "has_foreign_code", lambda network: True)
    theirs = operations(to_integer_graph(denoiser, call))
    assert without == [True] and len(ours) == len(theirs) > 100
    assert [(a[:4], b[:4]) for a, b in zip(ours, theirs, strict=True) if a != b] == []


def half(y: torch.Tensor) -> torch.Tensor:
    return y * 0.5 if y.sum() > -1e9 else y


def longest(y: torch.Tensor) -> torch.Tensor:
    return y[:, : len(y[0].mean(dim=(1, 2)).tolist())]


def scaled(y: torch.Tensor) -> torch.Tensor:
    return y * float(np.ceil(y.abs().max().numpy()))


def at_the_largest(y: torch.Tensor) -> torch.Tensor:
    return y + y.flatten()[(y > y.mean()).flatten().nonzero()[0, 0]] * 0


def caught(y: torch.Tensor) -> torch.Tensor:
    """Goes on by an answer of its own where torch has none."""
    try:
        large = bool(y.abs().max() > 1e9)
    except Exception:
        large = True
    return y * 2 if large else y


def copied(y: torch.Tensor) -> torch.Tensor:
    weight = torch.ones(4)
    return y * torch.tensor([weight @ weight])


def of_another_shape(y: torch.Tensor) -> torch.Tensor:
    z = (y + 0).unsqueeze_(1)
    return (z * 3 if z.ndim == 5 else z)[:, 0]


def of_a_cell(y: torch.Tensor) -> torch.Tensor:
    state = torch.ones(1, 8) / 10
    weights = torch.ones(24, 8) / 50, torch.ones(24, 8) / 90
    return y + torch.gru_cell(state, state, *weights)


def taken_at_a_product(y: torch.Tensor) -> torch.Tensor:
    start = (torch.ones(2) @ torch.ones(2)).long()
    return y + torch.narrow(torch.arange(40.0), 0, start, 8)


def cut_at_a_product(y: torch.Tensor) -> torch.Tensor:
    return torch.cat(torch.tensor_split(y, (torch.ones(1, 2) @ torch.ones(2)).long(), dim=3), dim=3)


def by_a_mask(y: torch.Tensor) -> torch.Tensor:
    return y[:, torch.arange(6) < 4]


def into_a_part(y: torch.Tensor) -> torch.Tensor:
    whole = torch.ones(y.shape)
    whole[:, :3] = y[:, :3]
    return whole


def by_name(y: torch.Tensor) -> torch.Tensor:
    weight = torch.ones(8, 8, 4, 3) / 100
    return F.conv2d(y.permute(0, 3, 1, 2), weight, padding="same").permute(0, 2, 3, 1)


def of_one_image(y: torch.Tensor) -> torch.Tensor:
    return y + F.conv1d(torch.ones(3, 10), torch.ones(8, 3, 3)).mean(-1)


@pytest.mark.parametrize(
    "function",
    [
        *(half, longest, scaled, at_the_largest, by_a_mask, into_a_part, by_name, of_one_image),
        *(caught, copied, of_another_shape, of_a_cell, taken_at_a_product, cut_at_a_product),
    ],
)
@pytest.mark.filterwarnings("ignore:Using padding='same'")
def test_what_asks_for_numbers_is_evaluated(function: Any, without: list[bool]) -> None:
    assert agrees(function) and without == [False]


def in_place(y: torch.Tensor) -> torch.Tensor:
    y = y.clone()
    y += 1
    y[:, 2:4] *= 2
    y[..., 0] = 3
    return y.masked_fill_(torch.eye(6)[:, :, None] > 0, 0.5)


def parts(y: torch.Tensor) -> torch.Tensor:
    first, second = y.chunk(2, dim=-1)
    return torch.cat([first.sigmoid(), second.contiguous().view(y.shape[0], 6, 6, 4)], dim=-1)


def attention(y: torch.Tensor) -> torch.Tensor:
    tokens = y.flatten(1, 2).reshape(y.shape[0], 36, 2, 4).transpose(1, 2)
    y = F.scaled_dot_product_attention(tokens, tokens, tokens)
    return (y @ y.transpose(-1, -2) @ y).transpose(1, 2).reshape(y.shape[0], 6, 6, 8)


def transposed(y: torch.Tensor) -> torch.Tensor:
    weight = torch.ones(8, 8, 2, 2) / 10
    y = F.conv_transpose2d(y.permute(0, 3, 1, 2), weight, stride=2, output_padding=1)
    return F.conv2d(y, torch.ones(8, 8, 3, 3), None, 2, 0, (1, 1), groups=1).permute(0, 2, 3, 1)


def along_an_axis(y: torch.Tensor) -> torch.Tensor:
    y = F.conv1d(y.flatten(1, 2).transpose(-1, -2), torch.ones(8, 2, 3) / 6, padding=1, groups=4)
    y = F.conv_transpose1d(y, torch.ones(8, 1, 3) / 3, padding=1, groups=8).unflatten(2, (6, 6))
    y = F.conv3d(y[:, :, None], torch.ones(8, 8, 1, 1, 1) / 8)[:, :, 0]
    return y.permute(0, 2, 3, 1)


def resized(y: torch.Tensor) -> torch.Tensor:
    y = F.interpolate(y.permute(0, 3, 1, 2), scale_factor=2.0, mode="nearest")
    return F.group_norm(F.avg_pool2d(F.pad(y, (0, 1, 0, 1)), 2), 4).permute(0, 2, 3, 1)


def with_a_table(y: torch.Tensor) -> torch.Tensor:
    """Of whose numbers Python's are made, which depend on no product."""
    table = torch.arange(6.0).cumsum(0)
    return y * float(table[-1]) + table[: int(table[3])].sum()


def padded_by_a_shape(y: torch.Tensor) -> torch.Tensor:
    kernel = torch.ones(8, 1, 3, 3) / 9
    return F.conv2d(y.permute(0, 3, 1, 2), kernel, padding=kernel.shape[-1] // 2, groups=8).permute(
        0, 2, 3, 1
    )


def like_another(y: torch.Tensor) -> torch.Tensor:
    return y + torch.arange(8.0).expand_as(y)


def by_positions(y: torch.Tensor) -> torch.Tensor:
    return y[:, torch.arange(5, -1, -1)] + y[:, :, torch.tensor([0, 0, 1, 5, 5, 2])]


@pytest.mark.parametrize(
    "function",
    [
        in_place,
        parts,
        attention,
        transposed,
        along_an_axis,
        resized,
        with_a_table,
        by_positions,
        padded_by_a_shape,
        like_another,
    ],
)
def test_what_networks_do_is_not(function: Any, without: list[bool]) -> None:
    assert agrees(function) and without == [True]


def test_nothing_is_written() -> None:
    """Whatever is computed from products lies over each other, and has no values to be read."""
    x = torch.ones(2, 4, 8, 8)
    with torch.inference_mode(), unevaluated():
        first = F.conv2d(x, torch.ones(16, 4, 3, 3))
        second = F.silu(first).to(torch.bfloat16)
        large = (first.flatten(1) @ torch.ones(576, 1000)).softmax(-1)
        assert first.shape == second.shape == (2, 16, 6, 6) and second.dtype == torch.bfloat16
        assert large.shape == (2, 1000) and first.data_ptr() == second.data_ptr()
        assert torch.equal(x.sum() + x.mean(), torch.tensor(513.0))
        for read in (large.sum().item, large.tolist, lambda: bool(first.mean() > 0), lambda: large.nonzero()):
            with pytest.raises(NeedsValues):
                read()
    assert torch.equal(F.conv2d(x, torch.ones(16, 4, 3, 3)), torch.full((2, 16, 6, 6), 36.0))


def test_an_error_of_the_network_s_own_is_its_own(without: list[bool]) -> None:
    """As it comes with an evaluation."""
    network = Network(lambda y: y @ torch.ones(3, 3))
    x = torch.zeros(2, 4, 6, 6)
    with pytest.raises(octavo.OctavoError, match=r"OpenVINO cannot trace it \(.*12, 8"):
        convert.to_openvino(network, take_apart(network.forward, (x,), {}))
    assert without == [False]


def test_a_network_of_the_user_s_own_is_evaluated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convert, "tried", pytest.fail)
    assert agrees(torch.sin)


def test_what_a_module_kept_is_taken_back(without: list[bool]) -> None:
    """A product that it keeps for the next call would have no values; what has some may stay."""
    network = Network(torch.sin)
    network.kept, network.calls = None, 0  # type: ignore[assignment]

    def keeping(y: torch.Tensor) -> torch.Tensor:
        network.calls += 1
        if network.kept is None:
            network.kept = torch.eye(8) @ torch.ones(8, 8)
        return y @ network.kept

    network.function = keeping
    x = torch.ones(2, 4, 6, 6)
    for calls in (1, 2):
        convert.to_openvino(network, take_apart(network.forward, (x,), {}))
        assert torch.equal(network.kept, torch.ones(8, 8)) and network.calls == calls
    assert without == [False, True]


def test_what_cannot_be_taken_back_is_refused(without: list[bool]) -> None:
    kept: dict[str, torch.Tensor] = {}
    network = Network(lambda y: y @ kept.setdefault("w", torch.eye(8) @ torch.ones(8, 8)))
    x = torch.ones(2, 4, 6, 6)
    with pytest.raises(octavo.OctavoError, match=r"Network: it keeps what it computes"):
        convert.to_openvino(network, take_apart(network.forward, (x,), {}))


def test_an_interrupt_stops_it_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of the network is touched any more once the interrupt arrives where it is caught."""
    network, threads = Network(torch.sin), threading.active_count()

    def interrupted(waited_for: Future[None]) -> None:
        assert begun.wait(60)
        raise KeyboardInterrupt

    def goes_on(within: Any) -> None:
        with within():
            network.function = torch.cos
            begun.set()
            end = time.monotonic() + 60
            while time.monotonic() < end:
                torch.ones(2) @ torch.ones(2)
            ended.append(True)

    begun, ended = threading.Event(), list[bool]()
    monkeypatch.setattr(Future, "exception", interrupted)
    with pytest.raises(KeyboardInterrupt):
        tried(network, goes_on)
    assert not ended and threading.active_count() == threads and network.function is torch.sin


def test_whatever_goes_wrong_is_tried_with_values() -> None:
    """Strides on the meta device are not always those of a CPU, so that a view fails."""

    def fails(within: Any) -> None:
        with within():
            raise RuntimeError("view size is not compatible")

    assert tried(Network(torch.sin), fails) is None


def test_contexts_of_this_thread_are_no_other_s() -> None:
    for context in (
        torch.autocast("cpu", torch.bfloat16),
        torch.device("cpu"),
        FlopCounterMode(display=False),
    ):
        with context:
            assert tried(Network(torch.sin), lambda within: True) is None
    assert tried(Network(torch.sin), lambda within: torch.is_inference_mode_enabled())
