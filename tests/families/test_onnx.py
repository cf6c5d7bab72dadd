"""Families that ONNX's exporter once failed on, by ONNX Runtime: all layers in integers, any number of images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_families import FAMILIES, build
from tiny_guided import GUIDED

import octavo
from octavo.diffusion import find_denoiser, first_call, inputs_of_images
from octavo.errors import OctavoError

pytest.importorskip("onnxruntime", reason="the extra onnx is not installed")
pytestmark = pytest.mark.filterwarnings(
    "ignore:`FluxPosEmbed` is deprecated:FutureWarning"
)  # by Chroma's own code
RECIPE = octavo.PTQ4DM(samples=2, steps=2)


def evaluated(pipeline: Any, inputs: dict[str, Any], rows: int) -> torch.Tensor:
    given = inputs_of_images(inputs, list(range(rows)))
    args, kwargs = first_call(pipeline, batch_size=rows, inputs=given)
    with torch.no_grad():
        output: torch.Tensor = find_denoiser(pipeline)[1](*args, **{**kwargs, "return_dict": False})[0]
    return output


@pytest.mark.parametrize("family", ["pixart", "chroma"])
def test_it_is_the_simulation_in_integers(family: str, tmp_path: Path) -> None:
    """PixArt squeezes axes of other sizes than 1; Chroma makes constants of the number of rows."""
    original, inputs = build(family, FAMILIES | GUIDED)
    quantized = octavo.quantize(original, RECIPE, batch_size=2, inputs=inputs, progress=False)
    fast = octavo.accelerate(quantized, runtime="onnx", threads=1, batch_size=2, inputs=inputs)
    rows = octavo.audit(fast)
    assert len(rows) > 15 and all(row.ok for row in rows)
    for number in (1, 3):
        simulated, executed = (evaluated(pipeline, inputs, number) for pipeline in (quantized, fast))
        assert (executed - simulated).norm() < 0.01 * simulated.norm()
    given = inputs_of_images(inputs, [0, 1])
    if family == "chroma":
        with pytest.raises(
            OctavoError, match=r"^hidden_states: ChromaTransformer2DModel is exported for 2 rows alone"
        ):
            octavo.export(quantized, tmp_path / "free", "onnx", inputs=given)
        assert not list(tmp_path.iterdir())
    size = 2 if family == "chroma" else None
    written = octavo.export(quantized, tmp_path / "out", "onnx", inputs=given, batch_size=size)
    assert written.distance < 0.01 and len(written.audit) == len(rows)
