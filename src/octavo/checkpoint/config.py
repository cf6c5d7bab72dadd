"""The `quantization_config` that a checkpoint carries: what was quantized how, in JSON."""

from __future__ import annotations

import copy
import enum
import hashlib
import json
import os
from collections.abc import Mapping
from typing import Any

from diffusers.quantizers.quantization_config import QuantizationConfigMixin

from octavo.calibration import LayerRule
from octavo.calibration.quantize import OPERATIONS
from octavo.checkpoint.strict import check_name
from octavo.errors import OctavoError, quoted
from octavo.quantization import AttentionSpecs, QuantSpec
from octavo.quantization.packing import BITS

FORMAT_VERSION = 3
"""2: weights of at most 4 bits are stored two to a byte. 3: they may have groups. In all else 3 is 2 is 1; optional
fields of the configuration are refused by name by an Octavo that does not know them."""
FIELDS = {
    "quant_method",
    "format_version",
    "layers",
    "operations",
    "output_correction",
    "timestep_groups",
    "attention",
    "recipe",
    "calibration",
    "digest",
    "files",
}
DIGESTS = ({"tensors", "configuration"}, {"tensors", "configuration", "network"})
"""What a digest covers: of folders from before it knew of the network's own configuration, less."""


class QuantMethod(enum.StrEnum):
    """Diffusers asks a config's `quant_method` for `.value`."""

    OCTAVO = "octavo"


class OctavoConfig(QuantizationConfigMixin):
    """What diffusers reads from, and writes to, the denoiser's `config.json` under `quantization_config`.

    - `format_version`: the layout of this dictionary and of the tensors; a newer one is refused.
    - `layers`: every quantized layer by name. In JSON a list of groups {"weights": spec, "activations": spec,
      "balanced": bool, "names": [...]}, with "timestep_groups": G where there are any and "sub_pixel": true where that
      is so, for there are hundreds of layers and few kinds; here a `LayerRule` by layer name.
    - `operations`: what else is quantized ("network_output", "learned_variance", "sampled_image") -> spec.
    - `output_correction`: the shape of its table of means, [timesteps, ...]; not in the JSON where there is none.
    - `timestep_groups`: G, of the layers that have a scale for each group of timesteps; written only where there are
      any, and 1 here where not.
    - `attention`: attention in integers, in JSON groups {"query": spec, "key": spec, "exponentials": spec, "value":
      spec, "names": [...]}, here `AttentionSpecs` by the name of the module that computes it. Written only where there
      is any.
    - `recipe`, `calibration`: how it was made, for people and for the model card.
    - `digest`: SHA-256 of the file's tensors ("tensors"), of all fields above these ("configuration") and of the rest
      of `config.json` ("network"), to tell a damaged checkpoint. Taken whenever the denoiser is saved; empty before.
    - `files`: SHA-256 of the pipeline's other files by their path in its folder (`octavo.checkpoint.seals`).

    Raises `OctavoError` when the dictionary is not one that this version of Octavo wrote or can read.
    """

    def __init__(self, **fields: Any) -> None:
        version = fields.get("format_version")
        if isinstance(version, int) and version > FORMAT_VERSION:
            raise OctavoError(
                f"quantization_config: format_version {version} is newer than {FORMAT_VERSION}, which this Octavo "
                "reads; upgrade octavo"
            )
        if version not in (1, 2, FORMAT_VERSION) or isinstance(version, bool):
            raise OctavoError(
                f"quantization_config: format_version {quoted(version)} is not {FORMAT_VERSION}"
            )
        self.quant_method = QuantMethod.OCTAVO
        self.format_version = version
        self.layers = _read_layers(fields.get("layers"))
        if version == 1 and any(rule.weights.bits <= BITS for rule in self.layers.values()):
            raise OctavoError(
                "quantization_config: format_version 1 did not pack 4-bit weights; quantize the model again"
            )
        self.operations = _read_operations(_mapping(fields, "operations"))
        self.output_correction = _read_shape("output_correction", fields.get("output_correction"))
        self.timestep_groups = _read_timestep_groups(fields.get("timestep_groups", 1), self.layers)
        self.attention = _read_attention(fields.get("attention", []))
        self.recipe: dict[str, Any] = _mapping(fields, "recipe")
        self.calibration: dict[str, Any] = _mapping(fields, "calibration")
        self.digest: dict[str, Any] = _mapping(fields, "digest")
        self.files: dict[str, str] = read_files(_mapping(fields, "files"))
        unknown = set(fields) - FIELDS
        if unknown:
            raise OctavoError(
                f"quantization_config: unknown field {quoted(sorted(unknown)[0])}; upgrade octavo"
            )

    @classmethod
    def from_dict(cls, config_dict: Mapping[str, Any], **_: Any) -> OctavoConfig:
        return cls(**config_dict)

    def to_dict(self) -> dict[str, Any]:
        """JSON-safe. Layers with equal specs share one group."""
        attention = {"attention": _groups(self.attention)} if self.attention else {}
        return {
            "quant_method": self.quant_method.value,
            "format_version": self.format_version,
            "layers": _groups(self.layers),
            "operations": {name: spec.to_dict() for name, spec in self.operations.items()},
            **self._correction(),
            **self._timesteps(),
            **attention,
            "recipe": copy.deepcopy(self.recipe),
            "calibration": copy.deepcopy(self.calibration),
            "digest": dict(self.digest),
            **({"files": dict(self.files)} if self.files else {}),
        }

    def configuration_digest(self) -> str:
        """SHA-256 of what decides how the tensors are read, as canonical JSON."""
        decisive: dict[str, Any] = {
            "format_version": self.format_version,
            "layers": {name: rule.to_dict() for name, rule in self.layers.items()},
            "operations": {name: spec.to_dict() for name, spec in self.operations.items()},
            **self._correction(),
            **self._timesteps(),
        }
        if self.attention:  # else the digest is that of a checkpoint from before there was any
            decisive["attention"] = {name: specs.to_dict() for name, specs in self.attention.items()}
        return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()

    def _correction(self) -> dict[str, list[int]]:
        """Nothing without a correction: such a folder is as it always was, and its digest with it."""
        return {} if self.output_correction is None else {"output_correction": list(self.output_correction)}

    def _timesteps(self) -> dict[str, int]:
        """Nothing without groups of timesteps, for the same reason."""
        return {} if self.timestep_groups == 1 else {"timestep_groups": self.timestep_groups}

    def to_json_string(self, use_diff: bool = True) -> str:
        return json.dumps(self.to_dict(), indent=2, sort_keys=True) + "\n"

    def to_json_file(self, json_file_path: str | os.PathLike[str]) -> None:
        with open(json_file_path, "w", encoding="utf-8") as file:
            file.write(self.to_json_string())

    def __repr__(self) -> str:
        return f"OctavoConfig(format_version={self.format_version}, layers={len(self.layers)})"


def _groups(kinds_by_name: Mapping[str, LayerRule] | Mapping[str, AttentionSpecs]) -> list[dict[str, Any]]:
    """The names of each kind together, for there are many names and few kinds."""
    kinds: list[dict[str, Any]] = []
    members: list[list[str]] = []
    for name, specs in kinds_by_name.items():
        kind = specs.to_dict()
        if kind not in kinds:
            kinds.append(kind)
            members.append([])
        members[kinds.index(kind)].append(name)
    return [{**kind, "names": names} for kind, names in zip(kinds, members, strict=True)]


def _mapping(fields: Mapping[str, Any], name: str) -> dict[str, Any]:
    value = fields.get(name, {})
    if not isinstance(value, Mapping):
        raise OctavoError(f"quantization_config: {name} is not a JSON object")
    return dict(value)


def _read_shape(name: str, value: Any) -> tuple[int, ...] | None:
    if value is None:
        return None
    if not isinstance(value, (list, tuple)) or len(value) < 2 or not all(type(size) is int for size in value):
        raise OctavoError(
            f"quantization_config: {name} is not a shape [timesteps, ...]; save the model again"
        )
    if min(value) < 1:
        raise OctavoError(f"quantization_config: {name} has a size below 1; save the model again")
    return tuple(value)


def _read_operations(specs: Mapping[str, Any]) -> dict[str, QuantSpec]:
    for name in specs:
        if name not in OPERATIONS:
            raise OctavoError(
                f"quantization_config: operations: {quoted(name)} is none of {', '.join(OPERATIONS)}; save the "
                "model again"
            )
    read = {name: QuantSpec.from_dict(spec) for name, spec in specs.items()}
    for name, spec in read.items():
        if spec.granularity != "per_tensor":
            raise OctavoError(
                f"quantization_config: operations: {name} is not per_tensor; save the model again"
            )
    return read


def read_files(digests: Mapping[str, Any]) -> dict[str, str]:
    for name, digest in digests.items():
        for part in name.split("/"):
            check_name(part, "quantization_config: files")
        if not isinstance(digest, str):
            raise OctavoError(f"quantization_config: files: {name[:200]} has no digest; save the model again")
    return dict(digests)


def _read_layers(groups: Any) -> dict[str, LayerRule]:
    layers: dict[str, LayerRule] = {}
    try:
        for group in groups:
            balanced, sub_pixel = group.get("balanced", False), group.get("sub_pixel", False)
            for name, value in (("balanced", balanced), ("sub_pixel", sub_pixel)):
                if type(value) is not bool:
                    raise TypeError(f"{name}: {quoted(value)} is neither true nor false")
            specs = LayerRule(
                QuantSpec.from_dict(group["weights"]),
                QuantSpec.from_dict(group["activations"]),
                balanced,
                group.get("timestep_groups", 1),
                sub_pixel,
            )
            _add_all(layers, group["names"], specs)
    except (TypeError, KeyError, AttributeError) as error:
        raise OctavoError(
            f"quantization_config: layers is not readable ({str(error)[:200]}); save the model again"
        ) from error
    if not layers:
        raise OctavoError("quantization_config: layers is empty; save the model again")
    return layers


def _read_timestep_groups(groups: Any, layers: Mapping[str, LayerRule]) -> int:
    """How many there are; the layers that have any have all."""
    if type(groups) is not int or groups < 1:
        raise OctavoError(
            f"quantization_config: timestep_groups {quoted(groups)} is not a whole number from 1; save the model again"
        )
    for name, rule in layers.items():
        if rule.timestep_groups not in (1, groups):
            raise OctavoError(
                f"quantization_config: {name} has {quoted(rule.timestep_groups)} timestep_groups and the model "
                f"{groups}; save the model again"
            )
    return groups


def _read_attention(groups: Any) -> dict[str, AttentionSpecs]:
    attention: dict[str, AttentionSpecs] = {}
    try:
        for group in groups:
            _add_all(attention, group["names"], AttentionSpecs.from_dict(group))
    except (TypeError, KeyError, AttributeError) as error:
        raise OctavoError(
            f"quantization_config: attention is not readable ({str(error)[:200]}); save the model again"
        ) from error
    return attention


def _add_all(found: dict[str, Any], names: Any, specs: Any) -> None:
    """Each name once, whatever it is a name of."""
    if not isinstance(names, (list, tuple)):
        raise TypeError(f"names: {quoted(names)} is no list")
    for name in names:
        if not isinstance(name, str) or not name:
            raise TypeError(f"names: {quoted(name)} is no name")
        if name in found:
            raise TypeError(f"names: {quoted(name)} is there twice")
        found[name] = specs
