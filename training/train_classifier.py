"""Train the bundled digit classifier and measure its reference statistics.

One command, one seed: `make train-digits` (after the diffusion model). It writes

    OUT/classifier.safetensors             weights, float32
    OUT/classifier.json                    held-out accuracy, seed, command, versions
    OUT/reference_statistics.safetensors   mean, covariance (float64), count of either split's features
    training/classifier_loss.csv           epoch, seconds, learning rate, loss, held-out accuracy

The held-out accuracy is recorded, never used: no epoch is chosen by it.
"""

from __future__ import annotations

import argparse
import csv
import time
from pathlib import Path

import digits
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from octavo.evaluation.digits import SPLITS, DigitClassifier, FeatureStatistics
from octavo.files import write_json

HERE = Path(__file__).resolve().parent
BUNDLED = HERE.parent / "src" / "octavo" / "data" / "digits_classifier"


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Rotate by up to 12 degrees, scale by up to 12 %, shift by up to 1.5 of 16 pixels, one draw an image."""
    angle, width, height, right, down = torch.rand(5, len(images), generator=generator) * 2 - 1
    angle, width, height = torch.deg2rad(12 * angle), 1 + 0.12 * width, 1 + 0.12 * height
    shift = 1.5 * 2 / images.shape[-1]
    rows = [
        torch.stack([width * angle.cos(), -height * angle.sin(), shift * right], 1),
        torch.stack([width * angle.sin(), height * angle.cos(), shift * down], 1),
    ]
    grid = F.affine_grid(torch.stack(rows, 1), list(images.shape), align_corners=False)
    # grid_sample fills with 0, and the background is -1.
    return F.grid_sample(images + 1, grid, align_corners=False) - 1


@torch.no_grad()
def accuracy(classifier: DigitClassifier, images: Tensor, labels: Tensor) -> float:
    classifier.eval()
    return (classifier(images)[1].argmax(1) == labels).double().mean().item()


def save_statistics(classifier: DigitClassifier, path: Path) -> None:
    stored = {}
    for split in SPLITS:
        with torch.no_grad():
            statistics = FeatureStatistics.of(classifier(digits.load(split)[0])[0])
        stored[f"{split}.mean"] = statistics.mean
        stored[f"{split}.covariance"] = statistics.covariance
        stored[f"{split}.count"] = torch.tensor(statistics.count)
    save_file(stored, path)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=BUNDLED)
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--loss-curve", type=Path, default=HERE / "classifier_loss.csv")
    args = parser.parse_args()

    torch.set_num_threads(1)  # the same sums on any number of cores, and no waiting on a busy machine
    torch.manual_seed(args.seed)  # initial weights and dropout
    generator = torch.Generator().manual_seed(args.seed)
    images, labels = digits.load("train")
    held_out = digits.load("held_out")
    classifier = DigitClassifier()
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=args.learning_rate, weight_decay=1e-2)
    batches = len(images) // args.batch_size
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, args.learning_rate, total_steps=args.epochs * batches, pct_start=0.1
    )

    start = time.perf_counter()
    with open(args.loss_curve, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["epoch", "seconds", "learning_rate", "loss", "held_out_accuracy"])
        for epoch in tqdm(range(args.epochs), unit="epoch"):
            classifier.train()
            total = 0.0
            order = torch.randperm(len(images), generator=generator)[: batches * args.batch_size]
            for rows in order.split(args.batch_size):
                _, logits = classifier(augment(images[rows], generator))
                loss = F.cross_entropy(logits, labels[rows], label_smoothing=0.05)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                total += loss.item()
            writer.writerow(
                [
                    epoch + 1,
                    f"{time.perf_counter() - start:.1f}",
                    f"{schedule.get_last_lr()[0]:.3g}",
                    f"{total / batches:.5f}",
                    f"{accuracy(classifier, *held_out):.4f}",
                ]
            )
            file.flush()

    classifier.eval()
    args.out.mkdir(parents=True, exist_ok=True)
    save_file(classifier.state_dict(), args.out / "classifier.safetensors")
    save_statistics(classifier, args.out / "reference_statistics.safetensors")
    record = {
        "command": f"python training/train_classifier.py --epochs {args.epochs} "
        f"--batch-size {args.batch_size} --learning-rate {args.learning_rate:g} --seed {args.seed}",
        "seed": args.seed,
        "held_out_accuracy": accuracy(classifier, *held_out),
        "held_out_images": len(held_out[1]),
        "train_accuracy": accuracy(classifier, images, labels),
        "train_images": len(labels),
        "torch": torch.__version__,
    }
    write_json(args.out / "classifier.json", record)
    print(f"{args.out}: {record['held_out_accuracy']:.4f} held out, {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
