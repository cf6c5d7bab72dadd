"""One evaluation on a GPU, watched: which kernel ran each quantized layer, and which float layers are at the edges."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from octavo.calibration.dependence import Dependence
from octavo.calibration.tracing import IMAGE, edge_layers
from octavo.quantization import quantized_products, walk
from octavo.quantization.attention_calls import product_name
from octavo.runtimes.audit import AuditRow
from octavo.runtimes.cuda.launch import watched
from octavo.runtimes.cuda.layers import IntegerLayer

IN_FLOAT = ("torch simulation", "f32")


class Watched:
    """What ran: for each layer's name its kernels, as launched, with the precision of what they multiplied."""

    def __init__(self) -> None:
        self.kernels: dict[str, list[tuple[str, str]]] = {}
        self.ran: list[tuple[str, bool, bool]] = []
        self.dependence: Dependence | None = None

    @contextmanager
    def again(self) -> Iterator[Watched]:
        """Within the block the network is evaluated anew, by other means: what they launch is noted in what this gives.

        Products of attention, which nothing launches, are as they were.
        """
        anew = Watched()
        anew.kernels = {name: list(seen) for name, seen in self.kernels.items() if set(seen) == {IN_FLOAT}}
        with watched(anew.multiplied):
            yield anew

    def begin(self, name: str, x: torch.Tensor) -> None:
        """The layer `name` is called with `x`."""
        self.ran.append((name, x.ndim > 2, self.dependence is None or IMAGE in self.dependence.of(x)))

    def multiplied(self, layer: str, kernel: str, left: torch.dtype, right: torch.dtype) -> None:
        """A kernel was launched for `layer`."""
        precision = "i8" if left == right == torch.int8 else str(left).removeprefix("torch.")
        self.kernels.setdefault(layer, []).append((f"triton {kernel}", precision))

    def in_float(self, name: str) -> None:
        """A product of attention was computed by torch, with integers that float32 holds."""
        self.kernels.setdefault(name, []).append(IN_FLOAT)

    def audit(self, names: Iterable[str]) -> list[AuditRow]:
        """A row for each of `names` (`octavo.runtimes.audit.audited`); of several kernels a float one is told first."""
        rows = []
        for name in names:
            found = sorted(
                self.kernels.get(name, [("none", "missing")]), key=lambda kernel: kernel[1] == "i8"
            )
            rows.append(AuditRow(product_name(name), *found[0]))
        return rows

    def edges(self, network: nn.Module) -> tuple[str | None, str | None]:
        """The layers that read the image and write the output; None for one in integers.

        Where none is seen to read the image, which kernels' results are not followed through, by order.
        """
        floats = {name for name, _ in walk(network)}
        edges = edge_layers(self.ran) or edge_layers([(name, spatial, True) for name, spatial, _ in self.ran])
        first, last = (edges[0], edges[-1]) if edges else ("", "")
        return first if first in floats else None, last if last in floats else None


@contextmanager
def watching(network: nn.Module, image: torch.Tensor | None = None) -> Iterator[Watched]:
    """Within the block, what evaluations of `network` (`octavo.runtimes.cuda.network.on_device`) run is noted.

    `image`: the one that is evaluated, so that the first layer that reads it is told from one that reads a text.
    """
    seen, hooks = Watched(), []

    def beginning(name: str) -> Any:
        return lambda module, args: seen.begin(name, args[0])

    def computing(name: str) -> Any:
        return lambda module, args: seen.in_float(name)

    layers = [(name, module) for name, module in network.named_modules() if isinstance(module, IntegerLayer)]
    for name, module in (*layers, *walk(network)):
        hooks.append(module.register_forward_pre_hook(beginning(name)))
    for name, product in quantized_products(network):
        hooks.append(product.register_forward_pre_hook(computing(name)))
    try:
        with ExitStack() as stack:
            stack.enter_context(watched(seen.multiplied))
            if image is not None:
                seen.dependence = stack.enter_context(Dependence({IMAGE: image}))
            yield seen
    finally:
        seen.dependence = None
        for hook in hooks:
            hook.remove()
