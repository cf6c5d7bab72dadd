"""Which layers are quantized, and how: the recipe's patterns applied to one network."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

from octavo.calibration.recipe import PTQ4DM
from octavo.calibration.tracing import Trace
from octavo.errors import OctavoError
from octavo.quantization import FLOAT, AttentionSpecs, QuantSpec
from octavo.quantization.packing import BITS


@dataclass(frozen=True)
class LayerRule:
    """How one layer is quantized: what its weights and its input activations become.

    `balanced`: its input channels are multiplied by factors in front of the quantizer, undone in the weights.
    `timestep_groups`: so many groups of timesteps have a scale each for its activations; 1: one scale for all.
    `sub_pixel`: it is the sub-pixel convolution that stands for an upsampling and the layer of this name. Where
    activations are float no integer kernel adds products: the weights have no pair limit there, whatever was given.
    """

    weights: QuantSpec
    activations: QuantSpec
    balanced: bool = False
    timestep_groups: int = 1
    sub_pixel: bool = False

    def __post_init__(self) -> None:
        if self.activations.is_float and self.weights.pair_limit:
            object.__setattr__(self, "weights", replace(self.weights, pair_limit=False))

    def to_dict(self) -> dict[str, Any]:
        """JSON-safe; without groups of timesteps where there is one, as it always was, and so with sub_pixel."""
        by_timestep = {"timestep_groups": self.timestep_groups} if self.timestep_groups > 1 else {}
        sub_pixel = {"sub_pixel": True} if self.sub_pixel else {}
        return {
            "weights": self.weights.to_dict(),
            "activations": self.activations.to_dict(),
            "balanced": self.balanced,
            **by_timestep,
            **sub_pixel,
        }


def layer_rules(
    recipe: PTQ4DM,
    executed: Sequence[str],
    edges: Sequence[str],
    attention: Sequence[str] = (),
    timestep_layers: Sequence[str] = (),
    unread: Sequence[str] = (),
    constant: Sequence[str] = (),
) -> dict[str, LayerRule]:
    """The rule of each layer to quantize, in order of execution.

    `executed`: names of the convolutions and linears that ran, in order. `edges`: those that read the image and
    write the output, left float unless the recipe says otherwise. `attention`: names of the modules that compute
    attention, which patterns may match too if the recipe quantizes its products. `timestep_layers`: those whose inputs
    depend on the timestep alone, left float, or their activations, if the recipe's `time_embedding` says so. `unread`:
    those that the output does not depend on, whose activations stay float whatever `bits` say: an engine leaves them
    out, and no kernel could be audited. `constant`: those whose inputs depend on nothing that the network is handed,
    likewise: an engine computes them once, when it compiles, and OpenVINO 2026.4 fails to if they are to be rounded.
    Raises `OctavoError` for a pattern that matches no layer (a typing mistake would otherwise pass unseen), when
    nothing is left to quantize, or for a `group_size` that no layer is narrow enough for.
    """
    for pattern in (*recipe.include, *recipe.exclude, *recipe.bits):
        matched = (*executed, *attention) if recipe.attention_matmuls else executed
        if not any(fnmatchcase(name, pattern) for name in matched):
            raise OctavoError(
                f"layer pattern {pattern!r} matches none of the network's {len(executed)} layers"
            )
    kept_float = set(edges) if recipe.first_and_last == "float" else set()
    if recipe.time_embedding == "float":
        kept_float.update(timestep_layers)
    float_inputs = set(timestep_layers) if recipe.time_embedding == "weights" else set()
    never_integer = {*unread, *constant}
    rules = {
        name: _rule(recipe, name, name in float_inputs, name in never_integer)
        for name in executed
        if _matches(name, recipe.include) and not _matches(name, recipe.exclude) and name not in kept_float
    }
    if not rules:
        raise OctavoError("include, exclude: no layer is left to quantize")
    if recipe.group_size and not any(rule.weights.granularity == "per_group" for rule in rules.values()):
        raise OctavoError(
            f"group_size: no layer has weights of at most {BITS} bits; give 4-bit weights, or leave it out"
        )
    return rules


def rules_of(recipe: PTQ4DM, traced: Trace) -> dict[str, LayerRule]:
    """`layer_rules` of a network that was traced."""
    return layer_rules(
        recipe,
        traced.executed,
        traced.edges,
        traced.attention,
        traced.timestep_layers,
        traced.unread,
        traced.constant,
    )


def with_own_bits(recipe: PTQ4DM, layers: Iterable[str]) -> set[str]:
    """Those of `layers` whose bits a pattern of the recipe's `bits` gives.

    >>> with_own_bits(PTQ4DM(bits={"mid.*": (4, 8)}), ["mid.to_q", "up.to_q"])
    {'mid.to_q'}
    """
    return {name for name in layers if _bits(recipe.bits, name) is not None}


def attention_rules(recipe: PTQ4DM, attention: Sequence[str]) -> dict[str, AttentionSpecs]:
    """What attention's operands become, by the name of the module that computes it, in order of execution.

    Empty unless the recipe asks for it. `attention`: names of the modules that called torch's attention. One whose
    activations `bits` leave float is left out. Raises `OctavoError` when there is none, or none that the recipe's
    patterns leave.
    """
    if not recipe.attention_matmuls:
        return {}
    bits = {name: (_bits(recipe.bits, name) or (0, recipe.activations))[1] for name in attention}
    rules = {
        name: AttentionSpecs.of_bits(bits[name])
        for name in attention
        if _matches(name, recipe.include) and not _matches(name, recipe.exclude) and bits[name] != FLOAT
    }
    if not rules:
        raise OctavoError(
            "attention_matmuls: this network calls no torch scaled_dot_product_attention; leave it out of the recipe"
            if not attention
            else "attention_matmuls: include, exclude and bits leave no attention to quantize; leave it out"
        )
    for outer in rules:
        for inner in attention:
            if inner.startswith(f"{outer}.") and inner not in rules:
                raise OctavoError(f"attention_matmuls: {inner} runs within {outer}; exclude both or neither")
    return rules


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _rule(recipe: PTQ4DM, name: str, float_input: bool, never_integer: bool) -> LayerRule:
    default = (recipe.weights, FLOAT if float_input else recipe.activations)
    weights, activations = _bits(recipe.bits, name) or default
    if never_integer:
        activations = FLOAT
    return LayerRule(recipe.weight_spec(weights), recipe.activation_spec(activations))


def _bits(bits: Mapping[str, tuple[int, int]], name: str) -> tuple[int, int] | None:
    matching = [value for pattern, value in bits.items() if fnmatchcase(name, pattern)]
    return matching[-1] if matching else None
