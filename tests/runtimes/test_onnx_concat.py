"""Skip connections of an ONNX graph: concatenated as integers, and that it computes the same."""

from __future__ import annotations

from collections import Counter

import pytest

pytest.importorskip("onnx", reason="the extra onnx is not installed")

import onnx_ir as ir
from onnx_graphs import draw, graph_of, inferred, rewritten

from octavo.runtimes import onnx_graph
from octavo.runtimes.onnx_concat import concatenate_integers

SKIP = """h = Concat<axis = 3>(x, w)  m = ReduceMean(h, last_pixels)  hh = Mul(h, h)  sq = ReduceMean(hh, last_pixels)
    b = Sub(m, sq)  ha = Mul(h, e)  n = Add(ha, b)  sig = Sigmoid(n)  f = Mul(n, sig)  q = QuantizeLinear(f, s, z)"""


@pytest.fixture
def any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_graph, "SMALLEST", 1)


def test_skip_connections_are_concatenated_as_integers(any_size: None) -> None:
    model = graph_of(
        f"{SKIP} y = DequantizeLinear(q, s, z)", "float[N,6,6,4] x, float[N,6,6,4] w", "float[N,6,6,8] y"
    )
    inputs = {"x": draw(2, 6, 6, 4), "w": 2 * draw(2, 6, 6, 4)}
    left = rewritten(model, inferred(concatenate_integers), **inputs)
    assert left["QuantizeLinear"] == 2 and left["Concat"] == 3 and left["Sigmoid"] == 2  # of q, m and sq
    intermediate = ir.from_proto(model)
    inferred(concatenate_integers)(intermediate)
    large = [
        node for node in intermediate.graph if node.op_type == "Concat" and node.outputs[0].shape[1] == 6
    ]
    assert [node.outputs[0].dtype for node in large] == [ir.DataType.UINT8]


def test_a_concatenation_that_others_read_stays(any_size: None) -> None:
    model = graph_of(
        f"{SKIP} u = DequantizeLinear(q, s, z)  v = Softmax(h)  y = Add(u, v)",
        "float[N,6,6,4] x, float[N,6,6,4] w",
        "float[N,6,6,8] y",
    )
    before = Counter(node.op_type for node in model.graph.node)
    assert rewritten(model, inferred(concatenate_integers), x=draw(2, 6, 6, 4), w=draw(2, 6, 6, 4)) == before
