"""The paper's five tables as lists of rows, each a variant to measure, at any bit width."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from octavo.calibration import PTQ4DM
from octavo.diffusion import NDTC, Single
from octavo.errors import OctavoError
from octavo.study import paper
from octavo.study.options import BITS, StudyOptions
from octavo.study.paper import PaperFigures
from octavo.study.samplers import Sampler, with_sampler
from octavo.study.variants import Variant

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from octavo.calibration.tracing import Trace

METRIC_LABELS = {
    "l1": "L1",
    "cosine": "cosine distance",
    "kl": "KL divergence",
    "mse": "L_2.4 (the paper's MSE)",
    "minmax": "min-max, no search",
}
FP = "full precision"


@dataclass(frozen=True)
class Row:
    """One row: a variant to measure; none for full precision, or where `reason` says why it does not apply."""

    label: str
    sampler: Sampler
    variant: Variant | None = None
    paper: PaperFigures | None = None
    reason: str = ""


@dataclass(frozen=True)
class Table:
    """`name` T1 .. T5, `bits` "W8A8", the rows, and the label of the row that the others are compared with."""

    name: str
    bits: str
    title: str
    rows: tuple[Row, ...]
    base: str | None = None
    notes: tuple[str, ...] = ()


def plan_tables(options: StudyOptions, pipeline: DiffusionPipeline, traced: Trace) -> list[Table]:
    """Every table the options ask for: all at 8 bits, then those that are repeated at lower widths."""
    make: dict[str, Callable[[Variant], Table]] = {
        "T1": lambda base: _operations(base, traced.has_variance),
        "T2": lambda base: _sources(base, pipeline),
        "T3": lambda base: _timesteps(base, options.single),
        "T4": _metrics,
        "T5": lambda base: _samplers(base, options.samplers, pipeline),
    }
    tables = [make[name](base_variant(options)) for name in options.tables]
    for bits in options.low_bits:
        low = base_variant(options, bits)
        for name in options.tables:
            if name in options.low_bit_tables:
                table = make[name](low)  # the paper has 8 bits only
                rows = tuple(replace(row, paper=None) for row in table.rows)
                tables.append(replace(table, rows=rows))
    return tables


def base_variant(options: StudyOptions, bits: tuple[int, int] = BITS) -> Variant:
    """The method with its defaults, which most rows change in one thing: NDTC N(0.4 T, 0.5 T), L_2.4."""
    recipe = PTQ4DM(
        weights=bits[0],
        activations=bits[1],
        timesteps=NDTC(mean=0.4, std=0.5),
        samples=options.samples,
        steps=options.steps,
        pairs_per_trajectory=options.pairs_per_trajectory,
    )
    return Variant(options.base_sampler, recipe)


def _operations(base: Variant, has_variance: bool) -> Table:
    names = {"network_output": "mu, the network's output", "sampled_image": "x_{t-1}"}
    if has_variance:
        names = {
            "network_output": names["network_output"],
            "learned_variance": "Sigma, the learned variance",
            "sampled_image": names["sampled_image"],
        }
    every = dict.fromkeys(names, True)

    def row(label: str, operations: dict[str, bool], network: bool, key: str = "") -> Row:
        weights = (
            base.recipe.weights if network else BITS[0]
        )  # of a float network no matter: tables share the cell
        recipe = replace(base.recipe, weights=weights, **operations)  # type: ignore[arg-type]
        variant = replace(base, recipe=recipe, network=network)
        return Row(label, base.sampler, variant, paper.OPERATIONS.get(key))

    rows = [Row(FP, base.sampler, paper=paper.OPERATIONS["float"])]
    rows += [row(f"{label} alone", {name: True}, False, name) for name, label in names.items()]
    if not has_variance:
        told = "this network predicts no variance"
        sigma = Row("Sigma alone", base.sampler, paper=paper.OPERATIONS["learned_variance"], reason=told)
        rows.insert(2, sigma)
    rows.append(row("all of them, network in float", every, False, "all"))
    rows.append(row("network alone", {}, True))
    rows.append(row("network and all of them", every, True))
    notes = (
        "As in the paper, an operation alone is quantized while the network stays in float; the last two rows add the "
        "network. x_{t-1} is rounded where the network reads it; the sampler keeps its own copy in float.",
    )
    return Table("T1", _bits(base), "Operation selection", tuple(rows), "network alone", notes)


def _sources(base: Variant, pipeline: DiffusionPipeline) -> Table:
    scheduler = with_sampler(pipeline, base.sampler).scheduler
    needed = ("init_noise_sigma", "add_noise", "scale_model_input")
    lacking = [name for name in needed if not hasattr(scheduler, name)]
    reason = f"{type(scheduler).__name__} has no {lacking[0]}" if lacking else ""
    labels = {
        "noise": "noise x_T",
        "raw": "raw images x_0",
        "forward": "q(x_t | x_0), training-mimic",
        "denoising": "denoising, the method",
    }
    rows = [Row(FP, base.sampler)]
    for source, label in labels.items():
        figures = paper.SOURCES.get(source)
        if reason and source in ("noise", "forward"):
            rows.append(Row(label, base.sampler, paper=figures, reason=reason))
        else:
            rows.append(Row(label, base.sampler, replace(base, source=source), figures))
    notes = (
        "All four sources hand the network the very same drawn timesteps and conditions; only the sample differs. "
        "x_0 is real images where they were given, else the full-precision model's own samples.",
    )
    return Table("T2", _bits(base), "Calibration source", tuple(rows), labels["denoising"], notes)


def _timesteps(base: Variant, single: tuple[float, ...]) -> Table:
    distributions: dict[str, tuple[Any, PaperFigures | None]] = {}
    for k, at in enumerate(single):
        distributions[f"single t = {at:g} T"] = (Single(at), paper.TIMESTEPS["single"] if k == 0 else None)
    base_label = "NDTC, std 0.5 T"
    distributions |= {
        "uniform": ("uniform", paper.TIMESTEPS["uniform"]),
        base_label: (base.recipe.timesteps, paper.TIMESTEPS["ndtc"]),
        "NDTC, std sqrt(T/2), the text's": (NDTC(std="sqrt"), None),
        "NDTC, std 0.4 T, the script's": (NDTC(std=0.4), None),
        "skew-normal": ("skew_normal", None),
        "as published, index inverted": ("as_published", None),
    }
    rows = [Row(FP, base.sampler)]
    for label, (timesteps, figures) in distributions.items():
        recipe = replace(base.recipe, timesteps=timesteps)
        if isinstance(timesteps, Single):  # several pairs of one trajectory would be the same pair
            recipe = replace(recipe, pairs_per_trajectory=1)
        variant = replace(base, recipe=recipe)
        rows.append(Row(label, base.sampler, variant, figures))
    notes = (
        "t counts the sampler steps that are left: t = T is noise, t = 0 the last call. Every NDTC has mean 0.4 T. "
        "A single t takes one pair from each trajectory, the other rows several. "
        "'As published' repeats the research code's errors: the image of one index under the label of another, "
        "and indices in place of training timesteps.",
    )
    return Table("T3", _bits(base), "Calibration timesteps", tuple(rows), base_label, notes)


def _metrics(base: Variant) -> Table:
    rows = [Row(FP, base.sampler)]
    rows += [
        Row(label, base.sampler, replace(base, recipe=replace(base.recipe, metric=metric)), figures)
        for metric, label in METRIC_LABELS.items()
        for figures in [paper.METRICS.get(metric)]
    ]
    notes = ("The metric chooses the ranges of activations and of weights alike.",)
    return Table("T4", _bits(base), "Metric of the range search", tuple(rows), METRIC_LABELS["mse"], notes)


def _samplers(base: Variant, samplers: tuple[Sampler, ...], pipeline: DiffusionPipeline) -> Table:
    rows = []
    for sampler in samplers:
        figures, quantized = paper.FULL_PRECISION.get(str(sampler)), paper.QUANTIZED.get(str(sampler))
        label = f"{sampler}, {_bits(base)}"
        try:
            with_sampler(pipeline, sampler)
        except OctavoError as error:
            rows.append(Row(label, sampler, paper=quantized, reason=str(error)))
            continue
        rows.append(Row(f"{sampler}, {FP}", sampler, paper=figures))
        variant = replace(base, sampler=sampler, recipe=replace(base.recipe, steps=sampler.steps))
        rows.append(Row(label, sampler, variant, quantized))
    notes = (
        "Each sampler is calibrated on its own trajectories. The paper, on CIFAR-10 (IS / FID / sFID): full precision "
        "9.18 / 10.05 / 19.71 with DDIM-100, 9.19 / 8.91 / 18.43 with DDIM-250, 9.28 / 7.14 / 17.09 with DDPM-4000; "
        "W8A8 9.31 / 14.18 / 22.59, 9.70 / 11.66 / 19.71, 9.55 / 7.10 / 17.02.",
    )
    return Table("T5", _bits(base), "Samplers", tuple(rows), None, notes)


def _bits(variant: Variant) -> str:
    return f"W{variant.recipe.weights}A{variant.recipe.activations}"
