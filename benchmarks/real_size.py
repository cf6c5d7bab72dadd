"""Stable Diffusion's U-Nets at their real size on a small machine: memory, disk, seconds. Random weights.

    python benchmarks/real_size.py --work /tmp/real                     # all stages, each in a process of its own
    python benchmarks/real_size.py --work /tmp/xl --architecture sdxl --size 128 --stages make quantize
    python benchmarks/real_size.py --work /tmp/real --stages quantize   # one

Stages: `make` writes the float pipeline; `plan`: what is done before anything is collected; `quantize` on 8 pairs, peak
memory beside the float weights; `convert`: the first conversion for OpenVINO; `load`: the same from a warm cache;
`evaluate`: one evaluation beside torch eager fp32 and OpenVINO bf16 (fp32 without it), in turn. Peak memory is the
process's own maximum resident set, the libraries' included.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

STAGES = ("make", "plan", "quantize", "convert", "load", "evaluate")
GIB = 2**30


def make(work: Path, options: argparse.Namespace) -> dict[str, Any]:
    import torch

    from octavo.evaluation.peers.architectures import ARCHITECTURES

    torch.manual_seed(0)
    unet = ARCHITECTURES[options.architecture]()
    unet.register_to_config(sample_size=options.size)
    unet.save_pretrained(work / "float")
    parameters = sum(p.numel() for p in unet.parameters())
    return {"parameters": parameters, "float32_gib": 4 * parameters / GIB}


def plan(work: Path, options: argparse.Namespace) -> dict[str, Any]:
    """What is done before anything is collected: the network is traced in one evaluation."""
    import octavo
    from octavo.calibration.quantize import planned

    pipeline = _pipeline(work / "float")
    planned(pipeline, octavo.named_recipe(options.recipe, samples=8, steps=options.steps), batch_size=1)
    return {"peak_gib": _peak()}


def quantize(work: Path, options: argparse.Namespace) -> dict[str, Any]:
    import octavo

    pipeline = _pipeline(work / "float")
    start = time.perf_counter()
    changes = {name: True for name in ("sub_pixel", "pair_limit") if getattr(options, name)}
    recipe = octavo.named_recipe(
        options.recipe, samples=8, steps=options.steps, pairs_per_trajectory=4, **changes
    )
    quantized = octavo.quantize(pipeline, recipe, batch_size=1, workdir=work / "calibration")
    seconds = time.perf_counter() - start
    quantized.unet.save_pretrained(work / "int8")
    weights, stored = (_bytes(work / name) for name in ("float", "int8"))
    return {
        "seconds": seconds,
        "peak_gib": _peak(),
        "float32_gib": weights / GIB,
        "peak_over_weights_gib": _peak() - weights / GIB,
        "int8_over_float_on_disk": stored / weights,
    }


def convert(work: Path, options: argparse.Namespace) -> dict[str, Any]:
    """The first time: convert, compile, evaluate once."""
    begun = time.perf_counter()
    import diffusers

    import octavo

    _ = diffusers.UNet2DConditionModel, diffusers.DDIMScheduler  # imported when they are asked for
    start = time.perf_counter()
    pipeline = _pipeline(work / "int8")
    loaded = time.perf_counter()
    fast = octavo.accelerate(pipeline, precision="bf16")
    converted = time.perf_counter()
    rows = octavo.audit(fast)
    return {
        "import_seconds": start - begun,
        "load_seconds": loaded - start,
        "accelerate_seconds": converted - loaded,
        "peak_gib": _peak(),
        "layers_in_int8": f"{sum(row.ok for row in rows)} of {len(rows)}",
    }


load = convert


def evaluate(work: Path, options: argparse.Namespace) -> dict[str, Any]:
    import peers
    import torch

    import octavo
    from octavo.diffusion import first_call
    from octavo.evaluation.peers import Task, build
    from octavo.evaluation.speed import format_table, table, take_turns

    reference = _pipeline(work / "float")
    _, kwargs = first_call(reference, batch_size=1)
    precision = peers.precisions()[-1]
    fast = octavo.accelerate(_pipeline(work / "int8"), precision=precision)
    theirs, ours = f"openvino {'fp32' if precision == 'f32' else precision}", f"octavo int8, {precision}"
    with torch.inference_mode():
        built = build(("torch eager fp32", theirs), Task(reference.unet, kwargs, [kwargs]))
        engines = built.engines
        engines[ours] = lambda: fast.unet(**kwargs)
        timings = take_turns(engines, rounds=options.rounds, warm_up=1)
    rows = table(timings, "torch eager fp32")
    print(format_table(rows, "evaluation", "torch eager fp32"))
    ratio = timings[ours].ratio(timings[theirs])
    return {
        "speed": rows,
        f"over_{theirs.replace(' ', '_')}": ratio,
        "skipped": {**built.missing, **built.failed},
        "threads": peers.machine()["threads"],
    }


def _pipeline(folder: Path) -> Any:
    from diffusers import DDIMScheduler, DiTTransformer2DModel, UNet2DConditionModel

    import octavo  # noqa: F401 - quantized folders load after this import
    from octavo.evaluation.peers.architectures import BarePipeline

    name = json.loads((folder / "config.json").read_text())["_class_name"]
    cls = {"UNet2DConditionModel": UNet2DConditionModel, "DiTTransformer2DModel": DiTTransformer2DModel}[name]
    pipeline = BarePipeline(cls.from_pretrained(folder).eval(), DDIMScheduler())
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*.safetensors"))


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True, help="a folder with 20 GB of room")
    parser.add_argument("--stages", nargs="+", default=list(STAGES), choices=STAGES)
    parser.add_argument("--architecture", default="sd15")
    parser.add_argument("--size", type=int, default=64, help="of the latents")
    parser.add_argument("--steps", type=int, default=4, help="of the sampler while calibrating")
    parser.add_argument("--recipe", default="ptq4dm")
    parser.add_argument("--sub-pixel", action="store_true", help="whatever the recipe says")
    parser.add_argument("--pair-limit", action="store_true", help="one kernel a layer on CPUs without VNNI")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--name", default="real_size", help="of the file in results/")
    parser.add_argument("--inner", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.inner:
        (stage,) = options.stages
        print(json.dumps(globals()[stage](options.work, options)), flush=True)
        return
    import peers

    options.work.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "OCTAVO_CACHE": str(options.work / "cache")}
    given = {key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items()}
    figures: dict[str, Any] = {}
    for stage in options.stages:
        command = [sys.executable, *sys.argv, "--inner", "--stages", stage]
        start = time.perf_counter()
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
        *shown, last = done.stdout.strip().splitlines()
        figures[stage] = {**json.loads(last), "process_seconds": round(time.perf_counter() - start, 1)}
        print(*shown, f"{stage}: {figures[stage]}", sep="\n", flush=True)
        peers.save(options.name, {**given, "figures": figures})


if __name__ == "__main__":
    main()
