# ruff: noqa: E501 (tables of values)
"""Seeded damage and malice done to a saved folder, and the judgement of what loading makes of it.

    python tests/support/mutations.py --count 2000

A mutation is one edit of one file, or of the folder. Half of the edits of JSON and tensors are signed again, as one who
means it would: then no digest tells, and what loads must be exactly what the folder says.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMPipeline
from safetensors.torch import load_file, save_file
from tiny import RECIPES, tiny_pipeline

import octavo
from octavo.checkpoint.config import OctavoConfig
from octavo.checkpoint.quantizer import digest_of
from octavo.checkpoint.seals import digest_of_network, seals_of
from octavo.errors import OctavoError

WEIGHTS, CONFIG = "unet/diffusion_pytorch_model.safetensors", "unet/config.json"
JSONS = (CONFIG, "model_index.json", "scheduler/scheduler_config.json")
SECONDS, MEMORY = 10, 1 << 30
"""What one loading may take; memory beyond what the process has."""
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


class TookTooLong(BaseException):
    """No `Exception`, so that nothing between turns it into another."""


@dataclass
class Verdict:
    """What became of one mutation, loaded in one of two ways. `outcome`: "right", "refused", or what is wrong."""

    kind: str
    signed: bool
    loader: str
    outcome: str
    message: str
    seconds: float


# ---- mutations: each edits the folder in place


def flip_bytes(rng: random.Random, folder: Path, outside: Path) -> None:
    path = _some_file(rng, folder)
    data = bytearray(path.read_bytes())
    for _ in range(rng.choice((1, 1, 2, 8))):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


def flip_header(rng: random.Random, folder: Path, outside: Path) -> None:
    path = folder / WEIGHTS
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

    _edit_json(folder / rng.choice(JSONS), edit)


def numbers_in_json(rng: random.Random, folder: Path, outside: Path) -> None:
    """Of the network's own configuration: what is built from it."""

    def edit(value: Any) -> None:
        keys = [
            key for key, old in value.items() if isinstance(old, (int, list)) and not isinstance(old, bool)
        ]
        key = rng.choice(keys)
        new = rng.choice((0, -1, 1, 3, 16, 10**4, 10**6, 10**9, 2**40))
        value[key] = [new for _ in value[key]] if isinstance(value[key], list) else new

    _edit_json(folder / CONFIG, edit)


def repeat_key(rng: random.Random, folder: Path, outside: Path) -> None:
    path = folder / rng.choice(JSONS)
    text = path.read_text()
    key = rng.choice(sorted(json.loads(text)))
    path.write_text("{" + f"{json.dumps(key)}: {json.dumps(rng.choice(VALUES))}, " + text.strip()[1:])


def nest_json(rng: random.Random, folder: Path, outside: Path) -> None:
    depth = rng.choice((40, 500, 50_000, 2_000_000))
    path = folder / rng.choice(JSONS)
    if rng.random() < 0.5:
        path.write_text("[" * depth + "]" * depth)
    else:
        text = path.read_text().strip()
        path.write_text(text[:-1] + ', "deep": ' + '{"a":' * depth + "1" + "}" * depth + "}")


def huge_number(rng: random.Random, folder: Path, outside: Path) -> None:
    path = folder / rng.choice(JSONS)
    text = path.read_text().strip()
    number = rng.choice(("9" * 400, "9" * 5000, "1e999", "-1e999", "NaN", "Infinity", "1e-9999"))
    key = rng.choice(sorted(json.loads(text)))
    path.write_text(text[:-1] + f", {json.dumps(rng.choice((key, 'new')))}: {number}" + "}")


def change_header(rng: random.Random, folder: Path, outside: Path) -> None:
    path = folder / WEIGHTS
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
    tensors = load_file(folder / WEIGHTS)
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
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def tensors_added(rng: random.Random, folder: Path, outside: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    name = rng.choice(sorted(tensors))
    tensors[rng.choice((*NAMES[:-1], f"{name}.x", "octavo_operations.evil.scale"))] = tensors[name].clone()
    if rng.random() < 0.3:
        del tensors[name]
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def layer_names(rng: random.Random, folder: Path, outside: Path) -> None:
    def edit(value: Any) -> None:
        names = rng.choice(value["quantization_config"]["layers"])["names"]
        k = rng.randrange(len(names))
        new = rng.choice((*NAMES, names[k] + ".weight", names[k - 1], "conv_norm_out", "time_embedding"))
        names[k:k] = [new] if rng.random() < 0.5 else []
        names[k] = new

    _edit_json(folder / CONFIG, edit)


def component_names(rng: random.Random, folder: Path, outside: Path) -> None:
    def edit(value: Any) -> None:
        new = rng.choice(
            (
                "../outside/unet",
                str(outside / "unet"),
                "..",
                ".",
                "unet/../unet",
                "scheduler",
                "UNET",
                "un\0et",
            )
        )
        value[new] = value["unet"]
        if rng.random() < 0.7:
            del value["unet"]

    _edit_json(folder / "model_index.json", edit)


def classes(rng: random.Random, folder: Path, outside: Path) -> None:
    for name in ("evil.py", "pipeline.py", "unet/evil.py", "unet/unet.py"):
        (folder / name).write_text(
            f"open({str(outside / 'ran')!r}, 'w')\nfrom diffusers import DDIMPipeline as Evil\n"
        )

    def edit(value: Any) -> None:
        key = rng.choice(("_class_name", "unet", "scheduler"))
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
    if rng.random() < 0.7:
        (folder / WEIGHTS).unlink()
    torch.save({"conv_in.weight": Evil()}, folder / "unet" / name)


def links(rng: random.Random, folder: Path, outside: Path) -> None:
    """To files and folders outside that would load perfectly, to what never ends, and to themselves."""
    how = rng.randrange(5)
    if how == 0:
        target = rng.choice(("unet", "scheduler"))
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
    name = rng.choice(
        ("unet/diffusion_pytorch_model.fp16.safetensors", "unet/more.json", "extra", "unet/model.safetensors")
    )
    (folder / name).symlink_to(
        rng.choice((outside / WEIGHTS, outside / CONFIG, outside, Path("/dev/zero"), Path("/")))
    )


def shards(rng: random.Random, folder: Path, outside: Path) -> None:
    tensors = sorted(load_file(folder / WEIGHTS))
    file = rng.choice((
        "../../outside/" + WEIGHTS, str(outside / WEIGHTS), "diffusion_pytorch_model.safetensors", "none.safetensors", "..",
        "", None, 3,
    ))  # fmt: skip
    index = {
        "metadata": rng.choice(({}, {"total_size": 1}, None)),
        "weight_map": dict.fromkeys(tensors, file),
    }
    (folder / "unet/diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))


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
        path = folder / CONFIG
        config = json.loads(path.read_text())
        quantization = config["quantization_config"]
        quantization["files"] = seals_of(folder, "unet")
        quantization["digest"] = {
            "tensors": digest_of(load_file(folder / WEIGHTS)),
            "configuration": OctavoConfig.from_dict(quantization).configuration_digest(),
            "network": digest_of_network(config),
        }
        path.write_text(json.dumps(config))
        return True
    return False


# ---- judgement


def load_octavo(folder: Path) -> Any:
    return octavo.load(folder)


def load_diffusers(folder: Path) -> Any:
    return DDIMPipeline.from_pretrained(folder)


class Bench:
    """A folder for each recipe, a perfect copy of it outside, and what each loads to."""

    def __init__(self, place: Path) -> None:
        self.place, self.whole = place, []
        for k, recipe in enumerate(RECIPES):
            folder = place / f"whole-{k}"
            octavo.quantize(
                tiny_pipeline(), recipe, batch_size=4, progress=False, workdir=place / "work"
            ).save_pretrained(folder)
            self.whole.append((folder, _said(octavo.load(folder))))

    def run(self, seed: int) -> list[Verdict]:
        """The verdicts on mutation number `seed`, loaded by Octavo and by plain diffusers."""
        rng = random.Random(seed)
        whole, right = self.whole[seed % len(self.whole)]
        nest = self.place / f"mutation-{seed}"
        folder, outside = nest / "model", nest / "outside"
        shutil.copytree(whole, folder)
        shutil.copytree(whole, outside)
        mutate = MUTATIONS[(seed // len(self.whole)) % len(MUTATIONS)]
        mutate(rng, folder, outside)
        signed = mutate.__name__ in SIGNABLE and rng.random() < 0.5 and sign(folder)
        before = _tree(nest)
        verdicts = []
        for loader in (load_octavo, load_diffusers):
            start = time.perf_counter()
            outcome, message = _judge(loader, folder, None if signed else right)
            seconds = time.perf_counter() - start
            if _tree(nest) != before:
                outcome = "wrote something"
            if any(
                str(nest) in (getattr(module, "__file__", None) or "")
                for module in list(sys.modules.values())
            ):
                outcome = "imported something"
            if foreign := [event for event in EVENTS if not event.startswith(f"open {folder}/")]:
                outcome = f"did something else: {foreign[0]}"
            EVENTS.clear()
            verdicts.append(Verdict(mutate.__name__, signed, loader.__name__, outcome, message, seconds))
        shutil.rmtree(nest)
        return verdicts


EVENTS: list[str] = []
"""What the audit hook of `main` saw that no loading should do, since it was last emptied."""
FORBIDDEN = ("subprocess.", "os.system", "os.exec", "os.posix_spawn", "os.fork", "socket.connect", "os.remove", "os.rename",
             "os.rmdir", "os.mkdir", "os.symlink", "os.link", "shutil.", "os.truncate", "os.chmod", "pickle.find_class")  # fmt: skip
_watching = False


def _watch(event: str, args: tuple[Any, ...]) -> None:
    if not _watching:
        return
    if event.startswith(FORBIDDEN):
        EVENTS.append(f"{event} {args!r}"[:200])
    if event == "open" and isinstance(args[0], (str, os.PathLike)):
        path, mode, flags = os.fspath(args[0]), args[1], args[2]
        writes = (isinstance(mode, str) and set(mode) & set("wax+")) or (
            flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        )
        installed = (sys.prefix, sys.base_prefix, "/usr/lib", "/proc", "/sys", *sys.path)
        if writes or not path.startswith(tuple(filter(None, installed))):
            EVENTS.append(f"open {path}{' to write' if writes else ''}")


def _judge(loader: Callable[[Path], Any], folder: Path, right: Any) -> tuple[str, str]:
    try:
        with _bounded():
            pipeline = loader(folder)
    except TookTooLong:
        return f"took more than {SECONDS} s", ""
    except OctavoError as error:
        return ("refused" if "\n" not in str(error) and len(str(error)) < 1000 else "refused at length"), str(
            error
        )
    except Exception as error:
        return f"raised {type(error).__name__}", str(error)[:300]
    return ("right" if _said(pipeline) == (right or _written(folder, loader)) else "silently wrong"), ""


def _said(pipeline: Any) -> Any:
    """All that decides what the pipeline computes."""
    tensors = digest_of(pipeline.unet.state_dict())
    scheduler = {key: value for key, value in pipeline.scheduler.config.items() if not key.startswith("_")}
    network = {key: value for key, value in pipeline.unet.config.items() if not key.startswith("_")}
    quantization = network.pop("quantization_config")
    kinds = [type(part).__name__ for part in (pipeline, pipeline.unet, pipeline.scheduler)]
    return _json([kinds, tensors, scheduler, network, quantization.configuration_digest()])


def _written(folder: Path, loader: Callable[[Path], Any]) -> Any:
    """The same as the files of a signed folder say, with diffusers' own defaults for what they do not."""
    index = json.loads((folder / "model_index.json").read_text())
    config = json.loads((folder / CONFIG).read_text())
    quantization = OctavoConfig.from_dict(config.pop("quantization_config"))
    plain = {key: value for key, value in config.items() if not key.startswith("_")}
    import diffusers

    kind = getattr(diffusers, index["unet"][1])
    network = {key: value for key, value in kind.from_config(plain).config.items() if not key.startswith("_")}
    of_scheduler = getattr(diffusers, index["scheduler"][1])
    scheduler = {
        key: value
        for key, value in of_scheduler.from_pretrained(folder / "scheduler").config.items()
        if not key.startswith("_")
    }
    asked = index["_class_name"] if loader is load_octavo else "DDIMPipeline"  # whose `from_pretrained` it is
    kinds = [asked, kind.__name__, of_scheduler.__name__]
    tensors = digest_of(load_file(folder / WEIGHTS))
    return _json([kinds, tensors, scheduler, network, quantization.configuration_digest()])


def _json(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=str)


@contextmanager
def _bounded() -> Iterator[None]:
    """Within the block time and memory end; the audit hook watches."""
    global _watching

    def stop(*_: Any) -> None:
        raise TookTooLong

    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    old = resource.getrlimit(resource.RLIMIT_AS)
    handler = signal.signal(signal.SIGALRM, stop)
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, old[1]))
    signal.alarm(SECONDS)
    _watching = True
    try:
        yield
    finally:
        _watching = False
        signal.alarm(0)
        signal.signal(signal.SIGALRM, handler)
        resource.setrlimit(resource.RLIMIT_AS, old)


def _peak_megabytes() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _tree(folder: Path) -> list[tuple[str, int]]:
    found = []
    for place, folders, files in os.walk(folder):
        for name in (*folders, *files):
            status = os.lstat(Path(place) / name)
            found.append((str(Path(place) / name), status.st_mtime_ns))
    return sorted(found)


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--first", type=int, default=0)
    arguments = parser.parse_args()
    from diffusers.utils import logging

    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    sys.addaudithook(_watch)
    start, verdicts = time.perf_counter(), []
    with tempfile.TemporaryDirectory() as temporary:
        bench = Bench(Path(temporary))
        before = _peak_megabytes()
        for seed in range(arguments.first, arguments.first + arguments.count):
            for verdict in bench.run(seed):
                verdicts.append(verdict)
                if verdict.outcome not in ("right", "refused"):
                    print(f"{seed} {verdict}"[:500], flush=True)
    for loader in ("load_octavo", "load_diffusers"):
        of_loader = [verdict for verdict in verdicts if verdict.loader == loader]
        print(loader, dict(Counter(verdict.outcome for verdict in of_loader)))
        print("  signed:", dict(Counter(verdict.outcome for verdict in of_loader if verdict.signed)))
        print(f"  slowest {max(verdict.seconds for verdict in of_loader):.2f} s")
    print(f"{arguments.count} mutations, {time.perf_counter() - start:.0f} s", end="")
    print(f", peak memory {_peak_megabytes():.0f} MB, {before:.0f} before the first")
    sys.exit(any(verdict.outcome not in ("right", "refused") for verdict in verdicts))


if __name__ == "__main__":
    main()
