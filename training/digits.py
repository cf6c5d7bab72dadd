"""The training data: scikit-learn's 8x8 digits, upsampled to 16x16, split once and for all."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

IMAGE_SIZE = 16
HELD_OUT = 360
SPLIT_SEED = 0


def load(split: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Images in [-1, 1] (float32, N x 1 x 16 x 16) and labels (int64, N) of `train` or `held_out`.

    The 1,797 images are split 1,437 / 360, stratified by label, with a fixed seed.
    Both networks train on `train` only.
    """
    images, labels = load_digits(return_X_y=True)
    train, held_out = train_test_split(
        np.arange(len(labels)), test_size=HELD_OUT, random_state=SPLIT_SEED, stratify=labels
    )
    rows = {"train": train, "held_out": held_out}[split]
    small = torch.from_numpy(images[rows]).float().view(-1, 1, 8, 8) / 16
    large = F.interpolate(small, size=IMAGE_SIZE, mode="bicubic", align_corners=False)
    return large.clamp(0, 1) * 2 - 1, torch.from_numpy(labels[rows]).long()
