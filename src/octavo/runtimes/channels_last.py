"""Normalization and attention over pixels, written so that an engine keeps channels last from end to end.

Integer convolutions read and write channels last (NHWC in memory). OpenVINO's group normalization wants channels first,
and so does the view of an image as a row of pixels that self-attention takes: each costs a pass over the tensor to turn
it around, and another to turn it back. While a network is traced, both are written otherwise here; the results are
those of float32 arithmetic in another order.

GroupNorm (Wu & He 1803.08494, eq. 1-3), of channel c in group g of C / G channels, over the pixels p of one image:

    m[c] = mean_p x[p, c],   h[c] = m[c] in 8 significant bits,   d[p, c] = x[p, c] - h[c]
    o[c] = h[c] - mean_{c in g} m[c],   e[c] = m[c] - h[c]
    v[g] = mean_{c in g} (mean_p d[p, c]^2 + o[c] (2 e[c] + o[c]))
    y[p, c] = d[p, c] a[c] + b[c],   a[c] = gamma[c] / sqrt(v[g] + eps),   b[c] = beta[c] + o[c] a[c]

m and mean_p d^2 are sums over pixels, which engines take in any layout, and y is fused with the activation and the
quantizer behind it. Taking the channel's mean off before squares are summed loses no digits where a mean is large
against the spread; h is exact in bf16, so that a bf16 graph takes off the very number that b puts back. What has one
number for a channel is `statistics_nodes`, to be kept in f32: in bf16 the variance and the mean would be rounded for a
whole channel at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from octavo.runtimes.edges import layer_of
from octavo.runtimes.network import computing_by

if TYPE_CHECKING:
    import openvino

EIGHT_BITS = 65537.0
"""2^16 + 1: x (2^16 + 1) less what it exceeds x by is x rounded to 24 - 16 bits (Dekker's splitting)."""


Normalized = Callable[[Tensor, tuple[int, ...], tuple[int, ...]], Tensor]
"""A normalization of x over its axes `pixels`; what has one number for a channel is viewed as `by_channel` in it."""


@contextmanager
def channels_last(
    network: nn.Module, normalization: Callable[[nn.GroupNorm], Normalized] | None = None
) -> Iterator[None]:
    """Within the block, `network` normalizes groups and attends to pixels in the form above.

    `normalization`: another form of group normalization, for another engine. Modules whose `forward` was set by
    somebody else are left as they are, and so are attentions by another processor than diffusers' own.
    """
    changed: dict[nn.Module, Callable[..., Any]] = {}
    attentions = [module for module in network.modules() if _is_self_attention(module)]
    of_rows = {attention.group_norm for attention in attentions}
    for attention in attentions:
        changed[attention] = _attention_over_rows(attention)
    for module in network.modules():
        if type(module) is nn.GroupNorm and "forward" not in vars(module):
            normalized = (normalization or _in_eight_bits)(module)
            changed[module] = _group_norm(module, module in of_rows, normalized)
    with computing_by(changed):
        yield


def statistics_nodes(
    model: openvino.Model, norms: Mapping[str, int], edges: Collection[str] = ()
) -> list[str]:
    """Names of the nodes that compute one number for a channel, or fewer, in the normalizations of a graph.

    norms   name of the layer -> its number of channels: `group_norms` of the traced network.
    edges   nodes of layers that write f32: normalizations right behind them take their sums of that, and not of a copy
            in bf16.
    """
    names, in_f32, behind_edges = [], {layer_of(edge) for edge in edges}, set()
    for node in model.get_ordered_ops():
        name = node.get_friendly_name()
        channels = norms.get(layer_of(name))
        if channels is None or node.get_type_name() == "Constant":
            continue
        sources = (port.get_source_output().get_node() for port in node.inputs())
        reads_edge = any(layer_of(source.get_friendly_name()) in in_f32 for source in sources)
        if reads_edge:
            behind_edges.add(layer_of(name))
        is_sum = node.get_type_name().startswith("Reduce")
        is_small = _row_size(node.output(0)) <= channels
        over_pixels = is_sum and _row_size(node.input(0)) > channels
        if reads_edge or (is_small and (not over_pixels or layer_of(name) in behind_edges)):
            names.append(name)
    return names


def group_norms(network: nn.Module) -> dict[str, int]:
    """Name -> channels, of the group normalizations that `channels_last` writes anew."""
    return {
        name: module.num_channels for name, module in network.named_modules() if type(module) is nn.GroupNorm
    }


def _group_norm(norm: nn.GroupNorm, rows: bool, normalized: Normalized) -> Callable[[Tensor], Tensor]:
    """The normalization of [N, C, ...]; `rows`: of [N, C, L] that is a transposed view of [N, L, C]."""
    plain = type(norm).forward.__get__(norm)

    def forward(x: Tensor) -> Tensor:
        if rows:
            return normalized(x.transpose(1, 2), (1,), (-1, 1, norm.num_channels)).transpose(1, 2)
        if x.ndim == 2:  # no pixels
            return plain(x)
        return normalized(x, tuple(range(2, x.ndim)), (-1, norm.num_channels, *[1] * (x.ndim - 2)))

    return forward


def _in_eight_bits(norm: nn.GroupNorm) -> Normalized:
    grouped = (-1, norm.num_groups, norm.num_channels // norm.num_groups, 1)
    weight, bias = (
        (parameter.detach().float().view(1, *grouped[1:]) for parameter in (norm.weight, norm.bias))
        if norm.affine
        else (None, None)
    )

    def normalized(x: Tensor, pixels: tuple[int, ...], by_channel: tuple[int, ...]) -> Tensor:
        # subtractions as sums with a product by -1: the engine writes them so too, and its own lose the mark of f32
        count = math.prod(int(x.shape[dim]) for dim in pixels)
        mean = x.mean(pixels, keepdim=True).reshape(grouped)
        less_held = _less_in_eight_bits(mean)
        centred = x + less_held.reshape(by_channel)
        length = torch.linalg.vector_norm(centred, 2, dim=pixels, keepdim=True).reshape(grouped)
        rest = mean + less_held
        offset = (less_held + mean.mean(2, keepdim=True)) * -1.0
        squares = length * (length * (1 / count)) + offset * (rest * 2.0 + offset)
        factor = torch.pow(torch.relu(squares.mean(2, keepdim=True)) + norm.eps, -0.5)
        factor = factor.expand_as(offset) if weight is None else factor * weight
        shift = offset * factor
        if bias is not None:
            shift = shift + bias
        return centred * factor.reshape(by_channel) + shift.reshape(by_channel)

    return normalized


def _less_in_eight_bits(x: Tensor) -> Tensor:
    """-x, rounded to 8 significant bits: a number that bf16 holds."""
    scaled = x * EIGHT_BITS
    return (scaled + x * -1.0) + scaled * -1.0


def _is_self_attention(module: Any) -> bool:
    """Whether the module is an attention of diffusers whose processor treats images and rows of pixels alike."""
    from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0

    return (
        type(module) is Attention
        and type(module.processor) in (AttnProcessor, AttnProcessor2_0)
        and module.spatial_norm is None
        and "forward" not in vars(module)
    )


def _attention_over_rows(attention: Any) -> Callable[..., Tensor]:
    plain = type(attention).forward.__get__(attention)

    def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if hidden_states.ndim != 4:
            return plain(hidden_states, *args, **kwargs)
        _, channels, height, width = hidden_states.shape
        rows = hidden_states.permute(0, 2, 3, 1).reshape(-1, height * width, channels)
        with _without_residual(attention):
            attended = plain(rows, *args, **kwargs)
        attended = attended.reshape(-1, height, width, channels).permute(0, 3, 1, 2)
        if attention.residual_connection:  # here, where what it is added to is in channels last
            attended = attended + hidden_states
        return attended / attention.rescale_output_factor

    return forward


@contextmanager
def _without_residual(attention: Any) -> Iterator[None]:
    """The attention as it is but for what it does last: the sum with its input, over a factor."""
    own = attention.residual_connection, attention.rescale_output_factor
    attention.residual_connection, attention.rescale_output_factor = False, 1.0
    try:
        yield
    finally:
        attention.residual_connection, attention.rescale_output_factor = own


def _row_size(port: Any) -> float:
    """Numbers in one row of a tensor, infinite where that is not known."""
    shape = port.get_partial_shape()
    if shape.rank.is_dynamic or len(shape) < 3:  # the latter: numbers of shapes
        return math.inf
    sizes = list(shape)[1:]
    return math.prod(size.get_length() if size.is_static else math.inf for size in sizes)
