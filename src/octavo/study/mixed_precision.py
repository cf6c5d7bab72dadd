"""Bits for each layer under a budget of size or latency: chosen by measured end effects, then measured as a whole"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from torch import nn

from octavo.errors import OctavoError
from octavo.evaluation.intervals import mean_estimate
from octavo.study.bits_file import LayerBits
from octavo.study.budget import Choice, choose
from octavo.study.layer_time import LayerTime, layer_time, times
from octavo.study.ranking import decibels
from octavo.study.sensitivity import Measurements

Kind = Literal["size", "latency"]
Costs = list[list[float]]


@dataclass(frozen=True)
class Budget:
    """size: the denoiser's bytes on disk over its float32 bytes; latency: over the network with all layers in int8."""

    kind: Kind
    value: float

    def __str__(self) -> str:
        return f"{self.kind}={self.value:g}"


def parse_budget(text: str) -> Budget:
    """A budget as the command line has it. Raises `OctavoError` for anything else.

    >>> parse_budget("size=0.2")
    Budget(kind='size', value=0.2)
    """
    kind, _, number = text.partition("=")
    try:
        value = float(number)
    except ValueError:
        value = math.nan
    if kind not in ("size", "latency") or not (math.isfinite(value) and value > 0):
        raise OctavoError(f"budget: {text!r} is not of the form size=0.2 or latency=1.1")
    return Budget("size" if kind == "size" else "latency", value)


def choose_bits(found: Measurements, budget: Budget) -> dict[str, Any]:
    """Float or one of the measured widths for each layer, so that the sum of end effects is least (JSON).

    `layers`     name -> [weight bits, activation bits], or "float".
    `predicted`  the sum of the layers' end effects, a mean squared error of images; `bound`: no choice has less.
    `measured`   the end effect of this mix as a whole, of the mix that the same budget gives by single-evaluation
                 errors, and of all layers at each width: on images that nothing was chosen by, with intervals.
                 `ratio`: of measured to predicted.
    `cost`       in the budget's own terms; of a latency budget with what `times` measured.

    Size counts every tensor that a checkpoint stores. Latency is `LayerTime`'s model; 4-bit weights run in the 8-bit
    kernels, so they save none. Effects are taken to add up; `ratio` tells how far that holds. Raises `OctavoError`
    for a budget that no choice keeps, or that the float network keeps already.
    """
    costs, time = _costs(found, budget)
    names = [row["layer"] for row in found.results["layers"]]
    limits = _limit(found, budget, costs)
    by_end = choose(costs, _effects(found, "squared_errors"), limits)
    by_single = choose(costs, _effects(found, "single_errors"), limits)
    widths = [None, *found.options.weight_bits]
    mixes = {
        what: {name: widths[o] for name, o in zip(names, choice.options, strict=True)}
        for what, choice in (("chosen", by_end), ("by single-evaluation error", by_single))
    }
    mixes |= {f"all w{bits}": dict.fromkeys(names, bits) for bits in found.options.weight_bits}
    measured = {what: _measured(found, mix) for what, mix in mixes.items()}
    result: dict[str, Any] = {
        "budget": str(budget),
        "layers": {name: _bits(found, name, bits) for name, bits in mixes["chosen"].items()},
        "counts": {_name(bits): sum(bits == one for one in mixes["chosen"].values()) for bits in widths},
        "predicted": by_end.effect,
        "bound": by_end.bound,
        "measured": measured,
        "ratio": measured["chosen"]["value"] / by_end.effect if by_end.effect > 0 else None,
        "cost": {"model": _ratio(found, budget, by_end)},
    }
    if time is not None:
        result["cost"] |= _timed(found, mixes["chosen"], time)
    return result


def _costs(found: Measurements, budget: Budget) -> tuple[Costs, LayerTime | None]:
    """A row for each layer: float, then each width."""
    widths, rows = [str(bits) for bits in found.options.weight_bits], found.results["layers"]
    if budget.kind == "size":
        return [[row["float_bytes"], *(row["options"][w]["bytes"] for w in widths)] for row in rows], None
    time = layer_time(found.bench, _quantized(found), found.folder / "compiled", found.bench.batch_size)
    if time.float_ms <= time.int8_ms:
        raise OctavoError(
            f"budget: {budget}: this network takes {time.int8_ms:.1f} ms in int8 and {time.float_ms:.1f} ms in float "
            "here, so there is nothing to choose; give --budget size=..."
        )
    return [[time.extra(row["layer"]), *(0.0 for _ in widths)] for row in rows], time


def _limit(found: Measurements, budget: Budget, costs: Costs) -> float:
    """What the layers may cost together, in the unit of `costs`."""
    low, high = (math.fsum(pick(row) for row in costs) for pick in (min, max))
    fixed, unit = _scale(found, budget)
    least, most, limit = (fixed + low) / unit, (fixed + high) / unit, budget.value * unit - fixed
    if limit < low:
        raise OctavoError(
            f"budget: {budget} cannot be reached; this model goes from {_up(least)} to {most:.4g}"
        )
    if limit >= high:
        raise OctavoError(f"budget: {budget} is kept by the float network, which has {most:.4g}; give less")
    return limit


def _scale(found: Measurements, budget: Budget) -> tuple[float, float]:
    """What is not a layer's, and the unit of the budget's value."""
    if budget.kind == "size":
        return found.results["other_bytes"], found.results["float32_bytes"]
    return 1.0, 1.0


def _ratio(found: Measurements, budget: Budget, choice: Choice) -> float:
    fixed, unit = _scale(found, budget)
    return (fixed + choice.cost) / unit


def _up(value: float) -> str:
    """Four significant digits, rounded up, so that what is told can be reached."""
    digits = 3 - math.floor(math.log10(value))
    return f"{math.ceil(value * 10**digits) / 10**digits:.4g}"


def _effects(found: Measurements, of: str) -> Costs:
    widths = [str(bits) for bits in found.options.weight_bits]
    return [
        [0.0, *(float(np.mean(row["options"][w][of])) for w in widths)] for row in found.results["layers"]
    ]


def _quantized(found: Measurements, mix: Mapping[str, int | None] | None = None) -> dict[str, nn.Module]:
    """The quantized layers of a mix (None: all, at the first width)."""
    first = found.options.weight_bits[0]
    mix = dict.fromkeys(found.variants[first], first) if mix is None else mix
    return {name: found.variants[bits][name] for name, bits in mix.items() if bits is not None}


def _measured(found: Measurements, mix: Mapping[str, int | None]) -> dict[str, Any]:
    """The end effect of a mix on the images after those that layers were ranked by, with its interval."""
    bench = found.bench
    seed = bench.seed + bench.num_images
    kept = found.kept(
        "mix",
        dict(mix),
        lambda: {"squared_errors": bench.end_effect(_quantized(found, mix), seed=seed).tolist()},
    )
    return mean_estimate(kept["squared_errors"]).as_json()


def _timed(found: Measurements, mix: Mapping[str, int | None], time: LayerTime) -> dict[str, Any]:
    """The mix against all layers in int8, measured: the ratio of times with its quartiles."""
    mixes: dict[str, dict[str, nn.Module]] = {"int8": _quantized(found), "mix": _quantized(found, mix)}
    timings = times(found.bench, mixes, found.folder / "compiled", batch_size=found.bench.batch_size)
    ratio, low, high = timings["int8"].ratio(timings["mix"])
    return {
        "measured": ratio,
        "measured_quartiles": [low, high],
        "int8_ms": time.int8_ms,
        "float_ms": time.float_ms,
        "batch_size": found.bench.batch_size,
    }


def _bits(found: Measurements, layer: str, bits: int | None) -> list[int] | str:
    if bits is None:
        return "float"
    return [bits, found.variants[bits][layer].input_spec.bits]


def layer_bits(chosen: Mapping[str, Any]) -> dict[str, LayerBits]:
    """The `layers` of `choose_bits`, as `write_bits` takes them."""
    return {name: None if bits == "float" else (bits[0], bits[1]) for name, bits in chosen["layers"].items()}


def _name(bits: int | None) -> str:
    return "float" if bits is None else f"w{bits}"


def choice_text(chosen: Mapping[str, Any]) -> str:
    """What was chosen and how near it is, for a terminal."""
    counts = ", ".join(f"{count} {name}" for name, count in chosen["counts"].items())
    cost, measured = chosen["cost"], chosen["measured"]
    lines = [f"{chosen['budget']}: {counts}; {chosen['budget'].partition('=')[0]} {cost['model']:.4f}"]
    if "measured" in cost:
        low, high = cost["measured_quartiles"]
        lines[0] += f" by the model, {cost['measured']:.3f} measured ({low:.3f} to {high:.3f})"
    lines.append(
        f"predicted {decibels(chosen['predicted'])} dB (no choice above {decibels(chosen['bound'])}); "
        f"on other images measured {_interval(measured['chosen'])}"
    )
    return "\n".join([*lines, *_others(measured)])


def _others(measured: Mapping[str, Any]) -> Sequence[str]:
    return [f"  {what}: {_interval(figure)}" for what, figure in measured.items() if what != "chosen"]


def _interval(figure: Mapping[str, Any]) -> str:
    low = max(figure["low"] or 0.0, 0.0)
    return f"{decibels(figure['value'])} dB ({decibels(figure['high'])} to {decibels(low)})"
