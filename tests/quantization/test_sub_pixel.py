"""Upsampling and its convolution as one convolution of the small image."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers.models.upsampling import Upsample2D
from torch import nn

from octavo.errors import OctavoError
from octavo.quantization import SubPixelUpsample2D, make_sub_pixel, sub_pixel_layers, walk, with_sub_pixel


def upsample(**kwargs: Any) -> Upsample2D:
    torch.manual_seed(0)
    return Upsample2D(**{"channels": 6, "use_conv": True, "out_channels": 5, **kwargs})


@pytest.mark.parametrize("size", [None, (14, 18), (13, 18), (14, 17), (13, 17)])
@pytest.mark.parametrize("name", ["conv", "Conv2d_0"])
@pytest.mark.parametrize("bias", [True, False])
def test_the_result_is_that_of_upsampling_and_convolving(
    size: tuple[int, int] | None, name: str, bias: bool
) -> None:
    plain = upsample(name=name, bias=bias)
    x = torch.randn(2, 6, 7, 9)
    expected = plain(x, size)
    assert (SubPixelUpsample2D.of(plain)(x, size) - expected).abs().max() < 1e-6 < expected.abs().max()


@pytest.mark.parametrize("size", [(1, 1), (2, 1), (1, 2), (2, 2)])
def test_a_single_pixel(size: tuple[int, int]) -> None:
    plain, x = upsample(), torch.randn(3, 6, 1, 1)
    torch.testing.assert_close(SubPixelUpsample2D.of(plain)(x, size), plain(x, size), atol=1e-6, rtol=0)


def test_odd_sizes_whatever_the_places_biases_are() -> None:
    """Bias correction gives each place of the block a bias of its own."""
    new = SubPixelUpsample2D.of(upsample())
    x = torch.randn(2, 6, 4, 5)
    whole, odd = new(x), new(x, (7, 9))
    moved = torch.randn(20)
    with torch.no_grad():
        new.conv.bias += moved  # type: ignore[union-attr,operator]
    by_place = moved.view(2, 2, 5).permute(2, 0, 1).repeat(1, 4, 5)
    torch.testing.assert_close(new(x), whole + by_place)
    torch.testing.assert_close(new(x, (7, 9)), odd + by_place[:, :7, :9])


def test_odd_sizes_of_an_offloaded_layer() -> None:
    """Accelerate's offloading gives a layer its tensors only while it runs."""
    from accelerate import cpu_offload

    plain = upsample()
    new, x = SubPixelUpsample2D.of(plain), torch.randn(2, 6, 4, 5)
    cpu_offload(new, execution_device=torch.device("cpu"), offload_buffers=True)
    torch.testing.assert_close(new(x, (7, 9)), plain(x, (7, 9)), atol=1e-6, rtol=0)


def test_another_size_is_refused() -> None:
    with pytest.raises(OctavoError, match=r"^output_size: \(21, 27\) is not twice \(7, 9\), nor one less"):
        SubPixelUpsample2D.of(upsample())(torch.randn(1, 6, 7, 9), (21, 27))


@pytest.mark.parametrize(
    "other",
    [
        upsample(use_conv=False, out_channels=None),
        upsample(use_conv=False, use_conv_transpose=True),
        upsample(kernel_size=1, padding=0),
        upsample(interpolate=False),
        upsample(norm_type="ln_norm", eps=1e-5, elementwise_affine=True),
        nn.Upsample(scale_factor=2),
    ],
)
def test_others_are_left_alone(other: Any) -> None:
    assert sub_pixel_layers(nn.Sequential(other)) == []
    with pytest.raises(TypeError, match="is no nearest-neighbour upsampling with a 3 x 3 convolution"):
        SubPixelUpsample2D.of(other)


def test_with_hooks_or_a_forward_of_its_own_it_is_left_alone() -> None:
    hooked, patched = upsample(), upsample()
    hooked.register_forward_hook(lambda module, args, output: output * 2)
    patched.forward = lambda *args: args[0]  # type: ignore[method-assign,assignment]
    assert sub_pixel_layers(nn.Sequential(hooked, patched, upsample())) == ["2.conv"]


def test_the_copy_shares_what_is_not_changed() -> None:
    network = nn.Sequential(nn.Conv2d(3, 6, 1), upsample(), nn.Conv2d(5, 3, 1))
    names = sub_pixel_layers(network)
    other = with_sub_pixel(network, names)
    assert names == ["1.conv"] and sub_pixel_layers(other) == [] and sub_pixel_layers(network) == names
    assert [name for name, _ in walk(other)] == [name for name, _ in walk(network)] == ["0", "1.conv", "2"]
    assert other[0].weight is network[0].weight and other[0] is not network[0]
    x = torch.randn(2, 3, 4, 4)
    torch.testing.assert_close(other(x), network(x), atol=1e-6, rtol=0)
    assert other[1].conv.weight.shape == (20, 6, 2, 2)


def test_kernels_are_sums_in_float32() -> None:
    """A network in bfloat16: weights are added before they are rounded again."""
    plain = upsample().to(torch.bfloat16)
    kernels = SubPixelUpsample2D.of(plain).conv.weight
    assert kernels.dtype == torch.bfloat16
    w = plain.conv.weight.float()
    in_bf16 = plain.conv.weight[:, :, 1:, 1:].flatten(2)
    rounded_often = in_bf16[..., 0] + in_bf16[..., 1] + in_bf16[..., 2] + in_bf16[..., 3]
    assert torch.equal(kernels[:5, :, 1, 1], w[:, :, 1:, 1:].sum((2, 3)).to(torch.bfloat16))
    assert not torch.equal(kernels[:5, :, 1, 1], rounded_often)
    assert torch.equal(kernels[:5, :, 0, 0], plain.conv.weight[:, :, 0, 0])
    assert torch.equal(kernels[15:, :, 1, 1], plain.conv.weight[:, :, 2, 2])


def test_in_place_and_on_the_meta_device() -> None:
    network = nn.Sequential(upsample()).to("meta")
    make_sub_pixel(network, "0.conv")
    assert network[0].conv.weight.shape == (20, 6, 2, 2) and network[0].conv.weight.is_meta
    for wrong, error in (("0.conv", TypeError), ("1.conv", AttributeError)):
        with pytest.raises(error):
            make_sub_pixel(network, wrong)
    with pytest.raises(TypeError, match=r"^0.weight is no convolution behind an upsampling"):
        make_sub_pixel(nn.Sequential(upsample()), "0.weight")
