"""Small ONNX graphs in ONNX's own text, and what is left of them once they are rewritten."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from onnx.reference import ReferenceEvaluator

from octavo.runtimes.onnx_graph import infer_shapes


def graph_of(lines: str, inputs: str = "float[N,4,6,6] x", output: str = "float[N,4,6,6] y") -> Any:
    """A graph in ONNX's own text, with the constants that the tests share."""
    return onnx.parser.parse_model(
        f"""<ir_version: 9, opset_import: ["" : 20]>
        g ({inputs}) => ({output})
        <int64[2] pixels = {{2, 3}}, int64[2] last_pixels = {{1, 2}}, float[4] c = {{1.0, -2.0, 3.0, 0.5}},
         float s = {{0.05}},
         uint8 z = {{128}}, float[4] d = {{0.5, 1.5, -1.0, 2.0}},
         float[8] e = {{0.5, 1.5, -1.0, 2.0, 3.0, -0.5, 1.0, 0.25}},
         float[4,1,1] per_channel = {{2.0, -1.0, 0.5, 4.0}}, int64[8] pads = {{0, 0, 1, 0, 0, 0, 0, 2}},
         float[4] scales = {{1.0, 1.0, 2.0, 2.0}}, int64[1] one = {{1}}, int64[1] three = {{3}}, int64[1] axis = {{2}},
         float[4,4,1,1] weight = {{1,2,3,4,0,1,0,2,-1,2,-3,1,1,0,0,5}}, int64[4] grouped = {{0, 2, 2, 1}},
         int64[4] ungrouped = {{0, 4, 1, 1}}, int64[3] rows = {{0, 4, 36}}> {{ {lines} }}"""
    )


def inferred(rewrite: Callable[[Any], None]) -> Callable[[Any], None]:
    def both(model: Any) -> None:
        infer_shapes(model)
        rewrite(model)

    return both


def rewritten(model: Any, rewrite: Callable[[Any], None], **inputs: np.ndarray[Any, Any]) -> Counter[str]:
    """The operations left, once `rewrite` has been shown to change no output; the checker accepts the result."""
    onnx.checker.check_model(model, full_check=True)
    expected = ReferenceEvaluator(model).run(None, inputs)
    intermediate = ir.from_proto(model)
    rewrite(intermediate)
    lean = ir.to_proto(intermediate)
    onnx.checker.check_model(lean, full_check=True)
    for a, b in zip(ReferenceEvaluator(lean).run(None, inputs), expected, strict=True):
        assert a.shape == b.shape and np.allclose(a, b, rtol=1e-5, atol=1e-5)
    return Counter(node.op_type for node in lean.graph.node)


def draw(*shape: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)
