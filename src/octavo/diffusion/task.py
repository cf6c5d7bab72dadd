"""What a pipeline makes images from: its task, read from what its call takes."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING

from octavo.diffusion.denoiser import find_denoiser, num_classes

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

TEXT, IMAGE, MASK, CLASS, NOTHING = (
    "text-to-image",
    "image-to-image",
    "inpainting",
    "class-conditional",
    "unconditional",
)
VIDEO = "video"
WITH_CONTROL = " with ControlNet"
"""Added to a task whose network reads a ControlNet's residuals, which widen its ranges."""


def task_of(pipeline: DiffusionPipeline) -> str:
    """The task, by the arguments of the pipeline's `__call__` (and by whether its network embeds classes).

    A `mask_image` makes it inpainting; an `image` image-to-image, but for ControlNet pipelines, which read it beside
    the prompt: they are image-to-image only if they take a `control_image` besides. Then a prompt makes it
    text-to-image, classes class-conditional; what takes none of these is unconditional. A network for several frames
    (`num_frames`) is "video". A ControlNet beside it is told behind the task (WITH_CONTROL). Raises OctavoError for a
    pipeline without a denoiser.
    """
    return _without_control(pipeline) + (WITH_CONTROL if "ControlNet" in type(pipeline).__name__ else "")


def _without_control(pipeline: DiffusionPipeline) -> str:
    takes = inspect.signature(type(pipeline).__call__).parameters
    if "num_frames" in takes:
        return VIDEO
    if "mask_image" in takes:
        return MASK
    if "image" in takes and not _reads_control(pipeline):
        return IMAGE
    if "prompt" in takes:
        return TEXT
    if "class_labels" in takes and num_classes(find_denoiser(pipeline)[1]) is not None:
        return CLASS
    return NOTHING


def needed_pictures(pipeline: DiffusionPipeline) -> tuple[str, ...]:
    """Names of the pictures that the pipeline cannot do without, though its signature makes them optional."""
    takes = inspect.signature(type(pipeline).__call__).parameters
    names = ("image", "mask_image") if "strength" in takes or "mask_image" in takes else ()
    control = ("control_image", "image") if "ControlNet" in type(pipeline).__name__ else ()
    return tuple(name for name in dict.fromkeys((*names, *control)) if name in takes)


def control_name(pipeline: DiffusionPipeline) -> str:
    """What the pipeline calls the picture that steers a ControlNet."""
    return "image" if _reads_control(pipeline) else "control_image"


def _reads_control(pipeline: DiffusionPipeline) -> bool:
    """Whether `image` is the ControlNet's: so in text-to-image pipelines that have one."""
    takes = inspect.signature(type(pipeline).__call__).parameters
    return "ControlNet" in type(pipeline).__name__ and "image" in takes and "control_image" not in takes
