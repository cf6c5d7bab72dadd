"""The products as torch operations, which torch.compile calls as they are."""

from __future__ import annotations

import torch

from octavo.runtimes.cuda import launch

NAMESPACE = "octavo"


@torch.library.custom_op(
    f"{NAMESPACE}::int8_matmul",
    mutates_args=(),
    schema="(Tensor q, Tensor w, Tensor? offset, Tensor scale, Tensor? bias, Tensor? factor, ScalarType dtype, "
    "str layer) -> Tensor",
)
def int8_matmul(q, w, offset, scale, bias, factor, dtype, layer):  # type: ignore[no-untyped-def]
    """`launch.matmul`."""
    return launch.matmul(q, w, offset, scale, bias, factor, dtype, layer)


@int8_matmul.register_fake
def _(q, w, offset, scale, bias, factor, dtype, layer):  # type: ignore[no-untyped-def]
    return torch.empty((*q.shape[:2], len(w)), dtype=dtype, device=q.device)


@torch.library.custom_op(
    f"{NAMESPACE}::int8_convolution",
    mutates_args=(),
    schema="(Tensor q, Tensor w, Tensor? offset, Tensor scale, Tensor? bias, Tensor? factor, ScalarType dtype, "
    "int[] stride, int[] dilation, int groups, str layer) -> Tensor",
)
def int8_convolution(q, w, offset, scale, bias, factor, dtype, stride, dilation, groups, layer):  # type: ignore[no-untyped-def]
    """`launch.convolution`."""
    return launch.convolution(q, w, offset, scale, bias, factor, dtype, stride, dilation, groups, layer)


@int8_convolution.register_fake
def _(q, w, offset, scale, bias, factor, dtype, stride, dilation, groups, layer):  # type: ignore[no-untyped-def]
    size = launch.out_size(q.shape[1:-1], w.shape[1:-1], stride, dilation)
    return torch.empty((len(q), *size, len(w)), dtype=dtype, device=q.device)
