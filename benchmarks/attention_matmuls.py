"""What attention's products in int8 cost and gain: fidelity on the bundled model, speed there and on a DiT.

    python benchmarks/attention_matmuls.py          # 32 images, DDIM-20, 64 calibration samples, one thread

Fidelity: PSNR of the same seeds' images to full precision. Speed: one evaluation in real int8 with and without, in turn
in one process. Weights have 7 bits, which every CPU's kernels add up exactly.
"""

from __future__ import annotations

import argparse
import copy
import functools
import tempfile
from pathlib import Path
from typing import Any

import peers
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel

import octavo
from octavo.calibration import collect_pairs, observe, trace
from octavo.diffusion import find_denoiser, first_call, with_denoiser
from octavo.evaluation.generate import Images, generate
from octavo.evaluation.similarity import mean_squared_error, psnr
from octavo.evaluation.speed import format_table, table, take_turns
from octavo.quantization import AttentionSpecs, QuantAttention, QuantSpec, attach_attention

ALL_OF_8 = {"key": QuantSpec(8), "exponentials": QuantSpec(8, symmetric=False)}
VARIANTS = {
    "as built (K, E of 7 bits)": {},
    "K of 8 bits": {"key": ALL_OF_8["key"]},
    "K and E of 8 bits": ALL_OF_8,
    "V of 7 bits, E of 8": {"exponentials": ALL_OF_8["exponentials"], "value": QuantSpec(7)},
    "softmax at 1/255 (8 bits)": {"exponentials": ALL_OF_8["exponentials"]},
}
DIVIDED_FIRST = "softmax at 1/255 (8 bits)"


class DividedFirst(QuantAttention):
    """The usual way: softmax(S), in [0, 1], is rounded itself."""

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **_: Any) -> torch.Tensor:  # type: ignore[override]
        scores = self.qk(query, key.transpose(-2, -1), query.shape[-1] ** -0.5)
        return self.pv(scores.softmax(-1), value)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--num-images", type=int, default=32)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--seed", type=int, default=10_000, help="of the images")
    options = parser.parse_args()
    torch.set_num_threads(1)

    original = octavo.load("digits")
    recipe = octavo.named_recipe("best", weights=7, samples=options.samples, steps=options.steps)
    quantized = both(original, recipe)

    def images(pipeline: Any) -> Images:
        pipeline.set_progress_bar_config(disable=True)
        return generate(pipeline, options.num_images, steps=options.steps, seed=options.seed, progress=False)

    reference = images(original)
    candidates: dict[str, Any] = {
        **{f"attention alone, {name}": pipeline for name, pipeline in alone(original, recipe).items()},
        **{f"{name}, simulation": pipeline for name, pipeline in quantized.items()},
        **{
            f"{name}, real int8": octavo.accelerate(pipeline, precision="f32", threads=1, batch_size=16)
            for name, pipeline in quantized.items()
        },
    }
    fidelity = {}
    for name, pipeline in candidates.items():
        found = images(pipeline)
        decibels = psnr(found, reference)
        fidelity[name] = {
            "psnr": round(float(decibels.mean()), 2),
            "standard_error": round(float(decibels.std(ddof=1) / len(decibels) ** 0.5), 2),
            "mse": float(mean_squared_error(found, reference).mean()),
        }
        print(
            f"{name:<52} {fidelity[name]['psnr']:6.2f} +- {fidelity[name]['standard_error']} dB", flush=True
        )

    speed = {
        f"digits, batch {batch_size}": in_turn(original, quantized, batch_size, options.rounds)
        for batch_size in options.batch_sizes
    }
    quick = octavo.PTQ4DM(weights=7, samples=4, steps=2, metric="minmax")
    labels = {"class_labels": 1, "guidance_scale": 1.0}
    for latent_size in (32, 64):
        transformer = dit(latent_size)
        pair = both(transformer, quick, labels)
        name = f"random DiT, {latent_size**2 // 4} tokens"
        speed[name] = in_turn(transformer, pair, 1, options.rounds, labels)
    for name, rows in speed.items():
        print(f"\n{name}\n{format_table(rows, 'images', 'without')}")
    peers.save("attention_matmuls", {**vars(options), "fidelity": fidelity, "speed": speed})


def both(pipeline: Any, recipe: octavo.PTQ4DM, inputs: Any = None) -> dict[str, Any]:
    return {
        name: octavo.quantize(
            pipeline,
            octavo.PTQ4DM(**{**vars(recipe), "attention_matmuls": with_it}),
            inputs=inputs,
            progress=False,
        )
        for name, with_it in (("without", False), ("with", True))
    }


def in_turn(
    original: Any, quantized: dict[str, Any], batch_size: int, rounds: int, inputs: Any = None
) -> list[dict[str, float | str]]:
    args, kwargs = first_call(original, batch_size=batch_size, inputs=inputs)
    engines = {}
    for name, pipeline in quantized.items():
        fast = octavo.accelerate(pipeline, precision="f32", threads=1, batch_size=batch_size, inputs=inputs)
        rows = octavo.audit(fast)
        label = f"{name} ({sum(row.ok for row in rows)} of {len(rows)} in int8)"
        engines[label] = functools.partial(find_denoiser(fast)[1], *args, **kwargs)
    return table(take_turns(engines, rounds=rounds), next(iter(engines)), per=batch_size)


def alone(original: Any, recipe: octavo.PTQ4DM) -> dict[str, Any]:
    """Full precision but for attention's products, one pipeline a variant, all on the same observations."""
    component, denoiser = find_denoiser(original)
    owners = trace(original).attention
    with tempfile.TemporaryDirectory() as folder:
        pairs = collect_pairs(original, recipe, Path(folder), progress=False)
        seen = observe(denoiser, pairs, attention=owners, progress=False).attention
    pipelines = {}
    for variant, changes in VARIANTS.items():
        specs = AttentionSpecs(**{**vars(AttentionSpecs.of_bits(8)), **changes})
        scales = {
            owner: {
                operand: seen[f"{owner}.{operand}"].qparams(getattr(specs, operand)).scale
                for operand in ("query", "key", "value")
            }
            for owner in owners
        }
        network = copy.deepcopy(denoiser)
        attach_attention(network, dict.fromkeys(owners, specs), scales)
        if variant == DIVIDED_FIRST:
            for module in network.modules():
                if isinstance(module, QuantAttention):
                    module.__class__ = DividedFirst
        pipelines[variant] = with_denoiser(original, component, network)
    return pipelines


def dit(latent_size: int) -> DiTPipeline:
    """A random transformer of DiT-S's width with 4 layers; tokens are patches of 2x2."""
    torch.manual_seed(0)
    transformer = DiTTransformer2DModel(
        num_attention_heads=6,
        attention_head_dim=64,
        in_channels=4,
        out_channels=8,
        num_layers=4,
        sample_size=latent_size,
    )
    vae = AutoencoderKL(block_out_channels=(32,), latent_channels=4, norm_num_groups=8)
    pipeline = DiTPipeline(transformer.eval(), vae.eval(), DDIMScheduler())
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


if __name__ == "__main__":
    main()
