"""Quantized pipelines as ordinary diffusers folders: save, load, register with diffusers."""

from __future__ import annotations

from octavo.checkpoint.config import OctavoConfig as OctavoConfig
from octavo.checkpoint.load import load as load
from octavo.checkpoint.registration import register as register
from octavo.checkpoint.save import float32_bytes as float32_bytes
from octavo.checkpoint.save import prepare_to_save as prepare_to_save
from octavo.checkpoint.save import save_pipeline as save_pipeline
from octavo.checkpoint.save import tensor_bytes as tensor_bytes
