"""What a pipeline's call needs besides noise, from the command line: prompts, classes, pictures, anything by name."""

from __future__ import annotations

import functools
import inspect
import json
import shlex
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from octavo.named import can_be_read_again

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from PIL.Image import Image

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")

GIVEN = "given"
"""The parameter by which a command takes all of them (`takes_inputs`)."""

PromptOption = Annotated[str | None, typer.Option(help="The prompt, for a text-to-image pipeline.")]
PromptsOption = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Prompts, one a line; image k takes line k, from the first again."),
]
ClassLabelsOption = Annotated[
    str | None,
    typer.Option(help="Class labels '3' or '3,5,8', image by image, for a class-conditional pipeline."),
]
ImageOption = Annotated[
    Path | None,
    typer.Option(metavar="FILE/FOLDER", help="The image(s) that image-to-image and inpainting start from."),
]
MaskOption = Annotated[
    Path | None, typer.Option(metavar="FILE/FOLDER", help="Inpainting: the mask(s), white where to paint.")
]
ControlImageOption = Annotated[
    Path | None, typer.Option(metavar="FILE/FOLDER", help="ControlNet: the image(s) that steer it.")
]
InputOption = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME=VALUE",
        help="Any other argument of the pipeline's call, as JSON or text, e.g. guidance_scale=4; may be repeated.",
    ),
]
EtaOption = Annotated[
    float | None,
    typer.Option(min=0, max=1, help="DDIM's eta: how much of DDPM's noise it adds, 0 (the default) to 1."),
]


@dataclass(frozen=True)
class Given:
    """The pipeline's own inputs as a command was given them: read by `inputs`, said again by `flags`."""

    prompt: str | None = None
    prompts: Path | None = None
    class_labels: str | None = None
    image: Path | None = None
    mask: Path | None = None
    control_image: Path | None = None
    others: list[str] = field(default_factory=list)
    eta: float | None = None

    def inputs(self, pipeline: DiffusionPipeline | None = None) -> dict[str, Any]:
        """The arguments of the pipeline's call. Raises `OctavoError` for what cannot be read, or is given twice.

        Only a picture for a ControlNet asks for the `pipeline`, which has the say in what it is called.
        """
        from octavo.errors import OctavoError

        if self.prompt is not None and self.prompts is not None:
            raise OctavoError("--prompts: --prompt is given too; leave one out")
        inputs: dict[str, Any] = {}
        if self.prompt is not None:
            inputs["prompt"] = self.prompt
        if self.prompts is not None:
            inputs["prompt"] = _lines(self.prompts)
        if self.class_labels is not None:
            inputs["class_labels"] = _labels(self.class_labels)
        control = "control_image"
        if pipeline is not None:
            from octavo.diffusion.task import control_name

            control = control_name(pipeline)
        pictures = (
            ("--image", "image", self.image, "RGB"),
            ("--mask", "mask_image", self.mask, "L"),
            ("--control-image", control, self.control_image, "RGB"),
        )
        for flag, name, place, mode in pictures:
            if place is None:
                continue
            if name in inputs:
                raise OctavoError(
                    f"{flag}: this pipeline reads {name} only, which is given too; leave one out"
                )
            inputs[name] = _pictures(flag, place, mode)
        for text in self.others:
            name, value = _named(text)
            if name in inputs:
                raise OctavoError(f"--input: {name} is given twice; leave one out")
            inputs[name] = value
        if self.eta is not None:
            if "eta" in inputs:
                raise OctavoError("--eta: --input eta is given too; leave one out")
            inputs["eta"] = self.eta
        return inputs

    def recorded(self) -> dict[str, Any]:
        """The same, JSON-safe: pictures by where they are."""
        pictures = {"image": self.image, "mask": self.mask, "control_image": self.control_image}
        rest = replace(self, image=None, mask=None, control_image=None).inputs()
        return {**rest, **{name: str(place) for name, place in pictures.items() if place is not None}}

    def flags(self) -> list[str]:
        """The options that say the same to another command."""
        given = {
            "--prompt": self.prompt,
            "--prompts": self.prompts,
            "--class-labels": self.class_labels,
            "--image": self.image,
            "--mask": self.mask,
            "--control-image": self.control_image,
            "--eta": self.eta,
        }
        flags = [text for flag, value in given.items() if value is not None for text in (flag, str(value))]
        return [*flags, *(text for value in self.others for text in ("--input", value))]


OPTIONS: dict[str, Any] = {
    "prompt": PromptOption,
    "prompts": PromptsOption,
    "class_labels": ClassLabelsOption,
    "image": ImageOption,
    "mask": MaskOption,
    "control_image": ControlImageOption,
    "input": InputOption,
    "eta": EtaOption,
}
"""The options of a command that runs a pipeline, in the order of its help."""


def takes_inputs(command: Callable[..., None]) -> Callable[..., None]:
    """A command with a parameter `given: Given`, as one that takes the OPTIONS in its place: typer reads signatures."""

    @functools.wraps(command)
    def with_options(**arguments: Any) -> None:
        own = {name: arguments.pop(name) for name in OPTIONS}
        others = own.pop("input") or []
        given = Given(**own, others=others)
        places = (given.prompts, given.image, given.mask, given.control_image)
        if all(place is None or can_be_read_again(place) for place in places):
            given.inputs()  # what cannot be read is told before the command imports what takes seconds
        command(**arguments, **{GIVEN: given})

    parameters: list[inspect.Parameter] = []
    for parameter in inspect.signature(command, eval_str=True).parameters.values():
        if parameter.name != GIVEN:
            parameters.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY))
            continue
        parameters += [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=option)
            for name, option in OPTIONS.items()
        ]
    with_options.__dict__["__signature__"] = inspect.Signature(parameters)
    return with_options


def command_with(given: Given, *parts: object) -> str:
    """A command to copy, with the same inputs.

    >>> command_with(Given(class_labels="3,5"), "sample", "my model", "--out", "a.png")
    "octavo sample 'my model' --out a.png --class-labels 3,5"
    """
    return shlex.join(["octavo", *map(str, parts), *given.flags()])


def _labels(text: str) -> list[int]:
    from octavo.errors import OctavoError

    try:
        return [int(label) for label in text.split(",")]
    except ValueError as error:
        raise OctavoError(f"--class-labels: {text!r} is not a list like 3,5,8") from error


def _lines(file: Path) -> list[str]:
    from octavo.errors import OctavoError

    try:
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise OctavoError(f"--prompts: {file} cannot be read as text ({error})") from error
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines:
        raise OctavoError(f"--prompts: {file} holds no line; write one prompt on each")
    return lines


def _pictures(flag: str, place: Path, mode: str) -> list[Image]:
    """The picture, or those of the folder in the order of their names, in memory and in `mode`."""
    from octavo.errors import OctavoError

    files = [place]
    if place.is_dir():
        files = sorted(path for path in place.iterdir() if path.suffix.lower() in PICTURES)
        if not files:
            raise OctavoError(f"{flag}: {place} holds no picture ({', '.join(PICTURES)})")
    return [_picture(flag, path, mode) for path in files]


def _picture(flag: str, path: Path, mode: str) -> Image:
    from PIL import Image

    from octavo.errors import OctavoError

    try:
        with Image.open(path) as picture:
            return picture.convert(mode)
    except (OSError, Image.DecompressionBombError, ValueError, SyntaxError) as error:
        raise OctavoError(f"{flag}: {path} cannot be read as a picture ({error})") from error


def _named(text: str) -> tuple[str, Any]:
    """
    >>> _named("guidance_scale=4"), _named("prompt_2=a cat")
    (('guidance_scale', 4), ('prompt_2', 'a cat'))
    """
    from octavo.errors import OctavoError

    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier():
        raise OctavoError(f"--input: {text!r} is not of the form name=value")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value
