"""Everything that a report shows, as plain values that JSON can hold."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

Row = dict[str, Any]


@dataclass(frozen=True)
class Interval:
    """A figure with the ends of its interval (None where it has none), and how that was made, in a few words."""

    value: float
    low: float | None = None
    high: float | None = None
    method: str = ""


@dataclass(frozen=True)
class Verdict:
    """The one line: how much smaller, how much faster, how close.

    size_bytes, float_bytes  of the denoiser.
    speed                    one evaluation of the network, times as fast as by `baseline`, with quartiles; None in
                             simulation.
    psnr                     dB, mean over the images with its 95 % interval.
    p_value                  of the paired test that both sets of images are drawn alike, where it was made.
    """

    size_bytes: int
    float_bytes: int
    psnr: Interval
    num_images: int
    speed: Interval | None = None
    baseline: str = "torch eager fp32"
    batch_size: int = 1
    p_value: float | None = None


@dataclass(frozen=True)
class ImagePair:
    """One seed's image twice, as data URIs, and their difference in false colours. `psnr` in dB, at most 100."""

    seed: int
    psnr: float
    reference: str
    quantized: str
    difference: str


@dataclass(frozen=True)
class Gallery:
    """Image pairs, the worst first. `difference_top`: the difference, of a range of 1, that the brightest colour is."""

    pairs: list[ImagePair]
    num_images: int
    difference_top: float
    width: int
    height: int
    shrunk: bool = False
    psnr_values: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Figure:
    """One row of the quality table: a figure of the quantized model, and the full-precision model's own beside it."""

    name: str
    quantized: Interval
    reference: Interval | None = None
    unit: str = ""
    better: str = ""
    note: str = ""


@dataclass(frozen=True)
class TradeOffPoint:
    """What one engine needs for an image of so many steps, and how far that is from full precision at all steps.

    seconds: per image of a batch, with the fastest and slowest round. psnr: None for the reference itself.
    """

    engine: str
    steps: int
    seconds: Interval
    psnr: Interval | None
    batch_size: int = 1


@dataclass(frozen=True)
class ErrorMap:
    """Relative error of each layer (row, in the network's order) at each timestep; None where it did not run.

    `worst`: row indices, the largest mean first.
    """

    layers: list[str]
    timesteps: list[float]
    errors: list[list[float | None]]
    worst: list[int]


@dataclass(frozen=True)
class RangeOverTime:
    """One layer's input over the timesteps, and the range that its scale can hold."""

    layer: str
    timesteps: list[float]
    minimum: list[float]
    maximum: list[float]
    quantiles: list[list[float]]
    outside: list[float]
    scale: float
    zero_point: int
    bits: int
    low: float
    high: float


@dataclass(frozen=True)
class CalibrationSteps:
    """Where calibration looked: pairs by step, from the noisy end; `timesteps`: what the network is told there."""

    distribution: Row
    pairs: list[int]
    timesteps: list[float]


@dataclass(frozen=True)
class ReportData:
    """The whole report. Every part may be absent (None or empty), and the page leaves it out.

    cost          "model" and "reference": `octavo.evaluation.cost.Cost` as JSON; null is what was not measured.
    notes         what whoever decides must know first. figure_notes: what limits the table of figures.
    study, tuning what `octavo study` and `octavo tune` wrote, as JSON.
    float_layers  convolutions and linears that were not quantized. weights_alone: quantized ones whose activations stay
                  float. loading: the lines that load the model.
    """

    title: str
    made: Row
    verdict: Verdict | None = None
    cost: Row = field(default_factory=dict)
    gallery: Gallery | None = None
    figures: list[Figure] = field(default_factory=list)
    figure_notes: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    trade_off: list[TradeOffPoint] = field(default_factory=list)
    errors: ErrorMap | None = None
    ranges: list[RangeOverTime] = field(default_factory=list)
    calibration: CalibrationSteps | None = None
    audit: list[Row] = field(default_factory=list)
    float_layers: list[str] = field(default_factory=list)
    weights_alone: list[str] = field(default_factory=list)
    recipe: Row = field(default_factory=dict)
    how_calibrated: Row = field(default_factory=dict)
    loading: str = ""
    study: Row | None = None
    tuning: Row | None = None

    def to_dict(self) -> Row:
        return asdict(self)
