"""The graph of a quantized network as Octavo executes and exports it: channels last, and what of it stays in f32.

Peers are given `to_openvino`, the plain conversion; a network without integer layers is converted plainly here too.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

from torch import nn

from octavo.runtimes.audit import audited
from octavo.runtimes.calls import Call
from octavo.runtimes.channels_last import channels_last, group_norms, statistics_nodes
from octavo.runtimes.convert import to_openvino
from octavo.runtimes.edges import float_edges
from octavo.runtimes.network import has_foreign_code
from octavo.runtimes.pieces import kernels_by_piece
from octavo.runtimes.pointwise import convolutions_are_faster
from octavo.runtimes.time_table import timestep_nodes
from octavo.runtimes.transposes import without_pairs

if TYPE_CHECKING:
    import openvino


def to_integer_graph(
    denoiser: nn.Module,
    call: Call,
    split: Collection[str] = (),
    rows: int | None = None,
    pointwise: bool | None = None,
) -> openvino.Model:
    """`to_openvino`, of a network with integer layers with its normalizations and attentions in channels last, and
    sub-pixel convolutions and gated activations by a kernel for each piece.

    `pointwise`: as `to_openvino` has it; None: where that is faster on this machine.
    """
    if not audited(denoiser):
        return to_openvino(denoiser, call, split, rows)
    pointwise = convolutions_are_faster() if pointwise is None else pointwise
    foreign = has_foreign_code(denoiser)  # before its modules compute otherwise
    with channels_last(denoiser), kernels_by_piece(denoiser, split, pointwise):
        model = to_openvino(denoiser, call, split, rows, pointwise, foreign)
    if pointwise:
        without_pairs(model)
    return model


def nodes_in_f32(model: openvino.Model, denoiser: nn.Module) -> list[str]:
    """Names of the nodes of such a graph that stay f32 where the rest of the remainder is bf16.

    The float layers at its edges, what is computed from the timestep alone, and what has one number for a channel.
    """
    layers = audited(denoiser)
    edges = float_edges(model, layers)
    statistics = statistics_nodes(model, group_norms(denoiser), edges) if layers else []
    return [*edges, *timestep_nodes(model), *statistics]
