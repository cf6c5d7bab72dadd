"""Registration with diffusers: after `import octavo`, plain `from_pretrained` loads quantized models.

Diffusers has no entry points; a third-party method is added to its two tables by name, once, on import, as are the
schedulers that visit trajectories (`octavo.diffusion.trajectories.loading`). Its two
`save_pretrained` are wrapped, so that what Octavo quantized is saved whole, with a card and a fresh digest, whichever
pipeline or copy holds it; and its two `from_pretrained`, so that a folder that Octavo wrote is checked before anything
is built from it. Everything else is saved and loaded by diffusers' own, untouched. Its `register_modules` is wrapped to
tell when a pipeline takes a network that was calibrated for another task, and its loading of LoRA to refuse quantized
networks.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

from octavo.errors import OctavoError

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
    _wrap(DiffusionPipeline, "from_pretrained", _checking(_check_pipeline))
    _wrap(ModelMixin, "from_pretrained", _checking(_check_model))


def original(method: Any) -> Callable[..., Any]:
    """Diffusers' own of a method that was wrapped here; any other as it is."""
    found: Callable[..., Any] = getattr(method, ORIGINAL, method)
    return found


def first_line(error: BaseException) -> str:
    """What an error says, as part of one line."""
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__


def _check_pipeline(folder: Path) -> bool:
    """Check a pipeline's folder if Octavo wrote it; says whether it did."""
    from octavo.checkpoint.check import check_pipeline, octavos_component

    if octavos_component(folder) is None:
        return False
    check_pipeline(folder)
    return True


def _check_model(folder: Path) -> bool:
    """Check a component's folder if Octavo wrote it; says whether it did."""
    from octavo.checkpoint.check import check_quantized, is_octavos

    if not is_octavos(folder):
        return False
    check_quantized(folder)
    return True


def _checking(check: Callable[[Path], bool]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A loading that checks a local folder first; what then fails in one that Octavo wrote is told in one line."""

    def wrap(original: Callable[..., Any]) -> Callable[..., Any]:
        def from_pretrained(cls: Any, *args: Any, **kwargs: Any) -> Any:
            name = args[0] if args else kwargs.get("pretrained_model_name_or_path")
            folder = Path(name or "", kwargs.get("subfolder") or "")
            if not name or not folder.is_dir() or not check(folder):
                return original(cls, *args, **kwargs)
            try:
                return original(cls, *args, **kwargs)
            except (OctavoError, Warning):
                raise
            except Exception as error:
                raise OctavoError(f"{folder}: cannot be loaded: {first_line(error)}") from error

        return from_pretrained

    return wrap


def _wrap(kind: Any, name: str, wrap: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Put `wrap(method)` in the place of a method, or of a class method, once."""
    method = vars(kind)[name]
    if hasattr(getattr(kind, name), ORIGINAL):
        return
    function = method.__func__ if isinstance(method, classmethod) else method
    wrapped = functools.wraps(function)(wrap(function))
    setattr(wrapped, ORIGINAL, function)
    setattr(kind, name, classmethod(wrapped) if isinstance(method, classmethod) else wrapped)
