"""The audit: which kernel, in which precision, really ran each quantized layer."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from octavo.errors import OctavoError

if TYPE_CHECKING:
    import openvino

INTEGER_PRECISIONS = {"i8", "u8"}
COMPUTE_TYPES = {"Convolution", "GroupConvolution", "FullyConnected", "MatMul"}
LAYER_OPERATIONS = ("aten::linear", "aten::_convolution", "aten::convolution")


@dataclass(frozen=True)
class AuditRow:
    """One quantized layer: the engine's kernel and the precision of its arithmetic.

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


def audit_compiled(
    compiled: openvino.CompiledModel, layers: Iterable[str], split: Collection[str] = ()
) -> list[AuditRow]:
    """One row per layer name, read from the graph that the engine compiled (`get_runtime_model`).

    A kernel belongs to a layer when the names of the operations fused into it hold the layer's own convolution
    or matmul. Where several do, a float one is reported before an integer one. `split`: the layers that were
    converted to two kernels; one of which fewer are found is "missing".
    """
    kernels: dict[str, list[tuple[str, str]]] = {}
    for node in compiled.get_runtime_model().get_ops():
        info = {
            key: value.astype(str) for key, value in node.get_rt_info().items() if hasattr(value, "astype")
        }
        if info.get("layerType") not in COMPUTE_TYPES:
            continue
        found = (info.get("primitiveType", "?"), info.get("runtimePrecision", "?"))
        for layer in set(_layers_named_in(info.get("originalLayersNames", ""))):
            kernels.setdefault(layer, []).append(found)
    return [_row(layer, kernels.get(layer, []), 2 if layer in split else 1) for layer in layers]


def _layers_named_in(original_names: str) -> Iterator[str]:
    for name in original_names.split(","):
        module, _, operation = name.partition("/")
        if operation.startswith(LAYER_OPERATIONS):
            yield module.removeprefix("__module.denoiser.")


def _row(layer: str, kernels: list[tuple[str, str]], expected: int) -> AuditRow:
    if len(kernels) < expected:
        return AuditRow(layer, "none", "missing", expected)
    kernel, precision = min(kernels, key=lambda found: found[1] in INTEGER_PRECISIONS)
    return AuditRow(layer, kernel, precision, expected)


def require_integers(rows: Iterable[AuditRow]) -> None:
    """Raise `OctavoError` if a quantized layer did not run in integers: a silent float fallback gains nothing."""
    rows = list(rows)
    fallen = [row for row in rows if not row.ok]
    if fallen:
        named = ", ".join(f"{row.layer} ({row.precision})" for row in fallen[:3])
        more = f" and {len(fallen) - 3} more" if len(fallen) > 3 else ""
        raise OctavoError(
            f"{len(fallen)} of {len(rows)} quantized layers fell back to float: {named}{more}; exclude them when "
            'quantizing, or pass on_fallback="warn" to run them in float'
        )
