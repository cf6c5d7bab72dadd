"""Seeded damage and malice done to saved folders (`damage`), and the judgement of what loading makes of it.

    python tests/support/mutations.py --count 2000

Half of the edits of JSON and tensors are signed again, as one who means it would: then no digest tells, and what loads
must be exactly what the folder says.
"""

from __future__ import annotations

import argparse
import functools
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
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from damage import CONFIG, MUTATIONS, SIGNABLE, WEIGHTS, component, denoiser, sign
from diffusers import DDIMPipeline, DiTPipeline
from safetensors.torch import load_file
from tiny import RECIPES, tiny_pipeline
from tiny_families import build

import octavo
from octavo.checkpoint.config import OctavoConfig
from octavo.checkpoint.quantizer import digest_of
from octavo.errors import OctavoError

SECONDS, MEMORY = 10, 1 << 30
"""What one loading may take; memory beyond what the process has."""


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


def load_octavo(folder: Path) -> Any:
    return octavo.load(folder)


def load_diffusers(folder: Path) -> Any:
    kind = DiTPipeline if os.path.lexists(folder / "vae") else DDIMPipeline
    return kind.from_pretrained(folder)


class Bench:
    """A folder for each recipe, one with a quantized VAE and one of the default recipe, a perfect copy of it outside,
    and what each loads to."""

    def __init__(self, place: Path) -> None:
        _install()
        self.place, self.whole = place, []
        dit, inputs = build("dit")
        both = {"inputs": inputs, "components": ("transformer", "vae")}
        few = octavo.PTQ4DM(samples=2, steps=2, metric="minmax")
        best = octavo.named_recipe("best", samples=4, steps=2)
        made = [
            *((tiny_pipeline(), recipe, {}) for recipe in RECIPES),
            (dit, few, both),
            (tiny_pipeline(), best, {}),
        ]
        for k, (pipeline, recipe, more) in enumerate(made):
            folder = place / f"whole-{k}"
            octavo.quantize(
                pipeline, recipe, batch_size=4, progress=False, workdir=place / "work", **more
            ).save_pretrained(folder)
            self.whole.append((folder, _said(octavo.load(folder))))

    def run(self, seed: int, only: int | None = None) -> list[Verdict]:
        """The verdicts on mutation number `seed`, of the folder `only`, loaded by Octavo and by plain diffusers."""
        rng = random.Random(seed)
        k = seed % len(self.whole) if only is None else only
        whole, right = self.whole[k]
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
            inside = f"open {folder.resolve()}/"
            if foreign := [event for event in EVENTS if not event.startswith(inside)]:
                outcome = f"did something else: {foreign[0]}"
            EVENTS.clear()
            verdicts.append(Verdict(mutate.__name__, signed, loader.__name__, outcome, message, seconds))
        shutil.rmtree(nest)
        return verdicts


EVENTS: list[str] = []
"""What the audit hook saw that no loading should do, since it was last emptied."""
FORBIDDEN = (
    "subprocess.", "os.system", "os.exec", "os.posix_spawn", "os.fork", "socket.connect", "os.remove", "os.rename",
    "os.rmdir", "os.mkdir", "os.symlink", "os.link", "shutil.", "os.truncate", "os.chmod", "pickle.find_class",
)  # fmt: skip
_watching = False


@functools.cache
def _install() -> None:
    """The hook, once: there is no taking it away."""
    sys.addaudithook(_watch)


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
            EVENTS.append(f"open {os.path.realpath(path)}{' to write' if writes else ''}")


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
    networks = {}
    for name, part in pipeline.components.items():
        if isinstance(part, torch.nn.Module):
            settings = _public(part.config)
            quantization = settings.pop("quantization_config").configuration_digest()
            networks[name] = [type(part).__name__, digest_of(part.state_dict()), settings, quantization]
    scheduler = [type(pipeline.scheduler).__name__, _public(pipeline.scheduler.config)]
    return _json([type(pipeline).__name__, networks, scheduler])


def _written(folder: Path, loader: Callable[[Path], Any]) -> Any:
    """The same as the files of a signed folder say, with diffusers' own defaults for what they do not."""
    import diffusers

    index = json.loads((folder / "model_index.json").read_text())
    networks = {}
    for name in dict.fromkeys((component(folder), denoiser(folder))):
        values = json.loads((folder / name / CONFIG).read_text())
        quantization = OctavoConfig.from_dict(values.pop("quantization_config")).configuration_digest()
        kind = getattr(diffusers, index[name][1])
        settings = _public(kind.from_config(_public(values)).config)
        tensors = digest_of(load_file(folder / name / WEIGHTS))
        networks[name] = [kind.__name__, tensors, settings, quantization]
    of_scheduler = getattr(diffusers, index["scheduler"][1])
    scheduler = [of_scheduler.__name__, _public(of_scheduler.from_pretrained(folder / "scheduler").config)]
    own = "DiTPipeline" if "vae" in networks else "DDIMPipeline"  # whose `from_pretrained` it is
    asked = index["_class_name"] if loader is load_octavo else own
    return _json([asked, networks, scheduler])


def _public(config: Any) -> dict[str, Any]:
    return {key: value for key, value in config.items() if not key.startswith("_")}


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
    writes_bytecode = sys.dont_write_bytecode
    sys.dont_write_bytecode = True  # of what is imported at first use
    _watching = True
    try:
        yield
    finally:
        _watching = False
        sys.dont_write_bytecode = writes_bytecode
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument(
        "--only", type=int, choices=range(4), help="of which folder; 2: with a quantized VAE, 3: by `best`"
    )
    arguments = parser.parse_args()
    from diffusers.utils import logging

    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    start, verdicts = time.perf_counter(), []
    with tempfile.TemporaryDirectory() as temporary:
        bench = Bench(Path(temporary))
        before = _peak_megabytes()
        for seed in range(arguments.first, arguments.first + arguments.count):
            for verdict in bench.run(seed, arguments.only):
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
