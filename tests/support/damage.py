# ruff: noqa: E501 (tables of values)
"""Seeded damage and malice done to a saved folder: each mutation is one edit of one file, or of the folder.

They edit the quantized component (the VAE, where there is one) in place. `outside`: a folder beside it that holds the
same and is none of the model's.
"""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from octavo.checkpoint.config import OctavoConfig
from octavo.checkpoint.quantizer import digest_of
from octavo.checkpoint.seals import digest_of_network, seals_of

WEIGHTS, CONFIG = "diffusion_pytorch_model.safetensors", "config.json"
VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 7, 10**6, 10**9, 2**63, -(2**70), 0.5, -1e308, 1e-300, float("nan"), float("inf"), "",
    "..", "../../outside", "/etc/passwd", "__class__", "octavo", "x" * 5000, [], {}, [[]], [10**9] * 3, [1] * 5000,
    {"a": 1}, ["names"], {"names": ["conv_in"]},
)  # fmt: skip
NAMES = (
    "..",
    "../evil",
    "/etc/passwd",
    "a/b",
    "conv_in",
    "__class__",
    "",
    "unet.unet",
    "x" * 3000,
    "weight_int8",
    "\0",
)


def component(folder: Path) -> str:
    """The quantized component that is mutated: the VAE where there is one, else the denoiser."""
    return "vae" if os.path.lexists(folder / "vae") else denoiser(folder)


def denoiser(folder: Path) -> str:
    return "unet" if os.path.lexists(folder / "unet") else "transformer"


def weights(folder: Path) -> Path:
    return folder / component(folder) / WEIGHTS


def config(folder: Path) -> Path:
    return folder / component(folder) / CONFIG


def some_json(rng: random.Random, folder: Path) -> Path:
    return rng.choice(
        (config(folder), folder / "model_index.json", folder / "scheduler/scheduler_config.json")
    )


def flip_bytes(rng: random.Random, folder: Path, outside: Path) -> None:
    path = _some_file(rng, folder)
    data = bytearray(path.read_bytes())
    for _ in range(rng.choice((1, 1, 2, 8))):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


def flip_header(rng: random.Random, folder: Path, outside: Path) -> None:
    path = weights(folder)
    data = bytearray(path.read_bytes())
    data[rng.randrange(8 + int.from_bytes(data[:8], "little"))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


def cut_or_grow(rng: random.Random, folder: Path, outside: Path) -> None:
    path = _some_file(rng, folder)
    data = path.read_bytes()
    how = rng.randrange(4)
    path.write_bytes(
        data[: rng.randrange(len(data))] if how == 0 else data + bytes(rng.randrange(1, 99)) if how == 1 else
        b"" if how == 2 else data[: len(data) // 2] * 2
    )  # fmt: skip


def remove_file(rng: random.Random, folder: Path, outside: Path) -> None:
    _some_file(rng, folder).unlink()


def change_json(rng: random.Random, folder: Path, outside: Path) -> None:
    def edit(value: Any) -> None:
        holder, key = _some_place(rng, value)
        if rng.random() < 0.6:
            holder[key] = rng.choice(VALUES)
        elif isinstance(holder, dict) and rng.random() < 0.5:
            holder[rng.choice(NAMES)] = holder.pop(key)
        else:
            del holder[key]

    _edit_json(some_json(rng, folder), edit)


def numbers_in_json(rng: random.Random, folder: Path, outside: Path) -> None:
    """Of the network's own configuration: what is built from it."""

    def edit(value: Any) -> None:
        keys = [
            key for key, old in value.items() if isinstance(old, (int, list)) and not isinstance(old, bool)
        ]
        key = rng.choice(keys)
        new = rng.choice((0, -1, 1, 3, 16, 10**4, 10**6, 10**9, 2**40))
        value[key] = [new for _ in value[key]] if isinstance(value[key], list) else new

    _edit_json(config(folder), edit)


def repeat_key(rng: random.Random, folder: Path, outside: Path) -> None:
    path = some_json(rng, folder)
    text = path.read_text()
    key = rng.choice(sorted(json.loads(text)))
    path.write_text("{" + f"{json.dumps(key)}: {json.dumps(rng.choice(VALUES))}, " + text.strip()[1:])


def nest_json(rng: random.Random, folder: Path, outside: Path) -> None:
    depth = rng.choice((40, 500, 50_000, 2_000_000))
    path = some_json(rng, folder)
    if rng.random() < 0.5:
        path.write_text("[" * depth + "]" * depth)
    else:
        text = path.read_text().strip()
        path.write_text(text[:-1] + ', "deep": ' + '{"a":' * depth + "1" + "}" * depth + "}")


def huge_number(rng: random.Random, folder: Path, outside: Path) -> None:
    path = some_json(rng, folder)
    text = path.read_text().strip()
    number = rng.choice(("9" * 400, "9" * 5000, "1e999", "-1e999", "NaN", "Infinity", "1e-9999"))
    key = rng.choice(sorted(json.loads(text)))
    path.write_text(text[:-1] + f", {json.dumps(rng.choice((key, 'new')))}: {number}" + "}")


def change_header(rng: random.Random, folder: Path, outside: Path) -> None:
    path = weights(folder)
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    name = rng.choice([key for key in header if key != "__metadata__"])
    entry = header[name]
    how = rng.randrange(8)
    if how == 0:
        entry["shape"] = rng.choice(
            ([2**62, 4], [-1], [0], [], [10**12], [*entry["shape"][::-1], 1], [1] * 70, "3", None)
        )
    elif how == 1:
        entry["dtype"] = rng.choice(("F64", "I8", "U8", "F32", "F16", "BOOL", "C64", "F8_E4M3", "", None, 3))
    elif how == 2:
        entry["data_offsets"] = rng.choice(
            ([0, 2**63], [-4, 4], [5, 1], [0, 8], [2**62, 2**62 + 4], [], None)
        )
    elif how == 3:
        header[rng.choice(NAMES)] = header.pop(name)
    elif how == 4:
        del header[name]
    elif how == 5:
        header[rng.choice(NAMES)] = dict(entry)
    elif how == 6:
        entry["shape"] = [int(torch.tensor(entry["shape"]).prod())]
    else:
        header["__metadata__"] = rng.choice(
            ({"format": "tf"}, {"format": "../x"}, None, [], {"a": "b" * 10**5})
        )
    new = json.dumps(header).encode()
    length = rng.choice((len(new),) * 6 + (2**63, 2**40, 0, len(data) * 2))
    path.write_bytes(length.to_bytes(8, "little") + new + data[8 + size :])


def change_values(rng: random.Random, folder: Path, outside: Path) -> None:
    tensors = load_file(weights(folder))
    endings = (
        "scale",
        "zero_point",
        "multiplier",
        "weight_int8",
        "weight_int4",
        "bias",
        "weight",
        "mean",
        "k",
    )
    ending = rng.choice(endings)
    name = rng.choice([key for key in sorted(tensors) if key.endswith(ending)] or sorted(tensors))
    tensor = tensors[name].clone()
    if tensor.is_floating_point():
        value: float = rng.choice(
            (float("nan"), float("inf"), -float("inf"), 0.0, -0.0, -1.0, 1e-45, 3e38, 0.25)
        )
    else:
        low, high = torch.iinfo(tensor.dtype).min, torch.iinfo(tensor.dtype).max
        value = rng.choice((low, high, max(low, -1), 0, min(high, 300), 7))
    tensor.view(-1)[rng.randrange(tensor.numel())] = value
    tensors[name] = tensor
    save_file(tensors, weights(folder), metadata={"format": "pt"})


def tensors_added(rng: random.Random, folder: Path, outside: Path) -> None:
    tensors = load_file(weights(folder))
    name = rng.choice(sorted(tensors))
    tensors[rng.choice((*NAMES[:-1], f"{name}.x", "octavo_operations.evil.scale"))] = tensors[name].clone()
    if rng.random() < 0.3:
        del tensors[name]
    save_file(tensors, weights(folder), metadata={"format": "pt"})


def layer_names(rng: random.Random, folder: Path, outside: Path) -> None:
    def edit(value: Any) -> None:
        names = rng.choice(value["quantization_config"]["layers"])["names"]
        k = rng.randrange(len(names))
        new = rng.choice((*NAMES, names[k] + ".weight", names[k - 1], "conv_norm_out", "time_embedding"))
        names[k:k] = [new] if rng.random() < 0.5 else []
        names[k] = new

    _edit_json(config(folder), edit)


def component_names(rng: random.Random, folder: Path, outside: Path) -> None:
    name = component(folder)

    def edit(value: Any) -> None:
        new = rng.choice(
            (
                f"../outside/{name}",
                str(outside / name),
                "..",
                ".",
                f"{name}/../{name}",
                "scheduler",
                name.upper(),
                f"{name[:2]}\0{name[2:]}",
            )
        )
        value[new] = value[name]
        if rng.random() < 0.7:
            del value[name]

    _edit_json(folder / "model_index.json", edit)


def classes(rng: random.Random, folder: Path, outside: Path) -> None:
    own = component(folder)
    for name in ("evil.py", "pipeline.py", f"{own}/evil.py", f"{own}/{own}.py"):
        (folder / name).write_text(
            f"open({str(outside / 'ran')!r}, 'w')\nfrom diffusers import DDIMPipeline as Evil\n"
        )

    def edit(value: Any) -> None:
        key = rng.choice(("_class_name", own, "scheduler"))
        value[key] = rng.choice((
            ["evil", "Evil"], "Evil", "evil.Evil", "../evil", ["os", "system"], ["diffusers", "os"], [None, "Evil"],
            ["diffusers", "DDIMPipeline"], ["subprocess", "Popen"], ["diffusers", "UNet2DModel", "x"], ["builtins", "eval"],
            ["diffusers.utils", "deprecate"], ["transformers", "pipeline"], ["diffusers", "UNet1DModel"], "DDPMPipeline",
        ))  # fmt: skip

    _edit_json(folder / "model_index.json", edit)


def pickled(rng: random.Random, folder: Path, outside: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return open, (str(outside / "ran"), "w")

    name = rng.choice(
        ("diffusion_pytorch_model.bin", "pytorch_model.bin", "diffusion_pytorch_model.safetensors")
    )
    how = rng.random()
    if how < 0.4:
        weights(folder).unlink()
    elif how < 0.7:
        weights(folder).rename(weights(folder).with_name("diffusion_pytorch_model.fp16.safetensors"))
    torch.save({"conv_in.weight": Evil()}, folder / component(folder) / name)


def links(rng: random.Random, folder: Path, outside: Path) -> None:
    """To files and folders outside that would load perfectly, to what never ends, and to themselves."""
    how = rng.randrange(6)
    if how == 5:
        place = rng.choice((component(folder), "scheduler"))
        os.mkfifo(folder / place / "more.safetensors")
        return
    if how == 0:
        target = rng.choice((component(folder), "scheduler"))
        shutil.rmtree(folder / target)
        (folder / target).symlink_to(outside / target)
        return
    path = _some_file(rng, folder)
    name = path.relative_to(folder)
    path.unlink()
    if how == 4:
        os.mkfifo(path)
    else:
        path.symlink_to((outside / name, "/dev/zero", path, "/etc/passwd")[how - 1 if how < 4 else 0])


def more_links(rng: random.Random, folder: Path, outside: Path) -> None:
    own = component(folder)
    name = rng.choice(
        (
            f"{own}/diffusion_pytorch_model.fp16.safetensors",
            f"{own}/more.json",
            "extra",
            f"{own}/model.safetensors",
        )
    )
    (folder / name).symlink_to(
        rng.choice((weights(outside), config(outside), outside, Path("/dev/zero"), Path("/")))
    )


def shards(rng: random.Random, folder: Path, outside: Path) -> None:
    tensors = sorted(load_file(weights(folder)))
    file = rng.choice((
        f"../../outside/{component(folder)}/{WEIGHTS}", str(weights(outside)), "diffusion_pytorch_model.safetensors", "none.safetensors", "..",
        "", None, 3,
    ))  # fmt: skip
    index = {
        "metadata": rng.choice(({}, {"total_size": 1}, None)),
        "weight_map": dict.fromkeys(tensors, file),
    }
    (folder / component(folder) / f"{WEIGHTS}.index.json").write_text(json.dumps(index))


MUTATIONS: tuple[Callable[[random.Random, Path, Path], None], ...] = (
    flip_bytes, flip_bytes, flip_header, cut_or_grow, remove_file, change_json, change_json, change_json, numbers_in_json,
    numbers_in_json, repeat_key, nest_json, huge_number, change_header, change_header, change_values, change_values,
    tensors_added, layer_names, component_names, classes, pickled, links, more_links, shards,
)  # fmt: skip
SIGNABLE = {
    "change_json",
    "numbers_in_json",
    "change_values",
    "tensors_added",
    "layer_names",
    "classes",
    "component_names",
}


def sign(folder: Path) -> bool:
    """Give the folder the digests of what is in it now. False where it cannot be read so far."""
    with suppress(Exception):
        for name in dict.fromkeys((component(folder), denoiser(folder))):  # whose seals cover the other
            path = folder / name / CONFIG
            values = json.loads(path.read_text())
            quantization = values["quantization_config"]
            if name == denoiser(folder):
                quantization["files"] = seals_of(folder, name)
            quantization["digest"] = {
                "tensors": digest_of(load_file(folder / name / WEIGHTS)),
                "configuration": OctavoConfig.from_dict(quantization).configuration_digest(),
                "network": digest_of_network(values),
            }
            path.write_text(json.dumps(values))
        return True
    return False


def _some_file(rng: random.Random, folder: Path) -> Path:
    return rng.choice(sorted(path for path in folder.rglob("*") if path.is_file() and path.stat().st_size))


def _some_place(rng: random.Random, value: Any) -> tuple[Any, Any]:
    """A container in `value` and one of its keys, at any depth."""
    places = []

    def walk(holder: Any) -> None:
        keys = list(holder) if isinstance(holder, dict) else range(len(holder))
        for key in keys:
            places.append((holder, key))
            if isinstance(holder[key], (dict, list)) and len(holder[key]):
                walk(holder[key])

    walk(value)
    shallow = [place for place in places if isinstance(place[0], dict)]
    return rng.choice(shallow if rng.random() < 0.7 else places)


def _edit_json(path: Path, edit: Callable[[Any], None]) -> None:
    value = json.loads(path.read_text())
    edit(value)
    path.write_text(json.dumps(value))
