"""The forms that ONNX Runtime is given: the same functions as torch's, and how exact they are."""

from __future__ import annotations

import pytest
import torch
from diffusers.models.upsampling import Upsample2D
from torch import nn

from octavo.quantization import SubPixelUpsample2D
from octavo.runtimes import onnx_forms
from octavo.runtimes.onnx_forms import fast_forms


@pytest.mark.parametrize(("mean", "error"), [(0.0, 3e-7), (10.0, 2e-5), (100.0, 2e-3)])
@pytest.mark.parametrize("affine", [True, False])
def test_a_group_normalization_loses_digits_where_means_outweigh_spreads(
    mean: float, error: float, affine: bool
) -> None:
    torch.manual_seed(0)
    norm = nn.GroupNorm(4, 32, affine=affine).requires_grad_(False)
    if affine:
        norm.weight.uniform_(0.5, 2), norm.bias.uniform_(-1, 1)
    x = torch.randn(2, 32, 32, 32) + mean
    assert x[0].numel() == onnx_forms.SMALLEST
    exact = norm.double()(x.double())
    norm.float()
    with fast_forms(nn.Sequential(norm)):
        found = norm(x)
    assert not torch.equal(found, norm(x))  # another form
    assert float((found - exact).norm() / exact.norm()) < error


def test_groups_without_any_spread_stay_finite() -> None:
    norm = nn.GroupNorm(2, 32).requires_grad_(False)
    x = torch.full((1, 32, 32, 32), 1000.1)
    with fast_forms(nn.Sequential(norm)):
        assert bool(norm(x).isfinite().all())


def test_small_images_keep_torchs_own() -> None:
    torch.manual_seed(0)
    norm = nn.GroupNorm(4, 32).requires_grad_(False)
    x = torch.randn(2, 32, 31, 33)
    with fast_forms(nn.Sequential(norm)):
        found = norm(x)
    assert torch.equal(found, norm(x))


@pytest.mark.parametrize("size", [None, (14, 18), (13, 17)])
def test_a_sub_pixel_convolution_is_interleaved(size: tuple[int, int] | None) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(SubPixelUpsample2D.of(Upsample2D(6, use_conv=True, out_channels=5)))
    x = torch.randn(2, 6, 7, 9)
    expected = network[0](x, size)
    with fast_forms(network), torch.no_grad():
        torch.testing.assert_close(network[0](x, size), expected)
