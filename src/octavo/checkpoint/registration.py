"""Registration with diffusers: after `import octavo`, plain `from_pretrained` loads quantized models.

Diffusers has no entry points; a third-party method is added to its two tables by name, once, on import, as are the
schedulers that visit trajectories (`octavo.diffusion.trajectories.loading`). Its two
`save_pretrained` are wrapped, so that what Octavo quantized is saved whole, with a card and a fresh digest, whichever
pipeline or copy holds it; everything else is saved by diffusers' own, untouched.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

ORIGINAL = "octavo_original"


def register() -> None:
    """Add Octavo's config and quantizer to diffusers' tables, and its saving; idempotent."""
    from diffusers import DiffusionPipeline, ModelMixin
    from diffusers.quantizers import auto

    from octavo.checkpoint.config import OctavoConfig, QuantMethod
    from octavo.checkpoint.quantizer import OctavoQuantizer
    from octavo.checkpoint.save import holds_octavo, prepare_denoiser, save_pipeline
    from octavo.diffusion.trajectories.loading import register_schedulers

    register_schedulers()
    auto.AUTO_QUANTIZATION_CONFIG_MAPPING[QuantMethod.OCTAVO.value] = OctavoConfig
    auto.AUTO_QUANTIZER_MAPPING[QuantMethod.OCTAVO.value] = OctavoQuantizer

    def of_pipeline(original: Callable[..., Any]) -> Callable[..., Any]:
        def save_pretrained(self: Any, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
            save = save_pipeline if holds_octavo(self) else original
            return save(self, save_directory, *args, **kwargs)

        return save_pretrained

    def of_model(original: Callable[..., Any]) -> Callable[..., Any]:
        def save_pretrained(self: Any, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
            prepare_denoiser(self, *args, **kwargs)
            return original(self, save_directory, *args, **kwargs)

        return save_pretrained

    _wrap_saving(DiffusionPipeline, of_pipeline)
    _wrap_saving(ModelMixin, of_model)


def original_saving(kind: type) -> Callable[..., Any]:
    """Diffusers' own `save_pretrained` of the class."""
    method: Any = kind.save_pretrained  # type: ignore[attr-defined]
    return getattr(method, ORIGINAL, method)


def _wrap_saving(kind: Any, wrap: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    if hasattr(kind.save_pretrained, ORIGINAL):
        return
    original = kind.save_pretrained
    wrapped = functools.wraps(original)(wrap(original))
    setattr(wrapped, ORIGINAL, original)
    kind.save_pretrained = wrapped
