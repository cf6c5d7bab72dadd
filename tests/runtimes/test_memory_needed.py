from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from diffusers import DDIMPipeline

from octavo.quantization import quantized_layers
from octavo.runtimes import memory_needed
from octavo.runtimes.memory_needed import COPIES, conversion_bytes
from octavo.runtimes.openvino import OpenVINOExecutor


def test_too_little_memory_to_convert_is_told_once_and_not_where_it_was_converted_before(
    quantized: DDIMPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(memory_needed, "available", lambda: 1000)
    x = torch.zeros(1, 3, 8, 8)
    for told in (1, 0):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            OpenVINOExecutor(quantized.unet, precision="f32", cache=tmp_path)(x, 10)
        lines = [
            line for line in map(logging.LogRecord.getMessage, caplog.records) if "converting the" in line
        ]
        assert len(lines) == told and "\n" not in "".join(lines)
    monkeypatch.setattr(memory_needed, "available", lambda: None)
    caplog.clear()
    OpenVINOExecutor(quantized.unet, precision="f32", cache=tmp_path / "other")(x, 10)
    assert "converting the" not in caplog.text


def test_a_second_kernel_takes_its_weights_again(quantized: DDIMPipeline) -> None:
    layers = dict(quantized_layers(quantized.unet))
    once = conversion_bytes(quantized.unet)
    assert once == COPIES * sum(layer.weight_int8.numel() for layer in layers.values())
    (name, layer), *_ = layers.items()
    assert conversion_bytes(quantized.unet, [name]) == once + COPIES * layer.weight_int8.numel()
