"""How far the int8 engine is from the torch simulation, one evaluation at a time, and why.

    python benchmarks/parity.py

On inputs that a DDIM-50 sampler really hands to the bundled network: relative L2 difference of engine and
simulation; the same for the simulation against itself with its input scaled by 1 + 1e-6 (what float rounding alone
can do); the quantization error; the share of images in which nothing flipped; the mean difference in standard errors.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import peers
import torch

import octavo
from octavo.calibration import collect_pairs
from octavo.diffusion import Single, collate

STEPS = 50


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--num-images", type=int, default=64)
    parser.add_argument("--samples", type=int, default=256)
    options = parser.parse_args()
    original = octavo.load("digits")
    quantized = octavo.quantize(original, octavo.PTQ4DM(samples=options.samples, steps=STEPS), progress=False)
    fast = {
        p: octavo.accelerate(quantized, precision=p, batch_size=options.num_images)
        for p in peers.precisions()
    }
    rows = []
    for fraction in (1.0, 0.8, 0.6, 0.4, 0.2, 0.1, 0.0):
        recipe = octavo.PTQ4DM(
            samples=options.num_images, steps=STEPS, timesteps=Single(at=fraction), pairs_per_trajectory=1
        )
        with tempfile.TemporaryDirectory() as folder:
            store = collect_pairs(
                original, recipe, Path(folder), seed=777, batch_size=options.num_images, progress=False
            )
            inputs = collate(store.load(0))
        with torch.inference_mode():
            float_output = original.unet(**inputs).sample
            simulated = quantized.unet(**inputs).sample
            perturbed = quantized.unet(**{**inputs, "sample": inputs["sample"] * (1 + 1e-6)}).sample
            executed = {p: pipeline.unet(**inputs).sample for p, pipeline in fast.items()}
        difference = (executed["f32"] - simulated).double()
        per_image = difference.flatten(1).norm(dim=1) / simulated.flatten(1).norm(dim=1)
        means = difference.flatten(1).mean(dim=1)
        row = {
            "timestep": int(inputs["timestep"][0]),
            **{f"engine_{p}_to_simulation": relative(output, simulated) for p, output in executed.items()},
            "perturbed_simulation_to_simulation": relative(perturbed, simulated),
            "quantization_error": relative(simulated, float_output),
            "images_without_a_flip": float((per_image < 1e-5).double().mean()),
            "mean_in_standard_errors": float(means.mean() / (means.std() / len(means) ** 0.5)),
        }
        rows.append(row)
        print("  ".join(f"{k} {v:.3g}" for k, v in row.items()), flush=True)
    peers.save("parity", {"num_images": options.num_images, "rows": rows})


if __name__ == "__main__":
    main()
