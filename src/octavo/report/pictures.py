"""Pictures inside the page: image pairs and heat maps as data URIs."""

from __future__ import annotations

import base64
import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from octavo.evaluation.generate import Images, to_uint8
from octavo.evaluation.similarity import psnr
from octavo.report.colours import viridis
from octavo.report.data import ErrorMap, Gallery, ImagePair
from octavo.report.grid import to_picture

MOST_BYTES = 3_800_000
"""Of all images' data URIs together: the page stays below 5 MB."""
LARGEST_SIDE = 256
LEVELS = 64
MOST_DECIBELS = 100.0
"""Equal images would be infinitely close; they count as 100 dB."""


def gallery(images: Images, reference: Images, seed: int, most_bytes: int = MOST_BYTES) -> Gallery:
    """Same-seed pairs, the worst PSNR first, as many as fit in `most_bytes`; both float [N, H, W, C] in [0, 1].

    Where not all fit, the worst third of what is shown is followed by pairs from all of the rest, evenly by rank, so
    that the page does not show the worst alone. Images larger than 256 pixels a side are shown smaller; figures and
    the difference's scale are of the full size.
    """
    decibels = np.minimum(psnr(images, reference), MOST_DECIBELS)
    order = np.argsort(decibels, kind="stable")
    difference = np.abs(images - reference).mean(axis=-1)
    top = max(float(np.quantile(difference, 0.999)), 1 / 255)
    ours, theirs = to_uint8(images), to_uint8(reference)

    def pair(k: int) -> ImagePair:
        return ImagePair(
            seed=seed + int(k),
            psnr=round(float(decibels[k]), 2),
            reference=data_uri(_fitting(to_picture(theirs[k]))),
            quantized=data_uri(_fitting(to_picture(ours[k]))),
            difference=data_uri(_false_colours(difference[k] / top)),
        )

    samples = [pair(order[rank]) for rank in {0, len(order) // 2, len(order) - 1}]
    each = max(len(one.reference) + len(one.quantized) + len(one.difference) for one in samples)
    count = max(1, min(len(order), most_bytes // each))
    height, width = images.shape[1:3]
    return Gallery(
        pairs=[pair(order[rank]) for rank in ranks_shown(len(order), count)],
        num_images=len(order),
        difference_top=top,
        width=width,
        height=height,
        shrunk=max(height, width) > LARGEST_SIDE,
        psnr_values=[round(float(value), 2) for value in decibels],
    )


def ranks_shown(total: int, count: int) -> list[int]:
    """`count` of the ranks 0 .. total-1: the first third without a gap, the others evenly over the rest.

    >>> ranks_shown(4, 4), ranks_shown(100, 6)
    ([0, 1, 2, 3], [0, 1, 2, 34, 67, 99])
    """
    if count >= total:
        return list(range(total))
    head = -(-count // 3)
    return [*range(head), *np.linspace(head, total - 1, count - head).round().astype(int).tolist()]


def _false_colours(values: NDArray[np.float32]) -> Image.Image:
    """Values in [0, 1], cut above, in 64 colours of viridis: a palette, because it takes a third of the bytes."""
    shrunk = np.asarray(_fitting(Image.fromarray(values.astype(np.float32))))
    picture = Image.fromarray((shrunk.clip(0, 1) * (LEVELS - 1)).round().astype(np.uint8)).convert("P")
    picture.putpalette(viridis(np.linspace(0, 1, LEVELS)).tobytes())
    return picture


def heat_map(errors: ErrorMap, low: float, high: float, rows: list[int]) -> str:
    """One pixel for each layer (of `rows`, downwards) and timestep, colours logarithmic from `low` to `high`."""
    values = np.array(
        [[np.nan if e is None else e for e in errors.errors[row]] for row in rows], dtype=np.float64
    )
    return data_uri(_log_picture(values, low, high))


def _log_picture(values: NDArray[np.float64], low: float, high: float) -> Image.Image:
    place = np.log(np.maximum(np.nan_to_num(values, nan=low), low) / low) / np.log(high / low)
    opaque = np.where(np.isfinite(values), 255, 0).astype(np.uint8)
    return Image.fromarray(np.concatenate([viridis(place), opaque[..., None]], axis=-1), "RGBA")


def data_uri(picture: Image.Image) -> str:
    """The picture as a lossless PNG in a `data:` URI; grey ones take a third of the bytes."""
    if picture.mode == "RGB":
        red, green, blue = (np.asarray(band) for band in picture.split())
        if np.array_equal(red, green) and np.array_equal(red, blue):
            picture = picture.convert("L")
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"


def _fitting(picture: Image.Image) -> Image.Image:
    if max(picture.size) > LARGEST_SIDE:
        picture = picture.copy()
        picture.thumbnail((LARGEST_SIDE, LARGEST_SIDE), Image.Resampling.BOX)
    return picture
