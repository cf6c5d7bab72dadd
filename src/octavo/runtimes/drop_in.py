"""What every engine's executor does alike: copies share it, nothing pickles it, what has no integers is refused."""

from __future__ import annotations

import functools
import typing
from collections.abc import Callable, Sequence
from typing import Any, Self

import torch
from torch import nn

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


LARGEST = 1e12
"""With a margin of some 1e7 below the numbers whose squares leave float32 in a normalization; no image, latent or
state comes near."""


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
    """Raise `OctavoError` for a call without rows, or with numbers for which integers have no value.

    These are NaN, infinity, and what is beyond `LARGEST`, since a network that overflows inside would answer it with
    what looks like an image. In a mask only NaN is.
    """
    numbers_checked(call)()


def numbers_checked(call: Call) -> Callable[[], None]:
    """`check_numbers` in two: what this gives raises for such numbers, and waits for a GPU that has looked for them.

    Asked for once the GPU has more to do, it does not leave it idle.
    """
    if call.rows == 0:
        raise OctavoError(f"{call.names[0]}: has no rows; give one image or more")
    wrong: dict[str, torch.Tensor] = {
        name: (tensor.isnan() if "mask" in name else ~(tensor.abs() <= LARGEST)).any()
        for name, tensor in zip(call.names, call.tensors, strict=True)
        if tensor.is_floating_point()
    }
    looked = []
    for device in {flag.device for flag in wrong.values() if flag.device.type == "cuda"}:
        names = [name for name, flag in wrong.items() if flag.device == device]
        there = torch.stack([wrong[name] for name in names])
        here = torch.empty(len(names), dtype=torch.bool, pin_memory=True)
        here.copy_(there, non_blocking=True)
        wrong |= zip(names, here, strict=True)
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(device))
        looked.append(event)

    def check() -> None:
        for event in looked:
            event.synchronize()
        for name, flag in wrong.items():
            if bool(flag):
                raise OctavoError(
                    f"{name}: holds NaN, infinity or a number beyond {LARGEST:g}, which integers cannot tell; look for "
                    "where it comes from"
                )

    return check


def answered(call: Call, denoiser: nn.Module, outputs: Sequence[torch.Tensor]) -> Any:
    """The outputs in the form that the network itself would return them in for this call."""
    if call.return_dict is None:
        return outputs[0]
    if not call.return_dict:
        return tuple(outputs)
    kind: Any = type(denoiser)
    return _output_type(kind)(*outputs)


@functools.cache
def _output_type(kind: Any) -> type:
    """The output dataclass that a denoiser's `forward` declares (`UNet2DOutput | tuple`, ...)."""
    from diffusers.models.modeling_outputs import Transformer2DModelOutput
    from diffusers.utils import BaseOutput

    declared = typing.get_type_hints(kind.forward).get("return")
    for candidate in (declared, *typing.get_args(declared)):
        if isinstance(candidate, type) and issubclass(candidate, BaseOutput):
            return candidate
    return Transformer2DModelOutput
