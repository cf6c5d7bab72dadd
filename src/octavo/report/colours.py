"""False colours that everybody can tell apart: viridis, which grows evenly lighter, also in print."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

ANCHORS = ("440154", "472d7b", "3b528b", "2c728e", "21918c", "28ae80", "5ec962", "addc30", "fde725")
"""Nine colours of viridis (Smith and van der Walt, CC0), evenly spaced; between them it is linear enough."""


def viridis(values: NDArray[np.float64]) -> NDArray[np.uint8]:
    """Numbers in [0, 1], any shape => uint8 [..., 3]; what lies beyond takes the colour of the end, NaN of 0.

    >>> viridis(np.array([0.0, 1.0])).tolist()
    [[68, 1, 84], [253, 231, 37]]
    """
    table = np.array(
        [[int(colour[i : i + 2], 16) for i in (0, 2, 4)] for colour in ANCHORS], dtype=np.float64
    )
    places = np.linspace(0, 1, len(table))
    clean = np.nan_to_num(values, nan=0.0)
    return (
        np.stack([np.interp(clean, places, table[:, c]) for c in range(3)], axis=-1).round().astype(np.uint8)
    )


def gradient() -> str:
    """The same colours as a CSS gradient, from left to right."""
    return f"linear-gradient(to right, {', '.join(f'#{colour}' for colour in ANCHORS)})"
