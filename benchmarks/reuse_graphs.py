"""What a step costs that computes the whole network under reuse, and the memory: by one graph of it all, or by two.

    python benchmarks/reuse_graphs.py --model digits-int8 --depths 1 3         # a folder that octavo quantize made
    python benchmarks/reuse_graphs.py --depths 1 4 8 --pair-limit              # DDPM CIFAR-10 architecture

"whole": a graph of the whole network with its deep features, beside which the outer part's holds its weights again.
"inner, outer": a graph that ends with the deep features, and the outer part's, evaluated one behind the other, as
Octavo does. In turn in one process, f32 remainder. Memory: resident set after one evaluation of each, by a process for
each way, of which the converted graphs and kernels are in the cache; beside it the one without reuse.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import peers
import torch
from diffusers import DDIMPipeline, DDIMScheduler

import octavo
from octavo.diffusion import find_denoiser, first_call
from octavo.diffusion.reuse import ReusePlan
from octavo.evaluation.peers.architectures import architecture
from octavo.evaluation.speed import format_table, table, take_turns
from octavo.runtimes.openvino import OpenVINOExecutor
from octavo.runtimes.reuse.execute import ReusingExecutor
from octavo.runtimes.reuse.networks import DEEP, recording, reusing

WAYS = ("no reuse", "whole", "inner, outer")


def evaluators(denoiser: Any, way: str, depth: int, kwargs: dict[str, Any], cache: Path) -> dict[str, Any]:
    """Step that computes the whole network, step that reuses -> a function that makes one."""
    settings: dict[str, Any] = {"precision": "f32", "cache": cache}
    if way == "no reuse":
        plain = OpenVINOExecutor(denoiser, **settings)
        return {"whole": lambda: plain(**kwargs, return_dict=False)}
    if way == "whole":
        whole = OpenVINOExecutor(recording(denoiser, depth), **settings)
        outer = OpenVINOExecutor(reusing(denoiser, depth), **settings)
        deep = whole(**kwargs, return_dict=False)[-1]
        return {
            "whole": lambda: whole(**kwargs, return_dict=False),
            "outer": lambda: outer(**kwargs, **{DEEP: deep}, return_dict=False),
        }
    two = ReusingExecutor(denoiser, plan=ReusePlan((900.0, 800.0), (1, 0), depth), **settings)
    deep = two._whole(**kwargs, return_dict=False)[-1]
    return {
        "whole": lambda: two._whole(**kwargs, return_dict=False),
        "outer": lambda: two._outer(**kwargs, **{DEEP: deep}, return_dict=False),
    }


def resident(model: str, way: str, depth: int, batch_size: int, cache: str) -> dict[str, float]:
    """Of this process, in MB, after one evaluation of each step; called in one of its own."""
    pipeline = octavo.load(model)
    _, kwargs = first_call(pipeline, batch_size=batch_size)
    with torch.inference_mode():
        kept = evaluators(find_denoiser(pipeline)[1], way, depth, kwargs, Path(cache))
        for evaluate in kept.values():
            evaluate()
    lines = dict(
        line.split(":") for line in Path("/proc/self/status").read_text().splitlines() if ":" in line
    )
    return {key: int(lines[key].split()[0]) / 1024 for key in ("VmRSS", "RssAnon")}


def measured(model: str, way: str, depth: int, batch_size: int, cache: Path) -> dict[str, float]:
    arguments = (model, way, depth, batch_size, str(cache))
    code = f"import json, reuse_graphs; print(json.dumps(reuse_graphs.resident(*{arguments})))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parent, check=True, capture_output=True, text=True
    )
    found: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model", help="a quantized pipeline's folder; without it DDPM CIFAR-10's architecture"
    )
    parser.add_argument("--depths", type=int, nargs="+", default=[1])
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--pair-limit", action="store_true", help="one kernel a layer on CPUs without VNNI")
    parser.add_argument("--name", default="reuse_graphs", help="of the file in results/")
    options = parser.parse_args()
    results: dict[str, Any] = {**vars(options), "depth": {}}
    with tempfile.TemporaryDirectory() as folder:
        cache, model = Path(folder) / "cache", options.model
        if model is None:
            model = str(Path(folder) / "int8")
            recipe = octavo.named_recipe(
                "best",
                samples=8,
                steps=4,
                rounding="nearest",
                float_activations=0.0,
                pair_limit=options.pair_limit,
            )
            pipeline = DDIMPipeline(architecture("ddpm-cifar10").unet, DDIMScheduler())
            octavo.quantize(pipeline, recipe, batch_size=8, progress=False).save_pretrained(model)
        pipeline = octavo.load(model)
        _, kwargs = first_call(pipeline, batch_size=options.batch_size)
        for depth in options.depths:
            with torch.inference_mode():
                engines = {
                    f"{way}: {step}": evaluate
                    for way in WAYS
                    for step, evaluate in evaluators(
                        find_denoiser(pipeline)[1], way, depth, kwargs, cache
                    ).items()
                }
                timings = take_turns(engines, rounds=options.rounds)
            rows = table(timings, "no reuse: whole")
            memory = {way: measured(model, way, depth, options.batch_size, cache) for way in WAYS}
            results["depth"][depth] = {"speed": rows, "resident_mb": memory}
            print(f"depth {depth}\n{format_table(rows, 'evaluation', 'no reuse: whole')}")
            for way, found in memory.items():
                print(f"  {way}: {found['VmRSS']:.0f} MB resident, {found['RssAnon']:.0f} of no file")
    peers.save(options.name, results)


if __name__ == "__main__":
    main()
