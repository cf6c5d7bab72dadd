"""The inception score: how sure a classifier is of each image, and how many classes it sees in all."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from octavo.evaluation.intervals import Estimate, group_of, jackknife_estimate


def inception_score(logits: Tensor) -> float:
    """IS = exp(mean_i KL(p(y | x_i) || p(y))) of logits [N, C], with p(y) the mean of all p(y | x_i); float64.

    Between 1 and C. All images in one split; many papers average over 10 splits, which comes out lower.
    Source: Salimans et al. 2016 (1606.03498), section 4.

    >>> round(inception_score(100 * torch.eye(10)), 6)  # ten images, each surely of another class
    10.0
    """
    log_each = logits.double().log_softmax(1)
    log_mean = torch.logsumexp(log_each, 0) - np.log(len(logits))
    divergence = (log_each.exp() * (log_each - log_mean)).sum(1).mean()
    return float(divergence.exp())


def inception_score_estimate(logits: Tensor) -> Estimate:
    """`inception_score` with its jackknife interval, logits [N >= 4, C]."""
    groups = torch.from_numpy(group_of(len(logits)))
    without = [inception_score(logits[groups != g]) for g in range(int(groups.max()) + 1)]
    return jackknife_estimate(inception_score(logits), without, low=1, high=logits.shape[1])
