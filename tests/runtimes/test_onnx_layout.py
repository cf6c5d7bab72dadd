"""Transpositions of an ONNX graph: which are left out, and that it computes the same."""

from __future__ import annotations

from collections import Counter

import pytest

pytest.importorskip("onnx", reason="the extra onnx is not installed")

from onnx_graphs import draw, graph_of, rewritten

from octavo.runtimes.onnx_layout import keep_channels_last

LAST, FIRST = "Transpose<perm = [0, 2, 3, 1]>", "Transpose<perm = [0, 3, 1, 2]>"


@pytest.mark.parametrize(
    ("between", "operations"),
    [
        ("b = Sigmoid(a)", {"Sigmoid": 1}),
        ("k = Mul(a, per_channel)  b = Add(k, a)", {"Mul": 1, "Add": 1}),
        ("k = Concat<axis = 1>(a, a)  b = Slice(k, one, three, one)", {"Concat": 1, "Slice": 1}),
        ("k = Pad(a, pads)  b = Slice(k, one, three, axis)", {"Pad": 1, "Slice": 1}),
        ('b = Resize<mode = "nearest", coordinate_transformation_mode = "asymmetric">(a, , scales)', {"Resize": 1}),
        ("q = QuantizeLinear(a, s, z)  b = DequantizeLinear(q, s, z)", {"QuantizeLinear": 1, "DequantizeLinear": 1}),
        ("m = ReduceMean(a, pixels)  n = Reshape(m, grouped)  r = Reshape(n, ungrouped)  b = Sub(a, r)",
         {"ReduceMean": 1, "Reshape": 2, "Sub": 1}),
        ("k = Reshape(a, rows)  b = Abs(k)", {"Reshape": 1, "Abs": 1, "Transpose": 1}),
        ("b = Conv(a, weight, c)", {"MatMul": 1, "Add": 1}),
    ],
)  # fmt: skip
def test_transpositions_cancel(between: str, operations: dict[str, int]) -> None:
    """Between a layout and its inverse all is done in channels last."""
    last = LAST if "rows" not in between else "Transpose<perm = [0, 2, 1]>"
    size = "H,W,C" if last == LAST else "L,C"
    model = graph_of(
        f"w = Exp(x)  a = {FIRST}(w)  {between}  v = {last}(b)  y = Neg(v)",
        "float[N,6,6,4] x",
        f"float[N,{size}] y",
    )
    left = rewritten(model, keep_channels_last, x=draw(3, 6, 6, 4))
    expected = Counter({"Exp": 1, "Neg": 1}) + Counter(operations)
    expected.pop("Transpose", None)
    assert left == expected


def test_what_is_not_known_reads_channels_first() -> None:
    model = graph_of(
        f"a = {FIRST}(x)  b = Sigmoid(a)  k = Softmax<axis = 1>(b)  y = {LAST}(k)",
        "float[N,6,6,4] x",
        "float[N,6,6,4] y",
    )
    left = rewritten(model, keep_channels_last, x=draw(3, 6, 6, 4))
    assert left == {"Sigmoid": 1, "Softmax": 1, "Transpose": 2}


def test_a_float_convolution_is_turned_once() -> None:
    """Its input in channels first, and what it writes once for all that read it in channels last."""
    model = graph_of(
        f"a = Conv<strides = [2, 2]>(x, weight)  b = Relu(a)  k = {LAST}(b)  l = {LAST}(a)  m = Add(k, l)"
        f"  y = {FIRST}(m)",
        output="float[N,4,3,3] y",
    )
    assert rewritten(model, keep_channels_last, x=draw(2, 4, 6, 6)) == {
        "Conv": 1,
        "Transpose": 2,
        "Relu": 1,
        "Add": 1,
    }


def test_axes_of_size_one_are_not_copied() -> None:
    lines = "a = Reshape(x, grouped)  b = Transpose<perm = [0, 1, 3, 2]>(a)  y = Neg(b)"
    model = graph_of(lines, "float[N,4] x", "float[N,2,1,2] y")
    assert rewritten(model, keep_channels_last, x=draw(3, 4)) == {"Reshape": 2, "Neg": 1}
