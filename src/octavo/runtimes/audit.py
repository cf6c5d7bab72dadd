"""The audit: which kernel, in which precision, really ran each layer that is to run in integers."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from octavo.errors import OctavoError
from octavo.quantization import integer_layers, quantized_products
from octavo.quantization.attention_calls import product_name
from octavo.runtimes.edges import layer_of

if TYPE_CHECKING:
    import openvino
    from torch import nn

logger = logging.getLogger(__name__)
INTEGER_PRECISIONS = {"i8", "u8"}
FLOAT_PRECISIONS = {"f32", "bf16", "f16"}
TOLD = ("layerType", "primitiveType", "runtimePrecision", "originalLayersNames")
COMPUTE_TYPES = {"Convolution", "GroupConvolution", "FullyConnected", "MatMul"}
PRODUCT_TYPE, PRODUCTS = "MatMul", ("qk", "pv")
LAYER_OPERATIONS = ("aten::linear", "aten::_convolution", "aten::convolution")


@dataclass(frozen=True)
class AuditRow:
    """One layer with integer activations, or product of attention (`<module>.qk`, `<module>.pv`), and its kernel.

    `precision` is the type of the kernel's activations as the engine reports it ("u8", "i8", "f32", ...), or
    "missing" where no kernel of the layer was found. `ok` says that it is an integer type. `kernels`: 2 where the
    CPU needs two of them for exact sums (`octavo.runtimes.saturation`), else 1.
    """

    layer: str
    kernel: str
    precision: str
    kernels: int = 1

    @property
    def ok(self) -> bool:
        return self.precision in INTEGER_PRECISIONS

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "ok": self.ok}


def audited(denoiser: nn.Module) -> list[str]:
    """The names of all that must run in integers: layers with integer activations, both products of each attention.

    Layers whose activations stay float are left out: they were asked not to.
    """
    products = [name for name, _ in quantized_products(denoiser)]
    return [*(name for name, _ in integer_layers(denoiser)), *products]


def audit_compiled(
    compiled: openvino.CompiledModel,
    layers: Iterable[str],
    split: Collection[str] = (),
    in_pieces: Mapping[str, int] | None = None,
) -> list[AuditRow]:
    """One row per name (`audited`), read from the graph that the engine compiled (`get_runtime_model`).

    A kernel belongs to a layer when the names of the operations fused into it hold the layer's own convolution or
    matmul, and to a product of attention when it is a MatMul that holds anything of the product's: the engine may give
    it the name of its rescaling. One without any such name belongs to the layer whose weights it reads. Where several
    do, a float one is reported before an integer one. `split`: the layers that were converted to two kernels;
    `in_pieces`: those with kernels for pieces of their output, and how many (`octavo.runtimes.pieces`). One of which
    fewer are found is "missing".
    """
    layers = list(layers)
    expected = {**dict.fromkeys(split, 2), **(in_pieces or {})}
    kernels: dict[str, list[tuple[str, str]]] = {}
    for node in compiled.get_runtime_model().get_ops():
        told = node.get_rt_info()  # of which each value takes its time to read
        if "layerType" not in told or told["layerType"].astype(str) not in COMPUTE_TYPES:
            continue
        info = {key: told[key].astype(str) for key in TOLD if key in told}
        found = (info.get("primitiveType", "?"), _activations(info))
        names = info.get("originalLayersNames", "")
        of_kernel = set(layers_named_in(names))
        if info["layerType"] == PRODUCT_TYPE:
            of_kernel.update(layer_of(name) for name in names.split(","))
        if not of_kernel:
            of_kernel.update(_layer_of_weights(node))
        for layer in of_kernel:
            kernels.setdefault(layer, []).append(found)
    return [
        _row(layer, kernels.get(layer, []), expected.get(layer, 1), 2 if layer in split else 1)
        for layer in layers
    ]


def _activations(info: Mapping[str, str]) -> str:
    """The type of the kernel's activations: by its name where that ends on a float type.

    A float kernel that reads compressed weights (`brgemm_avx512_f32`) has theirs, "i8", as its `runtimePrecision`
    (OpenVINO 2026.4): a simulation would pass for integers.
    """
    ending = info.get("primitiveType", "").rpartition("_")[2]
    return ending if ending in FLOAT_PRECISIONS else info.get("runtimePrecision", "?")


def layers_named_in(original_names: str) -> Iterator[str]:
    """The layers whose convolution or product is among these operations, named after modules and separated by commas.

    >>> list(layers_named_in("__module.denoiser.a.conv/aten::_convolution/Convolution,__module.denoiser.b/aten::silu"))
    ['a.conv']
    """
    for name in original_names.split(","):
        if name.partition("/")[2].startswith(LAYER_OPERATIONS):
            yield layer_of(name)


def _layer_of_weights(node: Any) -> Iterator[str]:
    """The layer whose integers the kernel reads, where the engine has given it a name of its own ("Multiply_52777")."""
    for port in node.inputs():
        name = port.get_source_output().get_node().get_friendly_name()
        layer, found, _ = name.removeprefix("self.denoiser.").rpartition(".weight_int8")
        if found and name.startswith("self.denoiser."):
            yield layer


def _row(layer: str, kernels: list[tuple[str, str]], expected: int, parts: int) -> AuditRow:
    if len(kernels) < expected:
        return AuditRow(product_name(layer), "none", "missing", parts)
    kernel, precision = min(kernels, key=lambda found: found[1] in INTEGER_PRECISIONS)
    return AuditRow(product_name(layer), kernel, precision, parts)


def require_integers(rows: Iterable[AuditRow]) -> None:
    """Raise `OctavoError` if what must run in integers did not: a silent float fallback gains nothing."""
    rows = list(rows)
    fallen = [row for row in rows if not row.ok]
    if fallen:
        named = ", ".join(f"{row.layer} ({row.precision})" for row in fallen[:3])
        more = f" and {len(fallen) - 3} more" if len(fallen) > 3 else ""
        products = any(row.layer.rpartition(".")[2] in PRODUCTS for row in fallen)
        mend = "exclude them when quantizing" + (
            " (a product of attention by its module's name, without .qk or .pv) or leave out attention_matmuls"
            if products
            else ""
        )
        raise OctavoError(
            f"{len(fallen)} of {len(rows)} layers with integer activations fell back to float: {named}{more}; {mend}, "
            'or pass on_fallback="warn" to run them in float'
        )


def accept(rows: Iterable[AuditRow], on_fallback: str) -> None:
    """`require_integers`, or where `on_fallback` is "warn" what it says as a warning."""
    try:
        require_integers(rows)
    except OctavoError as error:
        if on_fallback == "refuse":
            raise
        logger.warning("%s", error)
