"""Diffusers' `PipelineQuantizationConfig`, by which one call says how each component is quantized."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMPipeline
from diffusers.quantizers import PipelineQuantizationConfig

import octavo
from octavo.checkpoint import OctavoConfig
from octavo.checkpoint.quantizer import quantizer_of


@pytest.fixture
def mapping(quantized: Any) -> PipelineQuantizationConfig:
    config = OctavoConfig.from_dict(quantizer_of(quantized.unet).quantization_config.to_dict())
    return PipelineQuantizationConfig(quant_mapping={"unet": config})


def test_a_quantized_folder_loads_by_it(
    saved: Path, quantized: Any, mapping: PipelineQuantizationConfig
) -> None:
    with pytest.warns(UserWarning, match="already has a `quantization_config`"):
        loaded = DDIMPipeline.from_pretrained(saved, quantization_config=mapping)
    state, expected = loaded.unet.state_dict(), quantized.unet.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in expected.items())


def test_full_precision_weights_are_refused_with_what_to_do(
    pipeline: Any, mapping: PipelineQuantizationConfig, tmp_path: Path
) -> None:
    pipeline.save_pretrained(tmp_path / "float")
    with pytest.raises(octavo.OctavoError, match=r"calibrate them with octavo\.quantize"):
        DDIMPipeline.from_pretrained(tmp_path / "float", quantization_config=mapping)
