"""The kernels' integers against torch's, bit for bit; in Triton's interpreter unless TRITON_INTERPRET=0."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from octavo.quantization import QParams, QuantSpec
from octavo.quantization.affine import round_to_grid

pytest.importorskip("triton", reason="triton is not installed (pip install octavo[cuda])")

from octavo.runtimes.cuda import launch
from octavo.runtimes.cuda.tiles import Tile

TILES = (Tile(16, 16, 32), Tile(16, 16, 32, split=3, abreast=2), Tile(64, 32, 64, split=2, abreast=1))
DEVICE = "cpu" if launch.interpreted() else "cuda"


def int8(*shape: int, low: int = -128, high: int = 127) -> torch.Tensor:
    return torch.randint(low, high + 1, shape, dtype=torch.int8, generator=generator()).to(DEVICE)


def floats(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=generator()).to(DEVICE)


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize(
    "spec, zero_point", [(QuantSpec(8, False), 77), (QuantSpec(8), 0), (QuantSpec(4, False), 5)]
)
@pytest.mark.parametrize("balanced", [False, True])
@pytest.mark.parametrize("by_timestep", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_activations_round_as_the_simulation_rounds(
    spec: QuantSpec, zero_point: int, balanced: bool, by_timestep: bool, dtype: torch.dtype
) -> None:
    """In either layout; ties, both ends and infinity included."""
    scale, moved = torch.tensor(0.03125), 0 if spec.symmetric else launch.MOVED
    x = 3 * floats(3, 7, 50)
    x[0, 0, :8] = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5, 1e30, -1e30, torch.inf]) * scale
    x = x.to(dtype)
    multiplier = 0.5 + floats(50).abs() if balanced else None
    factor = 0.5 + floats(3).abs() if by_timestep else None
    shown = x.float()
    if factor is not None:
        shown = shown * (factor[:, None, None] * (1 if multiplier is None else multiplier))
    elif multiplier is not None:
        shown = shown * multiplier
    qparams = QParams(scale, torch.tensor(zero_point, dtype=torch.int32))
    expected = round_to_grid(shown.cpu(), qparams, spec) - moved
    ends = zero_point - moved, spec.qmin - moved, spec.qmax - moved
    for laid_out in (x, x.transpose(1, 2).contiguous().transpose(1, 2)):
        q = launch.quantize(laid_out[:, None, None], float(scale.reciprocal()), *ends, multiplier, factor)
        assert q.is_contiguous() and torch.equal(q.cpu().float()[:, 0, 0], expected)


def test_the_border_is_the_zero_point() -> None:
    x = floats(2, 3, 4, 5, 20).transpose(1, 3)
    q = launch.quantize(x, 30.0, -19, -128, 127, None, None, (1, 0, 2), (0, 3, 1))
    inner = launch.quantize(x, 30.0, -19, -128, 127)
    assert torch.equal(q, F.pad(inner, (0, 0, 2, 1, 0, 3, 1, 0), value=-19))


@pytest.mark.parametrize(
    "images, positions, depth, columns", [(2, 65, 70, 40), (1, 1, 1, 1), (3, 1, 64, 130)]
)
def test_products_of_matrices_are_exact(images: int, positions: int, depth: int, columns: int) -> None:
    q, w = int8(images, positions, depth), int8(columns, depth)
    offset = torch.arange(columns, dtype=torch.int32, device=DEVICE) * 100_003
    for tile in (None, *TILES):
        ones = torch.ones(columns, device=DEVICE)
        y = launch.matmul(q, w, offset, ones, None, None, torch.int32, tile=tile)
        assert torch.equal(y.cpu().long(), q.cpu().long() @ w.cpu().long().T + offset.cpu())


def test_the_longest_sum_of_the_largest_numbers_fits() -> None:
    q, ones = int8(1, 1, launch.MOST_DEPTH, high=-128), torch.ones(1, device=DEVICE)
    for weight, offset in ((-128, None), (127, 128 * 127 * launch.MOST_DEPTH)):
        w = int8(1, launch.MOST_DEPTH, low=weight, high=weight)
        added = None if offset is None else torch.tensor([offset], dtype=torch.int32, device=DEVICE)
        y = launch.matmul(q, w, added, ones, None, None, torch.int32)
        assert y.item() == -128 * weight * launch.MOST_DEPTH + (offset or 0)


@pytest.mark.parametrize(
    "size, channels, columns, kernel, stride, padding, dilation, groups",
    [
        ((1, 6, 5), 20, 24, (1, 3, 3), (1, 1, 1), (0, 1, 1), (1, 1, 1), 1),
        ((1, 7, 8), 70, 3, (1, 3, 3), (1, 2, 2), (0, 1, 1), (1, 1, 1), 1),
        ((1, 9, 9), 8, 8, (1, 3, 2), (1, 1, 2), (0, 2, 0), (1, 2, 3), 4),
        ((4, 5, 3), 6, 5, (3, 2, 1), (2, 1, 1), (1, 1, 1), (1, 2, 1), 1),
    ],
)
def test_convolutions_are_exact(
    size: tuple[int, ...],
    channels: int,
    columns: int,
    kernel: tuple[int, ...],
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
    groups: int,
) -> None:
    """Around the image lies the zero point."""
    q, w = int8(2, *size, channels), int8(columns, *kernel, channels // groups)
    around = [side for width in reversed(padding) for side in (width, width)]
    q = F.pad(q, (0, 0, *around), value=-19)
    expected = F.conv3d(
        q.cpu().double().movedim(-1, 1), w.cpu().double().movedim(-1, 1), None, stride, 0, dilation, groups
    ).movedim(1, -1)
    ones = torch.ones(columns, device=DEVICE)
    for tile in (None, *TILES):
        y = launch.convolution(q, w, None, ones, None, None, torch.int32, stride, dilation, groups, tile=tile)
        assert torch.equal(y.cpu().long(), expected.long())


def test_what_follows_the_sums_is_rounded_like_the_simulation() -> None:
    q, w = int8(2, 3, 20), int8(5, 20)
    scale, bias, factor = floats(5), floats(5), floats(2)
    y = launch.matmul(q, w, None, scale, bias, factor, torch.float32)
    sums = (q.cpu().long() @ w.cpu().long().T).float()
    assert torch.equal(y.cpu(), sums * scale.cpu() * factor.cpu()[:, None, None] + bias.cpu())
    in_parts = launch.matmul(q, w, None, scale, bias, factor, torch.float32, tile=TILES[1])
    assert torch.equal(in_parts, y)


def test_nothing_is_launched_for_nothing() -> None:
    y = launch.matmul(int8(2, 0, 8), int8(4, 8), None, torch.ones(4), None, None, torch.float32)
    assert y.shape == (2, 0, 4)


def test_multiplications_are_watched() -> None:
    seen: list[tuple[str, str, torch.dtype, torch.dtype]] = []
    q, w, ones = int8(1, 1, 4), int8(2, 4), torch.ones(2, device=DEVICE)
    with launch.watched(lambda *told: seen.append(told)):
        launch.matmul(q, w, None, ones, None, None, torch.float32, "mid.proj")
    launch.matmul(q, w, None, ones, None, None, torch.float32, "mid.proj")
    assert [(layer, name.split()[0], *dtypes) for layer, name, *dtypes in seen] == [
        ("mid.proj", "int8_matmul", torch.int8, torch.int8)
    ]
