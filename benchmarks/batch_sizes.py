"""How far final images move when only the batch size, or the number of threads, changes.

    python benchmarks/batch_sizes.py            # bundled model, DDIM-50, 64 images

Each engine samples the same seeds at several batch sizes; the images are compared with those of the first.
"""

from __future__ import annotations

import argparse

import numpy as np
import peers
import torch

import octavo
from octavo.evaluation.generate import Images, generate, to_uint8
from octavo.evaluation.similarity import psnr

CAP = 150.0  # dB: what equal images count as in a mean


def engines(original: object, quantized: object, threads: int, batch_size: int) -> dict[str, object]:
    int8 = {
        f"octavo int8, {precision}": octavo.accelerate(
            quantized, precision=precision, threads=threads, batch_size=batch_size
        )
        for precision in peers.precisions()
    }
    return {"torch fp32": original, "torch simulation of int8": quantized, **int8}


def difference(images: Images, first: Images) -> dict[str, float]:
    apart = np.abs(images.astype(np.float64) - first)
    decibels = np.minimum(psnr(images, first), CAP)
    return {
        "largest_pixel": float(apart.max()),
        "mean_pixel": float(apart.mean()),
        "psnr_mean": round(float(decibels.mean()), 2),
        "psnr_worst": round(float(decibels.min()), 2),
        "equal_images": int((apart.reshape(len(apart), -1).max(axis=1) == 0).sum()),
        "changed_8_bit_pixels": float((to_uint8(images) != to_uint8(first)).mean()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--num-images", type=int, default=64)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[16, 1, 4, 32])
    parser.add_argument("--threads", type=int, nargs="+", default=[torch.get_num_threads(), 1])
    parser.add_argument("--seed", type=int, default=10_000, help="of the images")
    options = parser.parse_args()

    original = octavo.load("digits")
    recipe = octavo.PTQ4DM(samples=options.samples, steps=options.steps)
    quantized = octavo.quantize(original, recipe, batch_size=32)
    images: dict[str, dict[str, Images]] = {}
    for threads in options.threads:
        torch.set_num_threads(threads)
        # the other numbers of threads at the first batch size only
        sizes = options.batch_sizes if threads == options.threads[0] else options.batch_sizes[:1]
        for name, pipeline in engines(original, quantized, threads, sizes[0]).items():
            pipeline.set_progress_bar_config(disable=True)
            for size in sizes:
                images.setdefault(name, {})[f"batch {size}, {threads} threads"] = generate(
                    pipeline,
                    options.num_images,
                    steps=options.steps,
                    seed=options.seed,
                    batch_size=size,
                    label=f"{name}, batch {size}, {threads} threads",
                )
    figures: dict[str, dict[str, dict[str, float]]] = {}
    for name, sets in images.items():
        baseline, *others = sets
        print(f"\n{name}, against {baseline}")
        figures[name] = {other: difference(sets[other], sets[baseline]) for other in others}
        for other, found in figures[name].items():
            print(
                f"  {other:<22} largest {found['largest_pixel']:.2e}  mean {found['mean_pixel']:.2e}  "
                f"PSNR {found['psnr_mean']:.1f} (worst {found['psnr_worst']:.1f}) dB  "
                f"8-bit pixels changed {100 * found['changed_8_bit_pixels']:.3f} %"
            )
    peers.save("batch_sizes", {**vars(options), "difference": figures})


if __name__ == "__main__":
    main()
