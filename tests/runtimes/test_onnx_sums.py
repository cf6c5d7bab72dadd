"""Means over pixels of an ONNX graph: products that give the same numbers."""

from __future__ import annotations

import pytest

pytest.importorskip("onnx", reason="the extra onnx is not installed")

from onnx_graphs import draw, graph_of, inferred, rewritten

from octavo.runtimes.onnx_sums import means_by_products


def test_means_over_pixels_are_products() -> None:
    model = graph_of(
        "m = ReduceMean(x, last_pixels)  xx = Mul(x, x)  sq = ReduceMean(xx, last_pixels)  y = Sub(m, sq)",
        "float[N,6,6,4] x",
        "float[N,1,1,4] y",
    )
    left = rewritten(model, inferred(means_by_products), x=draw(3, 6, 6, 4))
    assert left == {"Reshape": 1, "Mul": 1, "MatMul": 2, "Sub": 1}
    model = graph_of("m = ReduceMean(x, one)  y = Neg(m)", "float[N,6,4] x", "float[N,1,4] y")
    assert rewritten(model, inferred(means_by_products), x=draw(3, 6, 4)) == {"MatMul": 1, "Neg": 1}
