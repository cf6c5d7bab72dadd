"""The recipe: everything that decides what a quantized model is, in one frozen value."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from octavo.diffusion import DISTRIBUTIONS, Distribution, distribution
from octavo.errors import OctavoError, quoted
from octavo.quantization import FLOAT, METRICS, ROUNDINGS, QuantSpec, packing

MAX_SAMPLES = 1024
LayerBits = tuple[int, int]


@dataclass(frozen=True)
class PTQ4DM:
    """Post-training quantization for diffusion models (arXiv 2211.15736), as one value.

    weights, activations   bits, 2 to 8. Weights are symmetric, per output channel or per group; activations per
                           tensor.
    symmetric              activations as symmetric s8 (portable: TensorRT knows nothing else) instead of u8 with a
                           zero point (more faithful: half of what follows a SiLU lies in [-0.28, 0]).
    timesteps              which steps are looked at: a name ("ndtc", "uniform", "single", "skew_normal",
                           "as_published") or a `Distribution` with its own parameters.
    samples                number of calibration pairs, 1 to 1024.
    steps                  the sampler's steps while calibrating; best what sampling will use.
    pairs_per_trajectory   pairs caught along one denoising run. The paper's algorithm is 1; 4 costs 0.39 of it and
                           moved ranges less than another seed does (docs/log.md, 2026-11-22).
    metric                 what a range minimises: "mse" (L_p, p = 2.4), "l1", "cosine", "kl"; "minmax" searches none.
    rounding               how weights are rounded: "nearest", or "gptq", which keeps each layer's outputs near on the
                           calibration pairs (2210.17323): closer to full precision, minutes of work.
    balance                multiply each layer's input channels in front of its quantizer and divide its weights by the
                           same, where that lowers the error of its output (2211.10438): one fused multiplication.
    absorb                 where a normalization, linear or convolution in front of a balanced layer can make that
                           multiplication, it does, in its own weights (2211.10438, section 4); layers that read one
                           output share their multiplier where that loses little.
    sub_pixel              convolutions behind a nearest-neighbour upsampling read the small image: four 2 x 2 kernels
                           of summed weights instead of a 3 x 3 one on four copies of each pixel: the same function in
                           4 / 9 of the multiply-adds, with 16 / 9 of these layers' weights
                           (`octavo.quantization.sub_pixel`).
    pair_limit             keep the 8-bit weights of neighbouring input channels within what CPUs without VNNI add
                           exactly: |w1| + |w2| <= 128 where their signs agree (`octavo.quantization.pairs`). Such a
                           layer takes one integer kernel there instead of two, at a small price in fidelity.
    float_activations      at most this share of the quantized layers' multiply-adds, 0 to 1, in layers whose
                           activations stay float: those that err most for what they multiply, until the error of all
                           others together is 1 dB below bf16's (`octavo.calibration.float_activations`); never a layer
                           that `bits` names. Costs run time, and nothing on disk.
    timestep_groups        at most so many groups of timesteps, 1 to 64, in each of which a layer has an activation
                           scale of its own where that lowers the error of its input: a table and two multiplications
                           around the same integer kernel; weights are stored once. 1: one scale for all timesteps.
    bias_correction        take each layer's mean output error on the calibration pairs out of its bias (1906.04721):
                           costs nothing to run, and layers without a bias are left alone.
    output_correction      correct the network's output at each timestep by its error on the calibration pairs: the part
                           that is correlated with the output, and the mean of the rest (PTQD, 2305.10657, section 4.2).
                           The rest's variance is left: a sampler that draws noise draws as much as ever (section 4.3).
                           A table of a few numbers; works with every scheduler, best with the calibrated one.
    attention_matmuls      also attention's two products, Q K^T and P V, in integers: operands of the recipe's
                           activation bits, K and P of at most 7 (`octavo.quantization.attention`). For networks that
                           call torch's `scaled_dot_product_attention`; `include`, `exclude` and `bits` know an
                           attention by its module's name (32 activation bits leave its products float). On CPUs without
                           VNNI it is slower than float (docs/log.md).
    include, exclude       layer name patterns (fnmatch); a layer is quantized if it matches an include pattern and no
                           exclude pattern. The rest stays float.
    bits                   pattern -> (weight bits, activation bits); the last match wins. 32 activation bits leave them
                           float: the weights alone are stored in integers, and no integer kernel runs.
    group_size             so many consecutive weights of an output channel share a scale, where weights have at most 4
                           bits; wider ones, and all if None, have one scale per output channel.
    first_and_last         "float" keeps the layers that read the image and write the output in float.
    time_embedding         "weights" keeps activations float in the layers whose inputs depend on the timestep alone:
                           the embedding's MLP, and the projections of a network without class labels or other
                           conditions in its embedding (found by following the data). OpenVINO reads their outputs from
                           a table, in f32, at no cost, where features are not reused (`octavo.runtimes.time_table`);
                           the other runtimes compute them. "float" leaves their weights alone too: four bytes each on
                           disk.
    network_output, learned_variance, sampled_image
                           also quantize mu (the network's prediction), Sigma (the learned variance, where there is
                           one) and x_{t-1} as the network reads it (paper, section 3.2 and table 1).

    Raises `OctavoError` for a value out of range.

    >>> PTQ4DM(weights=8, activations=8, timesteps="ndtc").metric
    'mse'
    """

    weights: int = 8
    activations: int = 8
    symmetric: bool = False
    timesteps: str | Distribution = "ndtc"
    samples: int = 256
    steps: int = 100
    pairs_per_trajectory: int = 4
    metric: str = "mse"
    rounding: str = "nearest"
    balance: bool = False
    absorb: bool = False
    sub_pixel: bool = False
    pair_limit: bool = False
    float_activations: float = 0.0
    timestep_groups: int = 1
    bias_correction: bool = False
    output_correction: bool = False
    attention_matmuls: bool = False
    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()
    bits: Mapping[str, LayerBits] = field(default_factory=dict)
    group_size: int | None = None
    first_and_last: Literal["float", "quantized"] = "float"
    time_embedding: Literal["float", "weights", "quantized"] = "quantized"
    network_output: bool = False
    learned_variance: bool = False
    sampled_image: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "include", _patterns("include", self.include))
        object.__setattr__(self, "exclude", _patterns("exclude", self.exclude))
        object.__setattr__(self, "bits", _bits_by_pattern(self.bits))
        for name, (low, high) in {
            "weights": (2, 8),
            "activations": (2, 8),
            "samples": (1, MAX_SAMPLES),
            "steps": (1, 10_000),
            "pairs_per_trajectory": (1, MAX_SAMPLES),
            "timestep_groups": (1, 64),
        }.items():
            _check_int(name, getattr(self, name), low, high)
        share = self.float_activations
        if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 <= share <= 1:
            raise OctavoError(f"float_activations: {quoted(share)} is not a share from 0 to 1")
        if self.group_size is not None:
            _check_int("group_size", self.group_size, 2, 65536)
        for pattern, bits in self.bits.items():
            _check_int(f"bits[{quoted(pattern)}]", bits[0], 2, 8)
            if bits[1] != FLOAT:
                _check_int(f"bits[{quoted(pattern)}]", bits[1], 2, 8, f", nor {FLOAT} (float)")
        _check_choice("metric", self.metric, tuple(METRICS))
        _check_choice("rounding", self.rounding, ROUNDINGS)
        _check_choice("first_and_last", self.first_and_last, ("float", "quantized"))
        _check_choice("time_embedding", self.time_embedding, ("float", "weights", "quantized"))
        if not isinstance(self.timesteps, Distribution):
            _check_choice("timesteps", self.timesteps, tuple(DISTRIBUTIONS))
        for name in (
            "symmetric",
            "balance",
            "absorb",
            "sub_pixel",
            "pair_limit",
            "bias_correction",
            "output_correction",
            "attention_matmuls",
            "network_output",
            "learned_variance",
            "sampled_image",
        ):
            if not isinstance(getattr(self, name), bool):
                raise OctavoError(f"{name}: {quoted(getattr(self, name))} is neither True nor False")

        if self.absorb and not self.balance:
            raise OctavoError("absorb: makes balancing's multiplication; give balance too, or leave it out")
        if self.pair_limit and 8 not in widths(self.weights, self.bits):
            raise OctavoError(
                "pair_limit: only 8-bit weights can overflow, and none are asked for; leave it out"
            )

    @property
    def distribution(self) -> Distribution:
        return distribution(self.timesteps) if isinstance(self.timesteps, str) else self.timesteps

    def weight_spec(self, bits: int | None = None) -> QuantSpec:
        bits = bits or self.weights
        if self.group_size is None or bits > packing.BITS:
            limit = self.pair_limit and bits == 8
            return QuantSpec(bits, True, "per_channel", narrow=True, pair_limit=limit)
        return QuantSpec(bits, True, "per_group", narrow=True, group_size=self.group_size)

    def activation_spec(self, bits: int | None = None) -> QuantSpec:
        if bits == FLOAT:
            return QuantSpec(FLOAT)
        return QuantSpec(bits=bits or self.activations, symmetric=self.symmetric, granularity="per_tensor")

    def to_dict(self) -> dict[str, Any]:
        """JSON-safe, every field; a distribution as its own `to_dict`."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {
            **values,
            "timesteps": self.distribution.to_dict(),
            "include": list(self.include),
            "exclude": list(self.exclude),
            "bits": {pattern: list(bits) for pattern, bits in self.bits.items()},
        }


def widths(weights: int, bits: Mapping[str, LayerBits]) -> set[int]:
    """Of weights: the recipe's own and those of patterns."""
    return {weights, *(own for own, _ in bits.values())}


def bits_in_order(values: Any) -> Any:
    """JSON-safe values in which the `bits` of recipes, of two patterns and more, are lists, for digests of sorted keys.

    Of patterns that fit a layer the last one counts: two recipes may differ in their order alone.

    >>> bits_in_order({"recipe": {"bits": {"b.*": [4, 8], "a": [8, 8]}, "steps": 10}})
    {'recipe': {'bits': [('b.*', [4, 8]), ('a', [8, 8])], 'steps': 10}}
    """
    if isinstance(values, (list, tuple)):
        return [bits_in_order(value) for value in values]
    if not isinstance(values, Mapping):
        return values
    return {
        key: list(value.items())
        if key == "bits" and isinstance(value, Mapping) and len(value) > 1
        else bits_in_order(value)
        for key, value in values.items()
    }


def _patterns(name: str, value: Any) -> tuple[str, ...]:
    if isinstance(value, str):
        return (value,)
    patterns = tuple(value) if isinstance(value, Iterable) else (value,)
    if not all(isinstance(pattern, str) for pattern in patterns):
        raise OctavoError(f"{name}: give layer name patterns, such as 'mid_block.*'")
    return patterns


def _bits_by_pattern(value: Any) -> dict[str, LayerBits]:
    if not isinstance(value, Mapping):
        raise OctavoError("bits: give a mapping of layer name patterns, such as {'mid_block.*': (4, 8)}")
    for pattern, bits in value.items():
        if not isinstance(bits, (list, tuple)) or len(bits) != 2:
            raise OctavoError(f"bits[{quoted(pattern)}]: give (weight bits, activation bits)")
    return {pattern: (bits[0], bits[1]) for pattern, bits in value.items()}


def _check_int(name: str, value: Any, low: int, high: int, besides: str = "") -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise OctavoError(f"{name}: {quoted(value)} is not a whole number from {low} to {high}{besides}")


def _check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise OctavoError(f"{name}: {quoted(value)} is not one of {', '.join(choices)}")
