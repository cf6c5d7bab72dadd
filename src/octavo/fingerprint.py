"""Names for the exact contents of networks and pipelines, so that what was made from them can be found again."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from octavo.work import digest_value

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

HOOKS = ("_forward_pre_hooks", "_forward_hooks")
OF_EVERY_MODULE = frozenset(vars(nn.Module()))
SKETCH_SIZE, MIDDLE, LEAST_COSINE = 128, 7.5, 0.5
"""Weights of a `model_identity`, the hex digit that stands for 0, and how alike they are in versions of one network."""


def fingerprint(denoiser: nn.Module, *extra: str) -> str:
    """SHA-256 (first 32 hex digits) of everything that decides what `denoiser` computes, and of `extra`.

    That is its configuration; every tensor of its state; the class, the mode, the plain attributes and the names of
    the forward hooks of each of its modules (of a LoRA's layer so its scale, and whether it is on); the versions of
    diffusers and Octavo. What a hook does is not seen, only what it is called.

    >>> network = nn.Sequential(nn.Linear(2, 2), nn.Dropout())
    >>> before = fingerprint(network)
    >>> fingerprint(network) == before, fingerprint(network.eval()) == before
    (True, False)
    """
    made_by = (f"{package} {version}" for package, version in versions("diffusers", "octavo").items())
    return _contents(denoiser, *made_by, *extra)


def contents(denoiser: nn.Module) -> str:
    """`fingerprint` without the versions: the same by all that describe the network alike, however they compute it.

    >>> network = nn.Linear(2, 2)
    >>> contents(network) == contents(network), contents(network) == fingerprint(network)
    (True, False)
    """
    return _contents(denoiser)


def _contents(denoiser: nn.Module, *texts: str) -> str:
    digest = hashlib.sha256()
    config = _config(denoiser)
    for text in (json.dumps(config, sort_keys=True, default=repr), *texts):
        digest.update(text.encode() + b"\0")
    for name, module in denoiser.named_modules():
        digest.update("\n".join((name, *_traits(module))).encode() + b"\0")
    for name, tensor in denoiser.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\0".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:32]


def model_identity(denoiser: nn.Module) -> str:
    """What tells a model in all its quantized versions from others, for `same_model` to compare: two parts and a dot.

    SHA-256 (first 32 hex digits) of what all versions have exactly: the class, the configuration without what is said
    of quantization, and the parameters of normalization layers, which no two trainings of them share, rounded to
    bfloat16: the same in float32 and bfloat16, accelerated or not, and across versions of Octavo. Where quantization
    changes weights before it rounds them (`PTQ4DM.absorb`, `sub_pixel`), the identity from before is kept in the
    checkpoint's configuration, and taken from there.

    Then SKETCH_SIZE weights of its convolutions and linear layers, one hex digit each: w over the root mean square of
    its row (output channel), from -2 to 2. Rounding a weight moves it a little, so that of versions of one network they
    nearly agree, and of two trainings they have nothing to do with each other. So networks are told apart that have no
    normalization, or left it as it began. Not told apart are a network and what became of it by a LoRA or a fine-tuning
    that left normalization alone: to tell these by their weights, they would have to differ by more than 2 bits do.

    The cost is that of reading so many rows: milliseconds, whatever the size.

    >>> network = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2))
    >>> before = model_identity(network)
    >>> _ = network[0].weight.data.mul_(1.01)
    >>> same_model(model_identity(network), before)
    True
    >>> _ = network[0].weight.data.neg_()
    >>> same_model(model_identity(network), before)
    False
    """
    config = _config(denoiser)
    quantization: Any = config.pop("quantization_config", None)  # an object, or what diffusers made of it
    is_mapping = isinstance(quantization, Mapping)
    made = quantization.get("calibration") if is_mapping else getattr(quantization, "calibration", None)
    if isinstance(made, Mapping) and "model_identity" in made:
        return str(made["model_identity"])
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=repr).encode())
    digest.update(type(denoiser).__name__.encode())
    for name, module in denoiser.named_modules():
        if "norm" in type(module).__name__.lower():
            for key, parameter in module.named_parameters(recurse=False):
                digest.update(f"{name}.{key} {tuple(parameter.shape)}\0".encode())
                rounded = parameter.detach().to("cpu", torch.bfloat16).contiguous().flatten()
                digest.update(rounded.view(torch.uint8).numpy().data)
    exact, sketch = digest.hexdigest()[:32], _sketch(denoiser)
    return f"{exact}.{sketch}" if sketch else exact


def same_model(a: str, b: str) -> bool:
    """Whether two of `model_identity` are of one model: equal first parts, and second ones whose cosine is 0.5 or more.

    Of independent weights the cosine is 0 with a standard deviation of 1 / sqrt(SKETCH_SIZE) = 0.09, of 8-bit versions
    of one network 1.00, of 2-bit ones 0.94 (a tiny U-Net). Identities of one part only go by that.

    >>> same_model("a", "a.0f0f"), same_model("a.0f0f", "a.1f0e"), same_model("a.0f0f", "a.f0f0")
    (True, True, False)
    """
    (exact_a, _, sketch_a), (exact_b, _, sketch_b) = a.partition("."), b.partition(".")
    if exact_a != exact_b or not sketch_a or not sketch_b:
        return exact_a == exact_b
    try:
        x, y = ([int(digit, 16) - MIDDLE for digit in sketch] for sketch in (sketch_a, sketch_b))
    except ValueError:  # of a file that somebody changed
        return False
    if len(x) != len(y):
        return False
    product = sum(p * q for p, q in zip(x, y, strict=True))
    return product >= LEAST_COSINE * (sum(p * p for p in x) * sum(q * q for q in y)) ** 0.5


def _sketch(denoiser: nn.Module) -> str:
    """SKETCH_SIZE weights at fixed places, spread over all layers; "" for a network that has none."""
    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    layers: list[Any] = [
        module for module in denoiser.modules() if isinstance(module, kinds) or hasattr(module, "weight_row")
    ]
    digits = []
    for i in range(SKETCH_SIZE if layers else 0):
        layer = layers[i * len(layers) // SKETCH_SIZE]
        quantized = hasattr(layer, "weight_row")
        row = i * 7919 % len(layer.weight_int8 if quantized else layer.weight)
        weights = (layer.weight_row(row) if quantized else layer.weight[row]).detach().flatten().float()
        size = float(weights.square().mean().sqrt())
        value = float(weights[i * 104729 % len(weights)]) / size if size > 0 else 0.0
        digits.append(f"{min(15, max(0, int(4 * (value + 2)))):x}")
    return "".join(digits)


def pipeline_fingerprint(
    pipeline: DiffusionPipeline,
    decisions: Sequence[Any],
    inputs: Mapping[str, Any] | None,
    networks: Mapping[str, nn.Module] | None = None,
) -> str:
    """SHA-256 (first 32 hex digits) of all that decides what a run of `pipeline` gives.

    That is its class with its own settings, its scheduler with its (`revision`, if it is one of Octavo's that has been
    mended, and the shift that flow matching was set to),
    the `fingerprint` of each of its networks, `inputs`, and `decisions`, JSON-safe: whatever else a run is made with.
    `networks`: component name -> the network that runs in its place. Raises `OctavoError` for inputs without stable
    contents.
    """
    scheduler = pipeline.scheduler
    names = [_path(type(part)) for part in (pipeline, scheduler)]
    if revision := getattr(scheduler, "revision", 0):
        names.append(f"revision {revision}")
    settings = {key: value for key, value in dict(scheduler.config).items() if key[:1] != "_"}
    settings["shift"] = getattr(scheduler, "_shift", None)
    own = {
        key: value
        for key, value in dict(pipeline.config).items()
        if key[:1] != "_" and (value is None or isinstance(value, (bool, int, float, str)))
    }
    described = json.dumps([names, settings, own, *decisions], sort_keys=True, default=repr)
    digest = hashlib.sha256(described.encode())
    for name, component in sorted({**pipeline.components, **(networks or {})}.items()):
        if isinstance(component, nn.Module):
            digest.update(f"{name} {fingerprint(component)}".encode())
    digest_value(digest, dict(inputs or {}), "inputs")
    return digest.hexdigest()[:32]


def versions(*packages: str) -> dict[str, str]:
    """Package -> its version; "none" for one that is not installed, as Octavo itself when run from its sources.

    >>> versions("octavo", "no-such-package")
    {'octavo': '...', 'no-such-package': 'none'}
    """
    return {package: _version(package) for package in packages}


def _config(network: nn.Module) -> dict[str, Any]:
    """The network's settings; diffusers' are a mapping, those of transformers (text encoders) an object.

    A setting that diffusers has put beside its entry, as an attribute of the mapping, is the one that counts: by it a
    network knows that it has an IP-Adapter.
    """
    config: Any = getattr(network, "config", {})
    settings = config.to_dict() if hasattr(config, "to_dict") else dict(config)
    return {key: getattr(config, key, value) for key, value in settings.items() if key[:1] != "_"}


def _traits(module: nn.Module) -> Iterator[str]:
    """What a module is besides its tensors, its mode (`training`) among the attributes."""
    yield _path(type(module))
    for key, value in sorted(vars(module).items()):
        if not key.startswith("_") or (key not in OF_EVERY_MODULE and _is_plain(value)):
            yield f"{key}={_described(value)}"
    processor = vars(module).get(
        "processor"
    )  # of attention: code beside the module, with settings of its own
    for key, value in sorted(getattr(processor, "__dict__", {}).items()):
        if _is_plain(value):
            yield f"processor.{key}={_described(value)}"
    for kind in HOOKS:
        yield from (f"{kind} {_described(hook)}" for hook in getattr(module, kind).values())


def _is_plain(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (bool, int, float, str))


def _described(value: Any) -> str:
    """A plain value by its contents, anything else by what it is: no addresses, which change with each start.

    >>> _described({"scale": [0.5, None], "of": {"b", "a"}, "other": object()})
    "{'of': {'a', 'b'}, 'other': builtins.object, 'scale': [0.5, None]}"
    """
    if value is None or isinstance(value, (bool, int, float, str)):
        return repr(value)
    if isinstance(value, (tuple, list)):
        return f"[{', '.join(map(_described, value))}]"
    if isinstance(value, Mapping):
        items = sorted((_described(key), _described(item)) for key, item in value.items())
        return f"{{{', '.join(f'{key}: {item}' for key, item in items)}}}"
    if isinstance(value, (set, frozenset)):
        return f"{{{', '.join(sorted(map(_described, value)))}}}"
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = ((field.name, getattr(value, field.name)) for field in dataclasses.fields(value))
        return f"{_path(type(value))}({', '.join(f'{name}={_described(item)}' for name, item in fields)})"
    return _path(value if hasattr(value, "__qualname__") else type(value))


def _path(named: Any) -> str:
    return f"{getattr(named, '__module__', '?')}.{named.__qualname__}"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"
