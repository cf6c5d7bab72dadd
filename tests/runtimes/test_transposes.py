"""Transposes that undo each other: gone where nothing between them minds, and the numbers stay."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import openvino
import pytest
from openvino import opset13 as ops

from octavo.runtimes.core import openvino_core
from octavo.runtimes.transposes import without_pairs

TOKENS, INPUTS, WIDTH = 5, 8, 12


def convolution(x: Any, out: int, inputs: int, seed: int) -> Any:
    weight = np.random.default_rng(seed).standard_normal((out, inputs, 1, 1)).astype(np.float32)
    return ops.convolution(x, ops.constant(weight), [1, 1], [0, 0], [0, 0], [1, 1])


def to_tokens(image: Any) -> Any:
    last = ops.transpose(image, np.array([0, 2, 3, 1]))
    return ops.reshape(last, np.array([0, -1, WIDTH]), True)


def to_image(tokens: Any) -> Any:
    return ops.transpose(ops.unsqueeze(tokens, np.array([2])), np.array([0, 3, 1, 2]))


def rounded(x: Any, ends: Any = 3.0) -> Any:
    ends = np.float32(ends)
    return ops.fake_quantize(x, -ends, ends, -ends, ends, 256)


def numbers(*shape: int) -> Any:
    return ops.constant(np.linspace(0.5, 2, int(np.prod(shape)), dtype=np.float32).reshape(shape))


Between = Callable[[Any, Any], Any]
TAKEN_OUT: dict[str, Between] = {
    "nothing": lambda x, _: x,
    "a quantizer": lambda x, _: rounded(x),
    "GELU and a quantizer": lambda x, _: rounded(ops.gelu(x, "tanh")),
    "a number for a channel": lambda x, _: rounded(ops.multiply(ops.gelu(x, "erf"), numbers(WIDTH))),
    "the same with axes": lambda x, _: ops.add(ops.multiply(x, numbers(1, 1, WIDTH)), numbers(1)),
    "a gate": lambda x, other: rounded(ops.multiply(x, ops.gelu(other, "erf"))),
    "a swish": lambda x, _: ops.swish(x),
    "a swish with a factor": lambda x, _: ops.swish(x, numbers()),
    "a clamp": lambda x, _: rounded(ops.clamp(x, -1.0, 1.0)),
}
LEFT: dict[str, Between] = {
    "a softmax over channels": lambda x, _: ops.softmax(x, 2),
    "a number for a token": lambda x, _: ops.multiply(x, numbers(TOKENS, 1)),
    "a number for each": lambda x, _: ops.add(x, numbers(1, TOKENS, WIDTH)),
    "what was never an image": lambda x, _: ops.add(x, ops.reduce_mean(x, np.array([1]), True)),
}


def pixels(image: Any) -> Any:
    return ops.transpose(image, np.array([0, 2, 3, 1]))


def graph(between: Between, also_read: bool = False) -> openvino.Model:
    x = ops.parameter([-1, INPUTS, TOKENS, 1])
    one, other = (to_tokens(convolution(x, WIDTH, INPUTS, seed)) for seed in (0, 1))
    y = between(one, other)
    results = [convolution(to_image(y), 4, WIDTH, 2)]
    if also_read:
        results.append(ops.reduce_sum(y, np.array([1]), False))
    return openvino.Model(results, [x])


def transposes(model: openvino.Model) -> int:
    return [node.get_type_name() for node in model.get_ops()].count("Transpose")


def answers(model: openvino.Model, x: Any = None) -> list[Any]:
    if x is None:
        x = np.random.default_rng(3).standard_normal((2, INPUTS, TOKENS, 1)).astype(np.float32)
    compiled = openvino_core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return [np.array(y) for y in compiled([x]).to_tuple()]


@pytest.mark.parametrize("between", TAKEN_OUT.values(), ids=TAKEN_OUT)
def test_pairs_go_and_the_numbers_stay(between: Between) -> None:
    plain, ours = graph(between), graph(between)
    assert without_pairs(ours) == 1 and transposes(ours) == 0
    assert ours.output(0).get_partial_shape() == plain.output(0).get_partial_shape()
    for mine, theirs in zip(answers(ours), answers(plain), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("between", LEFT.values(), ids=LEFT)
def test_what_goes_by_tokens_keeps_them(between: Between) -> None:
    model = graph(between)
    before, expected = transposes(model), answers(model)
    assert without_pairs(model) == 0 and transposes(model) == before
    np.testing.assert_array_equal(answers(model)[0], expected[0])


def test_a_range_for_a_channel_keeps_them() -> None:
    """A graph that OpenVINO itself does not compile on the CPU: looked at alone."""
    model = graph(lambda x, _: rounded(x, np.linspace(1, 3, WIDTH, dtype=np.float32)))
    before = transposes(model)
    assert without_pairs(model) == 0 and transposes(model) == before


def test_what_something_else_reads_as_tokens_stays_tokens() -> None:
    between = TAKEN_OUT["GELU and a quantizer"]
    plain, ours = graph(between, also_read=True), graph(between, also_read=True)
    assert without_pairs(ours) == 0 and transposes(ours) == transposes(plain)
    for mine, theirs in zip(answers(ours), answers(plain), strict=True):
        np.testing.assert_array_equal(mine, theirs)


def test_a_chain_of_three_loses_both_pairs() -> None:
    x = ops.parameter([-1, INPUTS, TOKENS, 1])
    y = to_tokens(convolution(x, WIDTH, INPUTS, 0))
    for seed in (1, 2):
        y = to_tokens(convolution(to_image(rounded(ops.gelu(y, "tanh"))), WIDTH, WIDTH, seed))
    model = openvino.Model([y], [x])
    expected = answers(model)
    assert without_pairs(model) == 2 and transposes(model) == 1
    np.testing.assert_allclose(answers(model)[0], expected[0], rtol=1e-4, atol=1e-4)


def test_a_number_for_a_channel_where_tokens_are_as_many() -> None:
    """[C] and [L, 1] are told apart by their axes, not by their sizes."""
    for shape, gone in (((WIDTH,), 1), ((WIDTH, 1), 0)):
        x = ops.parameter([-1, INPUTS, WIDTH, 1])
        y = ops.multiply(to_tokens(convolution(x, WIDTH, INPUTS, 0)), numbers(*shape))
        model = openvino.Model([convolution(to_image(y), 4, WIDTH, 2)], [x])
        given = np.random.default_rng(3).standard_normal((2, INPUTS, WIDTH, 1)).astype(np.float32)
        (expected,) = answers(model, given)
        assert without_pairs(model) == gone
        np.testing.assert_allclose(answers(model, given)[0], expected, rtol=1e-4, atol=1e-4)


def test_images_with_channels_last_need_no_axis_more() -> None:
    x = ops.parameter([-1, INPUTS, 4, 5])
    y = rounded(ops.multiply(pixels(convolution(x, WIDTH, INPUTS, 0)), numbers(WIDTH)))
    last = convolution(ops.transpose(y, np.array([0, 3, 1, 2])), 4, WIDTH, 2)
    model, plain = openvino.Model([last], [x]), openvino.Model([last], [x]).clone()
    assert without_pairs(model) == 1 and transposes(model) == 0
    given = np.random.default_rng(3).standard_normal((2, INPUTS, 4, 5)).astype(np.float32)
    (answer,), (expected,) = answers(model, given), answers(plain, given)
    np.testing.assert_allclose(answer, expected, rtol=1e-4, atol=1e-4)


def test_tokens_and_an_image_are_not_mixed() -> None:
    """[N, H, W, C] and [N, L, C] may be added where H is 1 or the sizes agree, but not along these axes."""
    x, rows = ops.parameter([TOKENS, INPUTS, TOKENS, 4]), ops.parameter([TOKENS, INPUTS, 4, 1])
    image = pixels(convolution(x, WIDTH, INPUTS, 0))
    y = ops.gelu(ops.add(image, to_tokens(convolution(rows, WIDTH, INPUTS, 1))), "erf")
    last = convolution(ops.transpose(y, np.array([0, 3, 1, 2])), 4, WIDTH, 2)
    model = openvino.Model([last], [x, rows])
    assert without_pairs(model) == 0 and transposes(model) == 3


def test_tokens_that_are_cut_otherwise_stay() -> None:
    """A network's own reshape, of which the engine's converter may make one with that to tokens."""
    x = ops.parameter([-1, INPUTS, 8, 1])
    y = ops.reshape(pixels(convolution(x, WIDTH, INPUTS, 0)), np.array([-1, 4, WIDTH]), False)
    model = openvino.Model([convolution(to_image(ops.gelu(y, "erf")), 4, WIDTH, 2)], [x])
    assert without_pairs(model) == 0 and transposes(model) == 2


def test_another_reader_of_the_image_s_axis_keeps_both() -> None:
    x = ops.parameter([-1, INPUTS, TOKENS, 1])
    wide = ops.unsqueeze(ops.gelu(to_tokens(convolution(x, WIDTH, INPUTS, 0)), "erf"), np.array([2]))
    image = ops.transpose(wide, np.array([0, 3, 1, 2]))
    model = openvino.Model([convolution(image, 4, WIDTH, 2), ops.relu(wide)], [x])
    assert without_pairs(model) == 0 and transposes(model) == 2


def test_constants_alone_are_no_image() -> None:
    x = ops.parameter([-1, 4, 1, 1])
    token = rounded(ops.gelu(numbers(1, 1, WIDTH), "erf"))
    model = openvino.Model([ops.add(x, convolution(to_image(token), 4, WIDTH, 2))], [x])
    assert without_pairs(model) == 0 and transposes(model) == 1
    model = openvino.Model([ops.add(x, convolution(to_image(numbers(1, 1, WIDTH)), 4, WIDTH, 2))], [x])
    assert without_pairs(model) == 0
