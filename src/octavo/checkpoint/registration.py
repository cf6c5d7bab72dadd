"""Registration with diffusers: after `import octavo`, plain `from_pretrained` loads quantized models.

Diffusers has no entry points; a third-party method is added to its two tables by name, once, on import, as are the
schedulers that visit trajectories (`octavo.diffusion.trajectories.loading`). Its two
`save_pretrained` are wrapped, so that what Octavo quantized is saved whole, with a card and a fresh digest, whichever
pipeline or copy holds it; everything else is saved by diffusers' own, untouched. Its `register_modules` is wrapped to
tell when a pipeline takes a network that was calibrated for another task, and its loading of LoRA to refuse quantized
networks.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

ORIGINAL = "octavo_original"


def register() -> None:
    """Add Octavo's config and quantizer to diffusers' tables, and its saving; idempotent."""
    from diffusers import DiffusionPipeline, ModelMixin
    from diffusers.loaders.peft import PeftAdapterMixin
    from diffusers.quantizers import auto

    from octavo.checkpoint.config import OctavoConfig, QuantMethod
    from octavo.checkpoint.quantizer import OctavoQuantizer, quantizer_of
    from octavo.checkpoint.save import holds_octavo, prepare_denoiser, save_pipeline
    from octavo.checkpoint.task import warn_of_another_task
    from octavo.diffusion.trajectories.loading import register_schedulers
    from octavo.errors import OctavoError

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

    def telling(original: Callable[..., Any]) -> Callable[..., Any]:
        def register_modules(self: Any, **modules: Any) -> None:
            original(self, **modules)
            if any(quantizer_of(module) is not None for module in modules.values()):
                warn_of_another_task(self)

        return register_modules

    def refusing(original: Callable[..., Any]) -> Callable[..., Any]:
        def add(self: Any, *args: Any, **kwargs: Any) -> Any:
            if quantizer_of(self) is not None:
                raise OctavoError(
                    f"LoRA: this {type(self).__name__} is quantized, and takes none; load it into the full-precision "
                    "model, call fuse_lora(), then quantize"
                )
            return original(self, *args, **kwargs)

        return add

    _wrap(DiffusionPipeline, "save_pretrained", of_pipeline)
    _wrap(ModelMixin, "save_pretrained", of_model)
    _wrap(DiffusionPipeline, "register_modules", telling)
    _wrap(PeftAdapterMixin, "load_lora_adapter", refusing)
    _wrap(PeftAdapterMixin, "add_adapter", refusing)


def original_saving(kind: type) -> Callable[..., Any]:
    """Diffusers' own `save_pretrained` of the class."""
    method: Any = kind.save_pretrained  # type: ignore[attr-defined]
    return getattr(method, ORIGINAL, method)


def _wrap(kind: Any, name: str, wrap: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    original = getattr(kind, name)
    if hasattr(original, ORIGINAL):
        return
    wrapped = functools.wraps(original)(wrap(original))
    setattr(wrapped, ORIGINAL, original)
    setattr(kind, name, wrapped)
