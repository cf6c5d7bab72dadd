"""Registration with diffusers: after `import octavo`, plain `from_pretrained` loads quantized models.

Diffusers has no entry points: what it must know is put into its modules, each as soon as it is imported, so that
importing Octavo imports neither diffusers nor torch. The method is added to its two tables by name, as are the
schedulers that visit trajectories to the libraries that it loads from. Its two `save_pretrained` are wrapped, so that
what Octavo quantized is saved whole, with a card and a fresh digest, whichever pipeline or copy holds it; and its two
`from_pretrained` and the `download` of pipelines, so that a folder that Octavo wrote is checked before anything is
built from it. Everything else is saved and loaded by diffusers' own, untouched. A pipeline's taking of a component is
wrapped to tell of a network that was calibrated for another task, its `to` to refuse a dtype before any part is cast,
the loading of LoRA to refuse quantized and accelerated networks, and IP-Adapters' methods to refuse the latter.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from octavo.checkpoint.adapters import refuse_ip_adapter, refuse_lora
from octavo.checkpoint.on_import import when_imported
from octavo.checkpoint.wrapping import wrap
from octavo.errors import OctavoError

METHOD = LIBRARY = "octavo"
OWN_DDIM = ("DDIMTrajectoryScheduler", "DDIMEtaScheduler", "DDIMEtaTrajectoryScheduler")


def register() -> None:
    """Let diffusers know Octavo, now or as soon as diffusers is imported; idempotent. Imports nothing heavy itself."""
    for module, hook in {
        "diffusers.quantizers.auto": _tell_of_method,
        "diffusers.pipelines.pipeline_loading_utils": _tell_of_schedulers,
        "diffusers.pipelines.ddim.pipeline_ddim": _keep_trajectory,
        "diffusers.pipelines.pipeline_utils": _wrap_pipelines,
        "diffusers.models.modeling_utils": _wrap_models,
        "diffusers.loaders.peft": refuse_lora,
        "diffusers.loaders.ip_adapter": refuse_ip_adapter,
    }.items():
        when_imported(module, hook)


class _Methods(dict[str, Any]):
    """One of diffusers' tables of methods, with Octavo's class in it: imported when it is asked for."""

    def __init__(self, table: Mapping[str, Any], place: str, name: str) -> None:
        super().__init__(table)
        self.place, self.name = place, name
        self[METHOD] = None

    def __getitem__(self, key: str) -> Any:
        found = super().__getitem__(key)
        return found if key != METHOD else getattr(importlib.import_module(self.place), self.name)

    def get(self, key: str, default: Any = None) -> Any:
        return default if key not in self else self[key]  # noqa: SIM401 - dict.get would not import

    def items(self) -> Any:
        return {key: self[key] for key in self}.items()

    def values(self) -> Any:
        return {key: self[key] for key in self}.values()


def _tell_of_method(auto: Any) -> None:
    if METHOD not in auto.AUTO_QUANTIZER_MAPPING:
        auto.AUTO_QUANTIZATION_CONFIG_MAPPING = _Methods(
            auto.AUTO_QUANTIZATION_CONFIG_MAPPING, "octavo.checkpoint.config", "OctavoConfig"
        )
        auto.AUTO_QUANTIZER_MAPPING = _Methods(
            auto.AUTO_QUANTIZER_MAPPING, "octavo.checkpoint.quantizer", "OctavoQuantizer"
        )


def _tell_of_schedulers(loading: Any) -> None:
    """`octavo` in `model_index.json` names the library that diffusers finds schedulers in, by its attributes."""
    loading.LOADABLE_CLASSES[LIBRARY] = {"SchedulerMixin": ["save_pretrained", "from_pretrained"]}


def _keep_trajectory(module: Any) -> None:
    """Let a DDIMPipeline keep a scheduler that visits a trajectory or holds an eta.

    It makes its scheduler anew from its settings, as a plain DDIM: without a word these would be lost. Every other
    scheduler goes its way as before.
    """

    def keeping(original: Callable[..., None]) -> Callable[..., None]:
        def __init__(self: Any, unet: Any, scheduler: Any) -> None:
            if type(scheduler).__name__ not in OWN_DDIM:
                original(self, unet=unet, scheduler=scheduler)
                return
            from diffusers import DDIMScheduler

            from octavo.diffusion.trajectories.bound import remade

            # with these among the settings diffusers would say that it is ignored
            original(self, unet=unet, scheduler=remade(DDIMScheduler, scheduler))
            self.register_modules(scheduler=scheduler)

        return __init__

    wrap(module.DDIMPipeline, "__init__", keeping)


def _wrap_pipelines(module: Any) -> None:
    def saving(original: Callable[..., Any]) -> Callable[..., Any]:
        def save_pretrained(self: Any, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
            from octavo.checkpoint.save import holds_octavo, save_pipeline

            save = save_pipeline if holds_octavo(self) else original
            return save(self, save_directory, *args, **kwargs)

        return save_pretrained

    def telling(original: Callable[..., Any]) -> Callable[..., Any]:
        def __setattr__(self: Any, name: str, value: Any) -> None:
            original(self, name, value)
            if getattr(value, "hf_quantizer", None) is not None:
                from octavo.checkpoint.task import warn_of_another_task

                warn_of_another_task(self, name)

        return __setattr__

    def casting(original: Callable[..., Any]) -> Callable[..., Any]:
        def to(self: Any, *args: Any, **kwargs: Any) -> Any:
            for dtype in _dtypes(*args, **kwargs):
                _refuse_cast(self, dtype)
            return original(self, *args, **kwargs)

        return to

    def fetching(original: Callable[..., Any]) -> Callable[..., Any]:
        def download(cls: Any, *args: Any, **kwargs: Any) -> Any:
            folder = original(cls, *args, **kwargs)
            _check_fetched(Path(folder))
            return folder

        return download

    wrap(module.DiffusionPipeline, "save_pretrained", saving)
    wrap(module.DiffusionPipeline, "__setattr__", telling)
    wrap(module.DiffusionPipeline, "download", fetching)
    wrap(module.DiffusionPipeline, "to", casting)
    wrap(module.DiffusionPipeline, "from_pretrained", _checking(_check_pipeline))


def _dtypes(*args: Any, **kwargs: Any) -> list[Any]:
    """The dtypes among the arguments of a pipeline's `to`."""
    import torch

    given = (*args, kwargs.get("dtype"), kwargs.get("torch_dtype"))
    return [value for value in given if isinstance(value, torch.dtype)]


def _refuse_cast(pipeline: Any, dtype: Any) -> None:
    """Before any part is cast: diffusers would raise at the quantized one, after parts that the original has too.

    The dtype that the quantized one has already is none: `from_pipe` asks for float32.
    """
    from octavo.checkpoint.quantizer import quantizer_of

    for name, part in pipeline.components.items():
        if quantizer_of(part) is not None and part.dtype != dtype:
            raise OctavoError(
                f"dtype: {name} is quantized, and is not cast; save the pipeline and load it with "
                "octavo.load(folder, dtype=...), or leave the dtype out"
            )


def _wrap_models(module: Any) -> None:
    def saving(original: Callable[..., Any]) -> Callable[..., Any]:
        def save_pretrained(self: Any, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
            from octavo.checkpoint.save import prepare_denoiser

            prepare_denoiser(self, *args, **kwargs)
            return original(self, save_directory, *args, **kwargs)

        return save_pretrained

    def moving(original: Callable[..., Any]) -> Callable[..., Any]:
        def to(self: Any, *args: Any, **kwargs: Any) -> Any:
            from octavo.checkpoint.quantizer import quantizer_of

            # diffusers refuses any dtype for a quantized network; loading an IP-Adapter asks for its own
            if quantizer_of(self) is not None:
                args = tuple(value for value in args if value is not self.dtype)
                kwargs = {name: value for name, value in kwargs.items() if value is not self.dtype}
            return original(self, *args, **kwargs)

        return to

    wrap(module.ModelMixin, "to", moving)
    wrap(module.ModelMixin, "save_pretrained", saving)
    wrap(module.ModelMixin, "from_pretrained", _checking(_check_model))


def first_line(error: BaseException) -> str:
    """What an error says, as part of one line."""
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__


def _check_pipeline(folder: Path) -> bool:
    """Check a pipeline's folder if Octavo wrote it; says whether it did."""
    from octavo.checkpoint.check import check_pipeline
    from octavo.checkpoint.whose import octavos_components

    if not octavos_components(folder):
        return False
    check_pipeline(folder)
    return True


def _check_fetched(folder: Path) -> None:
    """Check what came from the Hub if Octavo wrote it; components that others take the place of are not there."""
    from octavo.checkpoint.check import check_files
    from octavo.checkpoint.whose import octavos_components

    own = octavos_components(folder)
    if own:
        check_files(folder, own)


def _check_model(folder: Path) -> bool:
    """Check a component's folder if Octavo wrote it; says whether it did."""
    from octavo.checkpoint.check import check_quantized
    from octavo.checkpoint.whose import is_octavos

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
