"""Balancing's multiplication made by the layer in front: its affine gives what the quantizer reads, at no cost.

A balanced layer reads x[j] m[j]. Where x is the output of a normalization's affine, or of a linear or convolution, and
nothing else reads it, that module gives the product by itself (SmoothQuant, 2211.10438, section 4):

    gamma[j] <- gamma[j] m[j],  beta[j] <- beta[j] m[j]    or    W[j, :] <- W[j, :] m[j],  b[j] <- b[j] m[j]

and the balanced layer's weights are divided by m as ever. Several layers that read one x (queries, keys and values)
must share m. Through attention the values' channels stay apart, O[:, j] = P V[:, j], so that their projection takes
what the output projection is multiplied with. What is nonlinear in between (SiLU, GELU, a residual sum) forbids it.
The result is an equivalent float network, which is then quantized like any other.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from octavo.calibration.labels import Labels, tensors_in
from octavo.calibration.tracing import evaluating
from octavo.diffusion import call_arguments
from octavo.quantization import walk
from octavo.quantization.balancing import divided_weight

MOVES = {
    *(
        "view",
        "_unsafe_view",
        "reshape",
        "_reshape_alias",
        "flatten",
        "unflatten",
        "transpose",
        "permute",
        "t",
    ),
    *("unsqueeze", "squeeze", "expand", "clone", "contiguous", "_to_copy", "to", "detach", "alias"),
}
"""Operations that change no value; whether channels stay where they were is checked afterwards."""
TOLERANCE = 1e-3

Absorbers = dict[str, tuple[str, ...]]


def find_absorbers(
    denoiser: nn.Module,
    kwargs: Mapping[str, Any],
    layers: Collection[str],
    *,
    through_attention: bool = True,
) -> Absorbers:
    """Module -> the layers that alone read its output, all of them among `layers`, in order of execution.

    Found by following the data through one call, `denoiser(**kwargs)`; then checked in a second: every such output is
    multiplied channel by channel, and each reader must see its own input times the same. `through_attention`: whether
    the values' projection may stand in front of the output's. `denoiser` is left as it was.
    """
    modules = dict(denoiser.named_modules())
    owners = Counter(id(p) for _, p in denoiser.named_parameters(remove_duplicate=False))
    flow = _Flow(through_attention)
    with torch.no_grad(), evaluating(denoiser), _followed(denoiser, flow), _Attention(flow), flow:
        output = denoiser(**call_arguments(denoiser, kwargs))
        flow.spoil(output)
    found: Absorbers = {}
    for producer, readers in flow.readers.items():
        involved = [modules[name] for name in (producer, *readers)]
        if (
            producer not in flow.spoiled
            and all(flow.runs[name] == 1 for name in (producer, *readers))
            and all(name in layers and getattr(modules[name], "groups", 1) == 1 for name in readers)
            and all(owners[id(p)] == 1 for module in involved for p in module.parameters(recurse=False))
            and all(_channels(involved[0]) == modules[name].weight.shape[1] for name in readers)
        ):
            found[producer] = tuple(readers)
    while found:
        wrong = _first_wrong(denoiser, kwargs, found, flow.inputs)
        if wrong is None:
            break
        del found[wrong]
    return found


def absorb(denoiser: nn.Module, absorbers: Absorbers, multipliers: Mapping[str, torch.Tensor]) -> nn.Module:
    """An equivalent float network in which the modules of `absorbers` give their outputs multiplied.

    `multipliers`: reader -> float32 `[input channels]`, equal for all readers of one module. The copy shares every
    tensor but those that change with `denoiser`, which is left as it was.
    """
    memo: dict[int, Any] = {id(t): t for t in (*denoiser.parameters(), *denoiser.buffers())}
    new = copy.deepcopy(denoiser, memo)
    modules: dict[str, Any] = dict(new.named_modules())
    for producer, readers in absorbers.items():
        m = multipliers[readers[0]]
        for parameter in ("weight", "bias"):
            value = getattr(modules[producer], parameter)
            if value is not None:
                factor = m.to(value.device).view(-1, *[1] * (value.ndim - 1))
                _set(modules[producer], parameter, value.detach().float() * factor)
        for reader in readers:
            _set(modules[reader], "weight", divided_weight(modules[reader].weight, m))
    return new


def _set(module: nn.Module, name: str, value: torch.Tensor) -> None:
    old = getattr(module, name)
    setattr(module, name, nn.Parameter(value.to(old.dtype), requires_grad=old.requires_grad))


def _channels(module: nn.Module) -> int:
    """Output channels that the module can multiply."""
    weight: torch.Tensor = module.weight  # type: ignore[assignment]
    return int(weight.shape[0])


def _is_producer(module: nn.Module) -> bool:
    if type(module) is nn.GroupNorm:
        return module.affine
    if type(module) is nn.LayerNorm:
        return module.elementwise_affine and len(module.normalized_shape) == 1
    return False


class _Flow(TorchDispatchMode):
    """Which module's output each tensor holds, unchanged but for its shape, and who reads it.

    `readers`: producer -> layers; `spoiled`: producers whose output is read by anything else; `inputs`: what each
    reader was handed; `runs`: how often each ran.
    """

    def __init__(self, through_attention: bool) -> None:
        super().__init__()
        self.through_attention = through_attention
        self.holds: Labels[str] = Labels()
        self.readers: dict[str, list[str]] = {}
        self.spoiled: set[str] = set()
        self.inputs: dict[str, torch.Tensor] = {}
        self.runs: Counter[str] = Counter()
        self.inside = 0

    def spoil(self, value: Any) -> None:
        self.spoiled.update(held for t in tensors_in(value) if (held := self.holds.of(t)) is not None)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if self.inside:
            return result
        if func.overloadpacket.__name__ not in MOVES:
            self.spoil((args, kwargs))
            return result
        held = self.holds.of(args[0])
        if held is not None:
            for tensor in tensors_in(result):
                self.holds.put(tensor, held)
        return result


@contextmanager
def _followed(denoiser: nn.Module, flow: _Flow) -> Iterator[None]:
    layers = {id(layer) for _, layer in walk(denoiser)}

    def entering(name: str) -> Callable[..., None]:
        def enter(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            held = flow.holds.of(args[0])
            if held is not None:
                flow.readers.setdefault(held, []).append(name)
                flow.inputs[name] = args[0].clone()
            flow.inside += 1

        return enter

    def leaving(name: str, is_layer: bool) -> Callable[..., None]:
        def leave(module: nn.Module, args: Any, output: torch.Tensor) -> None:
            flow.inside -= is_layer
            flow.runs[name] += 1
            flow.holds.put(output, name)

        return leave

    hooks: list[Any] = []
    for name, module in denoiser.named_modules():
        if id(module) in layers:
            hooks.append(module.register_forward_pre_hook(entering(name)))
        if id(module) in layers or _is_producer(module):
            hooks.append(module.register_forward_hook(leaving(name, id(module) in layers)))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


class _Attention(TorchFunctionMode):
    """Attention hands the values' channels on."""

    def __init__(self, flow: _Flow) -> None:
        super().__init__()
        self.flow = flow

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention or not self.flow.through_attention:
            return func(*args, **kwargs)
        named = {**dict(zip(("query", "key", "value"), args, strict=False)), **kwargs}
        self.flow.spoil([x for name, x in named.items() if name != "value"])
        self.flow.inside += 1
        output = func(*args, **kwargs)
        self.flow.inside -= 1
        held = self.flow.holds.of(named["value"])
        if held is not None:
            self.flow.holds.put(output, held)
        return output


def _first_wrong(
    denoiser: nn.Module, kwargs: Mapping[str, Any], absorbers: Absorbers, inputs: Mapping[str, torch.Tensor]
) -> str | None:
    """The first producer of which a reader does not see its input times what the output was multiplied with."""
    modules = dict(denoiser.named_modules())
    generator = torch.Generator().manual_seed(0)
    wrong: list[str] = []
    hooks: list[Any] = []

    def shaped(m: torch.Tensor, module: nn.Module, x: torch.Tensor) -> torch.Tensor:
        last = isinstance(module, (nn.Linear, nn.LayerNorm))
        return m.to(x.device, x.dtype).view(-1, *[1] * (0 if last else x.ndim - 2))

    def multiplied(m: torch.Tensor) -> Callable[..., torch.Tensor]:
        return lambda module, args, output: output * shaped(m, module, output)

    def undone(m: torch.Tensor, producer: str, name: str) -> Callable[..., Any]:
        def undo(module: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
            x, expected = args[0] / shaped(m, module, args[0]), inputs[name]
            if float((x - expected).abs().max()) > TOLERANCE * float(expected.abs().max()):
                wrong.append(producer)
            return (x, *args[1:])

        return undo

    for producer, readers in absorbers.items():
        m = 0.5 + 1.5 * torch.rand(_channels(modules[producer]), generator=generator)
        hooks.append(modules[producer].register_forward_hook(multiplied(m)))
        hooks += [modules[name].register_forward_pre_hook(undone(m, producer, name)) for name in readers]
    try:
        with torch.no_grad(), evaluating(denoiser):
            denoiser(**call_arguments(denoiser, kwargs))
    finally:
        for hook in hooks:
            hook.remove()
    return wrong[0] if wrong else None
