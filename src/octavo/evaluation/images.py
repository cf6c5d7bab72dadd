"""Images from anywhere, as arrays: an .npz file or a folder, and the form a network wants them in."""

from __future__ import annotations

import re
import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from octavo.errors import OctavoError
from octavo.evaluation.features import check_images

SUFFIXES = (".png", ".jpg", ".jpeg")


def read_images(path: Path) -> NDArray[np.uint8]:
    """Images of an `.npz` file (its `arr_0`, uint8 NHWC or NHW) or of a folder of PNG or JPEG files.

    => uint8 [N, height, width, channels], 1 channel if all are grey, else 3. A folder is read in the natural order
    of its names (2.png before 10.png), not in its subfolders. Raises `OctavoError` for what is absent, damaged, empty,
    of several sizes, or of more than 8 bits.
    """
    path = Path(path)
    images = _read_folder(path) if path.is_dir() else _read_npz(path)
    check_images(images, str(path))
    return images


def to_network(images: NDArray[np.uint8], channels: int, height: int, width: int) -> Tensor:
    """uint8 NHWC => float32 NCHW in [0, 1], with these channels and this size.

    Colours become grey by 0.299 R + 0.587 G + 0.114 B (ITU-R BT.601), grey is repeated for colour; another size is
    reached by averaging areas (each new pixel is the mean of the old ones it covers).

    >>> to_network(np.full((1, 4, 4, 3), 255, dtype=np.uint8), channels=1, height=2, width=2).squeeze()
    tensor([[1., 1.],
            [1., 1.]])
    """
    tensor = torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).float() / 255
    if tensor.shape[1] == 3 and channels == 1:
        tensor = (tensor * torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)).sum(1, keepdim=True)
    elif tensor.shape[1] == 1 and channels == 3:
        tensor = tensor.expand(-1, 3, -1, -1)
    if tensor.shape[-2:] != (height, width):
        tensor = F.interpolate(tensor, size=(height, width), mode="area")
    return tensor.contiguous()


def _read_npz(path: Path) -> NDArray[np.uint8]:
    if not path.exists():
        raise OctavoError(f"{path}: does not exist; give an .npz file or a folder of PNG or JPEG images")
    try:
        with path.open("rb") as file:
            if not zipfile.is_zipfile(file):
                raise OctavoError(f"{path}: is not an .npz file; write it by np.savez(path, images)")
            file.seek(0)
            with np.load(file, allow_pickle=False) as arrays:
                if "arr_0" not in arrays:
                    raise OctavoError(f"{path}: has no array arr_0; write it by np.savez(path, images)")
                images: NDArray[np.uint8] = arrays["arr_0"]
    except OctavoError:
        raise
    except (OSError, ValueError, EOFError, MemoryError, zipfile.BadZipFile, zlib.error) as error:
        raise OctavoError(f"{path}: is not a readable .npz of numbers ({error}); write it again") from error
    return images[..., None] if images.ndim == 3 else images


def _read_folder(folder: Path) -> NDArray[np.uint8]:
    names = [path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES and path.is_file()]
    if not names:
        raise OctavoError(f"{folder}: holds no PNG or JPEG images")
    arrays = [_read_picture(path) for path in sorted(names, key=_natural_order)]
    colour = any(array.shape[-1] == 3 for array in arrays)
    for path, array in zip(sorted(names, key=_natural_order), arrays, strict=True):
        if array.shape[:2] != arrays[0].shape[:2]:
            raise OctavoError(
                f"{path}: is {array.shape[1]}x{array.shape[0]}, unlike the folder's first image"
            )
    if colour:
        arrays = [np.broadcast_to(array, (*array.shape[:2], 3)) for array in arrays]
    return np.stack(arrays)


def _read_picture(path: Path) -> NDArray[np.uint8]:
    try:
        with Image.open(path) as picture:
            if picture.mode not in ("1", "L", "P", "RGB"):
                raise OctavoError(f"{path}: is of mode {picture.mode}; save it as 8-bit grey or RGB")
            converted = picture.convert("L" if picture.mode in ("1", "L") else "RGB")
            array: NDArray[np.uint8] = np.asarray(converted, dtype=np.uint8)
    except OctavoError:
        raise
    except (OSError, ValueError, SyntaxError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise OctavoError(f"{path}: is not a readable image ({error}); write it again") from error
    return array[..., None] if array.ndim == 2 else array


def _natural_order(path: Path) -> list[tuple[int, str]]:
    """Digits by their value, the rest by its letters."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"([0-9]+)", path.name)]
