"""What `octavo bench` compares: MODEL in int8 and by which recipe, and the full precision that it is held against."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from octavo.cli.shared import load_quietly

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from octavo.calibration import PTQ4DM

IMAGES, STEPS = 8, 4
"""A full-precision MODEL, and its peers, are calibrated on the calls of so many sampler steps of so many images."""
AFFORDABLE = 100e6
"""Parameters up to which GPTQ takes minutes: a larger network does without, where no recipe is asked for."""
BEST = "best"
ROUNDED = "best without gptq and float activations"
OWN = "as it is"


@dataclass(frozen=True)
class Compared:
    """`quantized` by `recipe` ("as it is" of a MODEL that was quantized before), and `reference` in float32.

    `reference_is`: "MODEL", "--reference", or "dequantized": the quantized network's own weights in float, so that
    what rounding the weights costs is in no distance from it.
    """

    quantized: DiffusionPipeline
    reference: DiffusionPipeline
    recipe: str
    reference_is: str

    @property
    def is_best(self) -> bool:
        """Whether the weights were made by `best`, here or, by what the folder says of its recipe, before."""
        return self.recipe == BEST or (self.recipe == OWN and _made_by_best(self.quantized))


def compared(
    model: str, reference: str | None, recipe: str | None, inputs_of: Any, pair_limit: bool = False
) -> Compared:
    """Load MODEL, quantize it if it is not, and find its full precision. `inputs_of`: pipeline -> its inputs.

    Raises `OctavoError` for a `reference` of another model, one of a MODEL in full precision, and a `recipe` or a
    pair limit for a MODEL that is quantized already.
    """
    from octavo.calibration.components import in_float
    from octavo.errors import OctavoError

    pipeline = _pipeline(model)
    if not _is_quantized(pipeline):
        if reference is not None:
            raise OctavoError(f"--reference: {model} is in full precision itself; leave it out")
        network = recipe or (BEST if _parameters(pipeline) <= AFFORDABLE else ROUNDED)
        quantized = quantized_by(network, pipeline, inputs_of(pipeline), pair_limit)
        return Compared(quantized, pipeline, f"{network}, pair limit" if pair_limit else network, "MODEL")
    for option, is_given in (("--recipe", recipe is not None), ("--pair-limit", pair_limit)):
        if is_given:
            raise OctavoError(
                f"{option}: {model} is quantized already; leave it out, or give its full precision as MODEL"
            )
    if reference is None:
        return Compared(pipeline, in_float(pipeline), OWN, "dequantized")
    return Compared(pipeline, _reference(reference, pipeline), OWN, "--reference")


def quantized_by(
    recipe: str, pipeline: DiffusionPipeline, inputs: dict[str, Any], pair_limit: bool = False
) -> DiffusionPipeline:
    """The full-precision pipeline quantized by a recipe's name, on IMAGES images in `few_steps` steps."""
    from octavo.api import quantize
    from octavo.calibration import named_recipe

    steps = few_steps(pipeline)
    few: dict[str, Any] = {"samples": IMAGES * steps, "steps": steps, "pairs_per_trajectory": steps}
    few["pair_limit"] = pair_limit
    made: PTQ4DM = (
        named_recipe(BEST, rounding="nearest", float_activations=0.0, **few)
        if recipe == ROUNDED
        else named_recipe(recipe, **few)
    )
    return quantize(pipeline, made, batch_size=IMAGES, inputs=inputs, progress=False)


def few_steps(pipeline: DiffusionPipeline) -> int:
    """STEPS, or those of the pipeline's trajectory."""
    from octavo.diffusion.trajectories import steps_of

    return steps_of(pipeline, STEPS)


def can_afford_best(chosen: Compared) -> bool:
    """Whether it is worth a second quantization to know what `best` reaches: unknown, and at hand within minutes."""
    return (
        chosen.reference_is == "MODEL"
        and chosen.recipe != BEST
        and _parameters(chosen.reference) <= AFFORDABLE
    )


def _made_by_best(quantized: DiffusionPipeline) -> bool:
    from octavo.checkpoint.quantizer import quantizer_of
    from octavo.diffusion import find_denoiser

    quantizer = quantizer_of(find_denoiser(quantized)[1])
    return quantizer is not None and is_best(quantizer.quantization_config.recipe)


def is_best(made: Mapping[str, Any]) -> bool:
    """Whether a recipe, as `PTQ4DM.to_dict` gives it, is `best`, whatever calls it was calibrated on."""
    from octavo.calibration import named_recipe

    of_calls = {"samples", "steps", "pairs_per_trajectory", "timesteps"}
    best = {key: value for key, value in named_recipe(BEST).to_dict().items() if key not in of_calls}
    return best.items() <= dict(made).items()


def _pipeline(model: str) -> DiffusionPipeline:
    from octavo.evaluation.peers.architectures import ARCHITECTURES, architecture

    return architecture(model) if model in ARCHITECTURES else load_quietly(model)


def _reference(reference: str, quantized: DiffusionPipeline) -> DiffusionPipeline:
    from octavo.diffusion import find_denoiser
    from octavo.diffusion.exchange import exchange_scheduler
    from octavo.errors import OctavoError
    from octavo.fingerprint import model_identity, same_model

    pipeline = _pipeline(reference)
    if _is_quantized(pipeline):
        raise OctavoError(f"--reference: {reference} is quantized itself; give the model in full precision")
    identities = (model_identity(find_denoiser(each)[1]) for each in (pipeline, quantized))
    if not same_model(*identities):
        raise OctavoError(f"--reference: {reference} is another model than the one that was quantized")
    return exchange_scheduler(pipeline, quantized.scheduler)


def _is_quantized(pipeline: DiffusionPipeline) -> bool:
    from octavo.diffusion import find_denoiser
    from octavo.quantization import quantized_layers

    return any(True for _ in quantized_layers(find_denoiser(pipeline)[1]))


def _parameters(pipeline: DiffusionPipeline) -> int:
    from octavo.diffusion import find_denoiser

    return sum(parameter.numel() for parameter in find_denoiser(pipeline)[1].parameters())
