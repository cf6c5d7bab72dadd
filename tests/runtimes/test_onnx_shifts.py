"""Biases and time embeddings of an ONNX graph: where they are moved to, and that it computes the same."""

from __future__ import annotations

from collections import Counter

import pytest

pytest.importorskip("onnx", reason="the extra onnx is not installed")

import onnx_ir as ir
from onnx_graphs import draw, graph_of, inferred, rewritten

from octavo.runtimes import onnx_graph
from octavo.runtimes.onnx_shifts import take_shifts_off


@pytest.fixture
def any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_graph, "SMALLEST", 1)


NORMALIZED = """m = ReduceMean(h, last_pixels)  hh = Mul(h, h)  sq = ReduceMean(hh, last_pixels)
    mm = Mul(m, m)  v = Sub(sq, mm)  va = Add(v, s)  sd = Sqrt(va)  a = Div(c, sd)  ma = Mul(m, a)  b = Sub(d, ma)
    ha = Mul(h, a)  n = Add(ha, b)"""


@pytest.mark.parametrize("shift", ["h = Sub(x, d)", "h = Add(x, t)", "k = Sub(x, d)  h = Add(k, t)"])
def test_a_normalization_absorbs_what_is_the_same_for_all_pixels(any_size: None, shift: str) -> None:
    model = graph_of(
        f"{shift} {NORMALIZED} y = Neg(n)", "float[N,6,6,4] x, float[N,1,1,4] t", "float[N,6,6,4] y"
    )
    intermediate = ir.from_proto(model)
    onnx_graph.infer_shapes(intermediate)
    rewritten(model, inferred(take_shifts_off), x=draw(2, 6, 6, 4), t=draw(2, 1, 1, 4))
    take_shifts_off(intermediate)
    full = [node for node in intermediate.graph if list(node.outputs[0].shape[1:]) == [6, 6, 4]]
    assert sorted(node.op_type for node in full) == ["Add", "Mul", "Mul", "Neg"]


def test_small_images_are_left_alone() -> None:
    model = graph_of(f"h = Sub(x, d) {NORMALIZED} y = Neg(n)", "float[N,6,6,4] x", "float[N,6,6,4] y")
    before = Counter(node.op_type for node in model.graph.node)
    assert rewritten(model, inferred(take_shifts_off), x=draw(2, 6, 6, 4)) == before


@pytest.mark.parametrize(
    ("lines", "left"),
    [
        (
            "xs = Mul(x, s)  h = Sub(xs, c)  k = Sub(x, d)  n = Add(h, k)  y = Neg(n)",
            {"Mul": 1, "Add": 1, "Sub": 1, "Neg": 1},
        ),
        (
            "h = Sub(x, c)  k = Sub(x, d)  n = Add(h, k)  l = Mul(h, n)  y = Neg(l)",
            {"Sub": 2, "Add": 1, "Mul": 1, "Neg": 1},
        ),
    ],
    ids=["of its own", "that others read"],
)
def test_biases_of_a_sum_are_added_beforehand_unless_others_read_them(
    lines: str, left: dict[str, int]
) -> None:
    model = graph_of(lines, "float[N,6,6,4] x", "float[N,6,6,4] y")
    assert rewritten(model, inferred(take_shifts_off), x=draw(2, 6, 6, 4)) == left
