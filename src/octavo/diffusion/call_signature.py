"""What a pipeline's call takes, and what it cannot do without, held against what it is to be called with."""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from octavo.diffusion.denoiser import find_denoiser, num_classes
from octavo.diffusion.task import needed_pictures
from octavo.errors import OctavoError

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

OURS = ("generator", "num_inference_steps", "output_type", "return_dict", "batch_size")
OF_ONE_PROMPT = re.compile(r"num_[a-z]+_per_prompt")
FLAGS = {
    "eta": " (--eta)",
    "prompt": " (--prompt)",
    "class_labels": " (--class-labels)",
    "image": " (--image)",
    "mask_image": " (--mask)",
    "control_image": " (--control-image)",
}
"""What the command line calls an input, to be told beside its name."""


def checked_arguments(pipeline: DiffusionPipeline, inputs: Mapping[str, Any], **ours: Any) -> dict[str, Any]:
    """Everything `pipeline(...)` is called with: `inputs`, and `ours`, its batch size among them if it asks for one.

    Raises OctavoError for an input that is missing, unknown, set by Octavo itself, or text in place of a number.
    """
    parameters = dict(inspect.signature(type(pipeline).__call__).parameters)
    parameters.pop("self", None)
    named = {name: p for name, p in parameters.items() if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)}
    further: frozenset[str] | None = frozenset()
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        further = further_names(type(pipeline))
    who = type(pipeline).__name__

    for name, value in inputs.items():
        if name in OURS:
            raise OctavoError(f"inputs: {name} is set by Octavo; leave it out")
        if OF_ONE_PROMPT.fullmatch(name) and value not in (None, 1):
            raise OctavoError(
                f"inputs: {name}: Octavo makes one of each prompt in a batch; leave it out, and ask for more images, "
                "which go through the prompts again"
            )
        usual = named[name].default if name in named else None
        if isinstance(value, str) and isinstance(usual, (int, float)):
            raise OctavoError(f"inputs: {name}: {value!r} is text; {who} has {usual!r} by default")
    if "batch_size" in named:
        ours["batch_size"] = len(ours["generator"])
    arguments = {**inputs, **ours}
    for name in arguments:
        if name not in named and further is not None and name not in further:
            raise OctavoError(f"inputs: {who} takes no {name}{FLAGS.get(name, '')}; leave it out")
    needed = [name for name, parameter in named.items() if parameter.default is parameter.empty]
    embedded = inputs.get("prompt_embeds") is not None
    for name in (*needed, *(name for name in needed_inputs(pipeline) if not (embedded and name == "prompt"))):
        if arguments.get(name) is None:
            raise OctavoError(
                f"inputs: {who} needs {name}{FLAGS.get(name, '')}, one for each image or one for all"
            )
    return arguments


def needed_inputs(pipeline: DiffusionPipeline) -> tuple[str, ...]:
    """Names of what the pipeline cannot do without, also where its signature makes it optional.

    A prompt is so for the sake of `prompt_embeds`; class labels where the pipeline would draw them, from no image's
    generator; pictures as `needed_pictures` says.
    """
    takes = inspect.signature(type(pipeline).__call__).parameters
    names = ["prompt"] if "prompt" in takes else []
    if "class_labels" in takes and num_classes(find_denoiser(pipeline)[1]) is not None:
        names.append("class_labels")
    return (*names, *needed_pictures(pipeline))


def further_names(pipeline_class: type) -> frozenset[str] | None:
    """What `__call__` reads by name from its `**kwargs`; None where it hands them on, or its source is not at hand.

    diffusers' Stable Diffusion takes any keyword and drops what it does not know, a misspelt one too.

    >>> class Reads:
    ...     def __call__(self, **kwargs):
    ...         return kwargs.pop("callback", None), kwargs["other"]
    >>> sorted(further_names(Reads))
    ['callback', 'other']
    """
    call: Any = inspect.unwrap(vars(pipeline_class).get("__call__", pipeline_class.__call__))
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(call))).body[0]
    except (OSError, TypeError, SyntaxError, IndexError):
        return None
    if not isinstance(tree, ast.FunctionDef) or tree.args.kwarg is None:
        return None
    keywords, names, uses = tree.args.kwarg.arg, set(), 0
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and node.id == keywords:
            uses += 1
        if (name := _read(node, keywords)) is not None:
            names.add(name)
            uses -= 1
    return None if uses else frozenset(names)


def _read(node: ast.AST, keywords: str) -> str | None:
    """The name that a node reads from the keywords: `k.pop("name")`, `k.get("name")`, `k["name"]`, `"name" in k`."""
    held: ast.AST | None = None
    key: ast.AST | None = None
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.args:
        held, key = node.func.value if node.func.attr in ("pop", "get") else None, node.args[0]
    elif isinstance(node, ast.Subscript):
        held, key = node.value, node.slice
    elif isinstance(node, ast.Compare) and isinstance(node.ops[0], (ast.In, ast.NotIn)):
        held, key = node.comparators[0], node.left
    if isinstance(held, ast.Name) and held.id == keywords and isinstance(key, ast.Constant):
        return str(key.value)
    return None
