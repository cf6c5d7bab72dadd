from __future__ import annotations

from typing import Any

import pytest
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from tiny_families import build

import octavo
from octavo.runtimes.edits import EDITS


@pytest.fixture(scope="module")
def fast() -> Any:
    pipeline, inputs = build("sd")
    return octavo.accelerate(pipeline, precision="f32", inputs=inputs)


def test_every_edit_is_a_method_that_diffusers_has() -> None:
    assert [
        name for name in EDITS if name != "enable_cache" and not hasattr(UNet2DConditionModel, name)
    ] == []


def test_what_would_change_nothing_is_refused_in_one_line(fast: Any) -> None:
    """FreeU, switched on after `accelerate`, did nothing, without a word."""
    for edit, name in (
        (lambda: fast.enable_freeu(0.9, 0.2, 1.2, 1.4), "enable_freeu"),
        (lambda: fast.disable_freeu(), "disable_freeu"),
        (lambda: fast.unet.set_attn_processor(AttnProcessor()), "set_attn_processor"),
        (lambda: fast.unet.set_adapters("style", 0.5), "set_adapters"),
        (lambda: fast.unet.fuse_lora(), "fuse_lora"),
    ):
        with pytest.raises(octavo.OctavoError) as told:
            edit()
        assert str(told.value) == (
            f"{name}: this UNet2DConditionModel is accelerated as it was, and is not edited; edit the original "
            "pipeline, then accelerate that"
        )


def test_the_original_is_edited_as_before() -> None:
    """And accelerated with it, where the engine has operations for it: OpenVINO has none for FreeU's."""
    pipeline, inputs = build("sd")
    octavo.accelerate(pipeline, precision="f32", inputs=inputs)
    pipeline.unet.set_attn_processor(AttnProcessor())
    assert {type(found) for found in pipeline.unet.attn_processors.values()} == {AttnProcessor}
    octavo.accelerate(pipeline, precision="f32", inputs=inputs)
    pipeline.enable_freeu(0.5, 0.2, 1.5, 1.8)
    with pytest.raises(
        octavo.OctavoError, match=r"^UNet2DConditionModel: OpenVINO cannot (convert|trace) .*; sample it in"
    ):
        octavo.accelerate(pipeline, precision="f32", inputs=inputs)
