"""Options by which a command changes a recipe: their types and what `--help` says of them, one for each field."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from octavo.cli.shared import check_given_json

Recipe = Annotated[
    str,
    typer.Option(
        help="ptq4dm (the paper's calibration; its own setting adds --pairs-per-trajectory 1 --network-output "
        "--sampled-image), best (GPTQ rounding, balanced channels, sub-pixel convolutions, float "
        "activations in the layers that read only the timestep and in those that err most), w4a8 (4-bit "
        "weights, GPTQ rounding, balanced channels, sub-pixel convolutions); the options below change it."
    ),
]
Weights = Annotated[int | None, typer.Option(help="Bits of the weights, 2 to 8 (default: the recipe's).")]
GroupSize = Annotated[
    int | None,
    typer.Option(
        help="A scale for each so many consecutive weights of an output channel, where they have at most 4 bits "
        "(default: one scale per output channel)."
    ),
]
Activations = Annotated[int, typer.Option(help="Bits of the activations, 2 to 8.")]
Symmetric = Annotated[bool, typer.Option(help="Symmetric s8 activations instead of u8 with a zero point.")]
Timesteps = Annotated[
    str, typer.Option(help="Which steps to look at: ndtc, uniform, single, skew_normal, as_published.")
]
Mean = Annotated[float | None, typer.Option(help="ndtc: mean as a fraction of the steps (default 0.4).")]
Std = Annotated[
    str | None,
    typer.Option(help="ndtc: standard deviation as a fraction of the steps, or 'sqrt' (default 0.5)."),
]
At = Annotated[
    float | None, typer.Option(help="single: the step as a fraction of the steps left (default 0.5).")
]
Samples = Annotated[int, typer.Option(help="Calibration pairs, at most 1024.")]
Steps = Annotated[
    int | None,
    typer.Option(min=1, help="Sampler steps while calibrating (default: 100, or the trajectory's)."),
]
PairsPerTrajectory = Annotated[int, typer.Option(help="Pairs caught along one denoising run (the paper: 1).")]
Metric = Annotated[str, typer.Option(help="What a range minimises: mse (L_2.4), l1, cosine, kl, or minmax.")]
Rounding = Annotated[
    str | None,
    typer.Option(help="nearest, or gptq: by what each layer reads (default: the recipe's)."),
]
Balance = Annotated[
    bool | None,
    typer.Option(help="Balance input channels against weights where a layer gains (default: the recipe's)."),
]
Absorb = Annotated[
    bool | None,
    typer.Option(
        help="Let the normalization or layer in front make balancing's multiplication where it can (default: the "
        "recipe's)."
    ),
]
SubPixel = Annotated[
    bool | None,
    typer.Option(
        help="Convolutions behind an upsampling read the small image: the same in 4/9 of the multiply-adds, with "
        "16/9 of their weights (default: the recipe's)."
    ),
]
PairLimit = Annotated[
    bool | None,
    typer.Option(
        help="Keep neighbouring 8-bit weights within what CPUs without VNNI add exactly: one kernel a layer there "
        "instead of two (default: the recipe's)."
    ),
]
FloatActivations = Annotated[
    float | None,
    typer.Option(
        metavar="SHARE",
        help="Leave the activations of the layers that err most in float, up to this share of the quantized "
        "layers' multiply-adds (0.1 is a tenth, 0 none), until int8 errs less than bf16 would (default: the "
        "recipe's).",
    ),
]
TimestepGroups = Annotated[
    int | None,
    typer.Option(
        help="At most so many groups of timesteps, with an activation scale each where a layer gains by it "
        "(default: the recipe's, 1)."
    ),
]
BiasCorrection = Annotated[
    bool | None,
    typer.Option(help="Take each layer's mean output error out of its bias (default: the recipe's)."),
]
OutputCorrection = Annotated[
    bool | None,
    typer.Option(
        help="Correct the network's output, timestep by timestep, by its error while calibrating (default: the "
        "recipe's)."
    ),
]
AttentionMatmuls = Annotated[
    bool | None,
    typer.Option(
        help="Attention's two products, Q K^T and P V, in integers too; slower than float on CPUs without VNNI "
        "(default: the recipe's)."
    ),
]
Exclude = Annotated[
    list[str] | None,
    typer.Option(
        metavar="PATTERN",
        help="Leave the layers of this name in float, e.g. 'mid_block.*'; may be repeated. Wins over --include.",
    ),
]
Include = Annotated[
    list[str] | None,
    typer.Option(
        metavar="PATTERN",
        help="Quantize the layers of this name alone, e.g. '*.attentions.*'; may be repeated (default: all).",
    ),
]
BitsFile = Annotated[
    Path | None,
    typer.Option(
        help="Bits for each layer, as `octavo sensitivity --budget` writes them; they win over --weights.",
        callback=check_given_json,
    ),
]
FirstAndLast = Annotated[
    str, typer.Option(help="'float' or 'quantized': the layers that read the image and write the output.")
]
TimeEmbedding = Annotated[
    str | None,
    typer.Option(
        help="'float', 'weights' (in integers, with float activations) or 'quantized': the layers that read "
        "nothing but the timestep (default: the recipe's)."
    ),
]
NetworkOutput = Annotated[bool, typer.Option(help="Quantize the network's output too.")]
LearnedVariance = Annotated[bool, typer.Option(help="Quantize the learned variance too.")]
SampledImage = Annotated[bool, typer.Option(help="Quantize x_{t-1} too, as the network reads it.")]
