"""The second table of `octavo bench`: whole images, by the pipeline in full precision, in bf16 and in int8."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from diffusers import DiffusionPipeline


def image_rows(
    sampled: dict[str, DiffusionPipeline], inputs: dict[str, Any], batch_size: int, steps: int, rounds: int
) -> list[dict[str, Any]]:
    """The rows of whole images by each pipeline, the first of which is the baseline."""
    from octavo.evaluation.peers.fidelity import fidelity, keeping
    from octavo.evaluation.speed import table, take_turns

    noise = {name: _noise(batch_size) for name in sampled}  # round by round the same for all
    timed, outputs = keeping(
        {
            name: functools.partial(images, pipeline, inputs, batch_size, steps, noise[name])
            for name, pipeline in sampled.items()
        }
    )
    timings = take_turns(timed, rounds=rounds)
    baseline = next(iter(sampled))
    found = fidelity(outputs, baseline, 1.0 if _decodes(sampled[baseline]) else None)
    return [{**row, **found[str(row["engine"])]} for row in table(timings, baseline, per=batch_size)]


def _noise(batch_size: int) -> list[torch.Generator]:
    from octavo.diffusion import generators

    return generators(0, 0, batch_size)


def images(
    pipeline: DiffusionPipeline,
    inputs: dict[str, Any],
    batch_size: int,
    steps: int,
    noise: list[torch.Generator] | None = None,
) -> Any:
    """A batch of images, as a tensor: numpy has no bf16."""
    from octavo.diffusion import call_pipeline

    return call_pipeline(
        pipeline,
        generators=noise or _noise(batch_size),
        num_inference_steps=steps,
        inputs=inputs,
        output_type="pt",
    )


def why_not(run: Callable[[], Any]) -> str | None:
    """Why a peer cannot do what it is asked for, in one line; None where it can. LDMPipeline has f32 latents, say."""
    try:
        run()
    except Exception as error:  # whatever it raises is news about the peer
        lines = str(error).strip().splitlines() or [""]
        return f"{type(error).__name__}: {lines[0][:200]}"
    return None


def _decodes(pipeline: DiffusionPipeline) -> bool:
    """Whether what the pipeline returns are images in [0, 1], and not the latents of an architecture on its own."""
    from octavo.evaluation.peers.architectures import BarePipeline

    return not isinstance(pipeline, BarePipeline)


def bf16_copy(pipeline: DiffusionPipeline) -> DiffusionPipeline:
    import copy

    import torch
    from torch import nn

    other = copy.deepcopy(pipeline)
    for module in other.components.values():
        if isinstance(module, nn.Module):
            nn.Module.to(module, torch.bfloat16)  # diffusers' own refuses a network that was loaded quantized
    return other
