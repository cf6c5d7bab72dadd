"""Layer patterns of the command line, held against a model's layers before any work"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


def check_patterns(
    model: str,
    pipeline: DiffusionPipeline,
    patterns: Mapping[str, Sequence[str] | None],
    modules: bool,
    further: Sequence[str],
) -> None:
    """Raise `OctavoError` if the pipeline's network is quantized already, or a pattern matches none of its layers.

    `patterns`: by the option that gave them. `modules`: a pattern may match any module, since attention's products go
    by the name of the module that computes them; which modules those are is checked when the network has run.
    `further`: other components to be quantized, whose layers are named behind them.
    """
    from fnmatch import fnmatchcase

    from octavo.calibration.components import part_prefix, parts_of
    from octavo.diffusion import find_denoiser
    from octavo.errors import OctavoError
    from octavo.quantization import quantized_layers, walk

    component, denoiser = find_denoiser(pipeline)
    if any(True for _ in quantized_layers(denoiser)):
        raise OctavoError(
            f"{model}: its {component} is quantized already; give the full-precision model that it came from"
        )
    names = [name for name, _ in walk(denoiser)]
    for name, part in parts_of(pipeline):
        if name in further:
            names += [f"{name}.{part_prefix(name)}{layer}" for layer, _ in walk(part)]
    others = [name for name, _ in denoiser.named_modules()] if modules else []
    for option, of_option in patterns.items():
        for pattern in of_option or ():
            if not any(fnmatchcase(name, pattern) for name in (*names, *others)):
                raise OctavoError(
                    f"{option}: {pattern!r} matches none of the {len(names)} layers of {model}; "
                    f"{shlex.join(['octavo', 'audit', model])} lists their names"
                )
