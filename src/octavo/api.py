"""The verbs of the public interface that join rooms: quantize a pipeline so that it can be saved."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from octavo.calibration import PTQ4DM, calibrate, named_recipe
from octavo.checkpoint import prepare_to_save

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


def quantize(
    pipeline: DiffusionPipeline,
    recipe: PTQ4DM | str = "best",
    *,
    seed: int = 0,
    batch_size: int = 16,
    inputs: Mapping[str, Any] | None = None,
    workdir: str | os.PathLike[str] | None = None,
    components: Sequence[str] | None = None,
    progress: bool = True,
) -> DiffusionPipeline:
    """A pipeline of the same class whose denoiser (and what else `components` names) is quantized by `recipe`.

    The original is left untouched. The result runs anywhere torch does, as a float simulation that computes what
    the integer engine computes; `octavo.accelerate` makes it run in int8. `save_pretrained` writes an ordinary
    diffusers folder, which plain `from_pretrained` loads after `import octavo`.

    recipe      a `PTQ4DM`, or a name: "ptq4dm" (the paper's calibration; mu, Sigma and x_{t-1} stay float unless asked
                for, and 4 pairs are taken of a run where the paper takes 1), "best" (GPTQ rounding, balanced channels,
                sub-pixel convolutions, float activations where 8 bits err most), "w4a8" (4-bit weights, GPTQ rounding,
                balanced channels, sub-pixel convolutions); `octavo.named_recipe` changes single fields.
    seed        of the calibration: its image k starts from the noise of seed + k + 2^31, which is that of no image
                sampled from a seed below, so that nothing is judged by what it was calibrated on.
    batch_size  images denoised together while calibrating.
    inputs      what the pipeline's call needs besides (prompts, class labels), one for each image or one for all.
    workdir     where work in progress is kept (default: Octavo's cache). Killed and called again with the same
                arguments on as many threads, `quantize` goes on from the last finished batch and ends with the same
                bits. On another number of threads (`torch.get_num_threads()`) some ranges end in other last bits.
    components  what is quantized, as ("unet", "vae"): the denoiser, and the VAE's decoder, calibrated on the latents
                that the calibration's own images end in. Default: the denoiser alone. Layer patterns of the recipe
                that begin with "vae." are the VAE's. Encoders, of pictures and of text, stay in float.

    Raises `OctavoError` for a recipe that does not fit the model, inputs that do not fit the pipeline, a component that
    cannot be quantized, or a scheduler with optimal variances (`octavo.diffusion.analytic`), which are of the network
    before: quantize first.
    Source: PTQ4DM (arXiv 2211.15736), Algorithm 1.

    >>> import octavo
    >>> quantized = octavo.quantize(octavo.load("digits"), octavo.PTQ4DM(samples=2, steps=2), progress=False)
    >>> type(quantized).__name__, len(octavo.audit(quantized)) > 0
    ('DDIMPipeline', True)
    """
    calibrated = calibrate(
        pipeline,
        named_recipe(recipe) if isinstance(recipe, str) else recipe,
        seed=seed,
        batch_size=batch_size,
        inputs=inputs,
        workdir=workdir,
        components=components,
        progress=progress,
    )
    return prepare_to_save(calibrated)
