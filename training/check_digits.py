"""Are the bundled model's images digits? Asks the bundled classifier, and compares features with real digits.

    python training/check_digits.py

Writes training/digits_quality.json: how sure the classifier is of each image, how the classes are spread, and the
Frechet distance of the features to both splits, with that between the two splits of real digits beside it.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch

import octavo
from octavo.evaluation.digits import FeatureStatistics, load_digit_classifier, reference_statistics
from octavo.evaluation.generate import generate


def frechet_distance(a: FeatureStatistics, b: FeatureStatistics) -> float:
    """|m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)); the root's trace from the product's eigenvalues."""
    eigenvalues = torch.linalg.eigvals(a.covariance @ b.covariance)
    root_trace = eigenvalues.real.clamp(min=0).sqrt().sum()
    shift = (a.mean - b.mean).square().sum()
    return float(shift + a.covariance.trace() + b.covariance.trace() - 2 * root_trace)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="digits")
    parser.add_argument("--num-images", type=int, default=512)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent / "digits_quality.json")
    options = parser.parse_args()
    pipeline = octavo.accelerate(octavo.load(options.model), precision="f32", batch_size=32)
    images = generate(pipeline, options.num_images, steps=options.steps, batch_size=32)
    with torch.inference_mode():
        features, logits = load_digit_classifier()(torch.from_numpy(images).permute(0, 3, 1, 2) * 2 - 1)
    confidence, label = logits.softmax(dim=1).max(dim=1)
    generated = FeatureStatistics.of(features)
    real = reference_statistics()
    quality = {
        "command": f"python training/check_digits.py --num-images {options.num_images} --steps {options.steps}",
        "share_with_confidence_above_0.9": round(float((confidence > 0.9).double().mean()), 4),
        "mean_confidence": round(float(confidence.mean()), 4),
        "images_per_class": np.bincount(label.numpy(), minlength=10).tolist(),
        "frechet_distance": {
            "generated_to_train": round(frechet_distance(generated, real["train"]), 3),
            "generated_to_held_out": round(frechet_distance(generated, real["held_out"]), 3),
            "train_to_held_out": round(frechet_distance(real["train"], real["held_out"]), 3),
        },
    }
    options.out.write_text(json.dumps(quality, indent=2) + "\n")
    print(json.dumps(quality, indent=2))


if __name__ == "__main__":
    main()
