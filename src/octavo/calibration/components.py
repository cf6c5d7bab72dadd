"""Which components of a pipeline can be quantized besides its denoiser, and by what part of them they are called."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import nn

from octavo.calibration.recipe import PTQ4DM, widths
from octavo.diffusion import find_denoiser, with_denoiser
from octavo.errors import OctavoError
from octavo.quantization import dequantized, quantized_layers, walk
from octavo.quantization.packing import BITS

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

PARTS = {"vae": "decoder"}
"""Component -> the module within it that is quantized, which the pipeline calls through the component's methods."""


def further_components(pipeline: DiffusionPipeline, components: Sequence[str] | None) -> tuple[str, ...]:
    """Those of `components` that are not the denoiser; None: none. Raises `OctavoError` unless all can be quantized."""
    if components is None:
        return ()
    denoiser, _ = find_denoiser(pipeline)
    possible = (denoiser, *(component for component, _ in parts_of(pipeline)))
    if isinstance(components, str):
        components = [name.strip() for name in components.split(",")]
    for name in components:
        if name not in possible:
            raise OctavoError(
                f"components: {name!r} is none that Octavo quantizes; of this pipeline it quantizes "
                f"{', '.join(possible)}"
            )
    if denoiser not in components:
        raise OctavoError(f"components: {denoiser} is missing, without which nothing else is quantized")
    return tuple(dict.fromkeys(name for name in components if name != denoiser))


def parts_of(pipeline: DiffusionPipeline) -> Iterator[tuple[str, nn.Module]]:
    """(component, its part) for each component with layers that are, or can be, quantized."""
    for component, name in PARTS.items():
        part = getattr(getattr(pipeline, component, None), name, None)
        if isinstance(part, nn.Module) and any(
            True for layers in (walk, quantized_layers) for _ in layers(part)
        ):
            yield component, part


def quantized_parts(pipeline: DiffusionPipeline) -> Iterator[tuple[str, nn.Module]]:
    """(component, its part) for each component besides the denoiser that is quantized."""
    for component, part in parts_of(pipeline):
        if any(True for _ in quantized_layers(part)):
            yield component, part


def with_part(pipeline: DiffusionPipeline, component: str, part: nn.Module) -> DiffusionPipeline:
    """A pipeline whose component, of the same class, has `part` in its place; everything else is shared."""
    own: Any = copy.copy(getattr(pipeline, component))
    own.__dict__["_modules"] = {**own._modules, PARTS[component]: part}
    return with_denoiser(pipeline, component, own)


def part_prefix(component: str) -> str:
    """What the names of a part's layers begin with within their component: "decoder." """
    return f"{PARTS[component]}."


def in_float(pipeline: DiffusionPipeline) -> DiffusionPipeline:
    """The pipeline that a quantized one approximates: every quantized network with its own weights in float32."""
    component, denoiser = find_denoiser(pipeline)
    plain = with_denoiser(pipeline, component, dequantized(denoiser))
    for name, part in quantized_parts(pipeline):
        plain = with_part(plain, name, dequantized(part))
    return plain


def recipe_of(recipe: PTQ4DM, component: str | None, components: Sequence[str]) -> PTQ4DM:
    """The recipe for one network: the denoiser's (component None), or that of another component's part.

    Layer patterns that begin with a further component's name and a dot ("vae.*") are its own, without that beginning;
    all others are the denoiser's. What belongs to denoising has no meaning for a part and is switched off: groups of
    timesteps, the output's correction, the timestep's layers, the paper's other operations; so are attention's
    products, absorption and the choice of float activations.
    """

    def own(pattern: str) -> str | None:
        named = next((name for name in components if pattern.startswith(f"{name}.")), None)
        if named != component:
            return None
        return (
            pattern if named is None else pattern.removeprefix(f"{named}.").removeprefix(part_prefix(named))
        )

    include = tuple(found for pattern in recipe.include if (found := own(pattern)) is not None)
    if not include and component is None:
        raise OctavoError(
            f"include: {', '.join(recipe.include)} leave no layer of the denoiser to quantize, which always is one of "
            "the components; add a pattern of its layers"
        )
    patterns: dict[str, Any] = {
        "include": include or ("*",),
        "exclude": tuple(found for pattern in recipe.exclude if (found := own(pattern)) is not None),
        "bits": {found: bits for pattern, bits in recipe.bits.items() if (found := own(pattern)) is not None},
    }
    own_widths = widths(recipe.weights, patterns["bits"])
    if components and min(widths(recipe.weights, recipe.bits)) <= BITS < min(own_widths):
        patterns["group_size"] = None  # another network's layers are narrow enough for it
    patterns["pair_limit"] = recipe.pair_limit and 8 in own_widths  # or another one's are wide enough
    if component is None:
        return replace(recipe, **patterns)
    return replace(
        recipe,
        **patterns,
        absorb=False,
        timestep_groups=1,
        float_activations=0.0,
        output_correction=False,
        attention_matmuls=False,
        time_embedding="quantized",
        network_output=False,
        learned_variance=False,
        sampled_image=False,
    )
