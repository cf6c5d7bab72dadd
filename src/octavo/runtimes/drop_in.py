"""What every engine's executor does alike: it is shared by copies, never pickled, and refuses what has no integers."""

from __future__ import annotations

from typing import Any, Self

from octavo.errors import OctavoError
from octavo.runtimes.calls import Call


class DropIn:
    """An executor stands for a compiled engine: a copied pipeline shares it, a pickled one would lack it."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self

    def __reduce__(self) -> Any:
        raise OctavoError(
            "pickle: an accelerated pipeline cannot be pickled; save_pretrained the pipeline it came from, and load "
            "and accelerate it where it is needed"
        )


def check_tensors(call: Call) -> None:
    """Raise `OctavoError` for what no engine on the CPU computes with, by the tensor's name.

    A tensor on another device, and what `check_numbers` refuses.
    """
    for name, tensor in zip(call.names, call.tensors, strict=True):
        if tensor.device.type != "cpu":
            raise OctavoError(
                f"{name}: is on {tensor.device}, but an accelerated network runs on the CPU; move the pipeline "
                'back by .to("cpu")'
            )
    check_numbers(call)


def check_numbers(call: Call) -> None:
    """Raise `OctavoError` for a call without rows, or with NaN or infinity, for which integers have no value.

    In a mask infinity is a number.
    """
    if call.rows == 0:
        raise OctavoError(f"{call.names[0]}: has no rows; give one image or more")
    for name, tensor in zip(call.names, call.tensors, strict=True):
        if tensor.is_floating_point() and bool(
            (tensor.isnan() if "mask" in name else ~tensor.isfinite()).any()
        ):
            raise OctavoError(
                f"{name}: holds NaN or infinity, which integers cannot tell; look for where it comes from"
            )
