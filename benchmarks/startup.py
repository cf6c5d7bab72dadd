"""Start-up and memory: imports, load from a warm cache to the first evaluation, resident memory. In turn.

    python benchmarks/startup.py

Each figure is of a process of its own, the kinds in turn, so many rounds, timed inside Python. "import": what the kind
imports, diffusers' classes among it. "load": from the folder on disk to the result of the first evaluation, these
imports left out: torch eager fp32 from the float folder, OpenVINO f32
and bf16 from an IR with its own kernel cache (no Octavo, no torch), Octavo int8 from its folder with a warm cache;
"first image": to the end of ten DDIM steps. DDPM CIFAR-10 architecture, random weights, batch 1. Memory in MB: resident
set at the end, how much of it is no page of a file (which the system may take back), and the peak.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

IMPORTS = ("torch", "diffusers", "octavo", "torch, octavo")
CLASSES = "; from diffusers import UNet2DModel, DDIMScheduler, DDIMPipeline"
MEASURE = """
import json, time
def memory():
    lines = dict(line.split(":") for line in open("/proc/self/status") if ":" in line)
    return [round(int(lines[key].split()[0]) / 1024) for key in ("VmRSS", "VmHWM", "RssAnon")]
start = time.perf_counter()
{imports}
imported = time.perf_counter()
{body}
done = time.perf_counter()
print(json.dumps(dict(import_s=imported - start, load_s=done - imported, memory_mb=memory())))
"""
INT8 = """
pipeline = DDIMPipeline(UNet2DModel.from_pretrained("{work}/int8"), DDIMScheduler())
fast = octavo.accelerate(pipeline, precision="f32")
with torch.inference_mode():
    fast.unet(torch.zeros(1, 3, 32, 32), torch.tensor([500]))
"""
IMAGE = """
pipeline = DDIMPipeline(UNet2DModel.from_pretrained("{work}/{kind}"), DDIMScheduler())
pipeline.set_progress_bar_config(disable=True)
pipeline = {fast}
pipeline(generator=torch.Generator().manual_seed(0), num_inference_steps=10)
"""
EAGER = """
unet = UNet2DModel.from_pretrained("{work}/float")
with torch.inference_mode():
    unet(torch.zeros(1, 3, 32, 32), torch.tensor([500]))
"""
ENGINE = """
core = openvino.Core()
settings = {{"CACHE_DIR": "{work}/engine", "INFERENCE_PRECISION_HINT": "{precision}", "PERFORMANCE_HINT": "LATENCY"}}
model = core.compile_model("{work}/float.xml", "CPU", settings)
model([numpy.zeros((1, 3, 32, 32), numpy.float32), numpy.array([500])])
"""


def prepare(work: Path, pair_limit: bool) -> None:
    import openvino
    import peers
    import torch

    import octavo
    from octavo.diffusion import first_call
    from octavo.evaluation.peers.architectures import architecture

    pipeline = architecture("ddpm-cifar10")
    pipeline.unet.save_pretrained(work / "float")
    args, kwargs = first_call(pipeline, batch_size=1)
    openvino.save_model(peers.openvino_float(pipeline.unet, args, kwargs), work / "float.xml", False)
    recipe = octavo.PTQ4DM(samples=8, steps=4, metric="minmax", pair_limit=pair_limit)
    with torch.inference_mode():
        octavo.quantize(pipeline, recipe, batch_size=8, progress=False).unet.save_pretrained(work / "int8")


def measured(imports: str, body: str, environment: dict[str, str]) -> dict[str, Any]:
    code = MEASURE.format(imports=imports, body=body)
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, check=True, capture_output=True, text=True
    )
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--pair-limit", action="store_true", help="one kernel a layer on CPUs without VNNI")
    parser.add_argument("--name", default="startup", help="of the file in results/")
    options = parser.parse_args()
    import peers

    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        prepare(work, options.pair_limit)
        environment = {**os.environ, "OCTAVO_CACHE": str(work / "cache")}
        environment.pop(
            "PYTHONDONTWRITEBYTECODE", None
        )  # Octavo compiled anew by each process is not what is asked
        kinds = {f"import {name}": (f"import {name}", "") for name in IMPORTS}
        kinds["torch eager fp32"] = (f"import torch{CLASSES}", EAGER.format(work=work))
        for precision in peers.precisions():
            body = ENGINE.format(work=work, precision=precision)
            kinds[f"openvino {precision}"] = ("import numpy, openvino", body)
        kinds["octavo int8"] = (f"import torch, octavo{CLASSES}", INT8.format(work=work))
        for name, kind, fast in (
            ("torch eager fp32", "float", "pipeline"),
            ("octavo int8", "int8", 'octavo.accelerate(pipeline, precision="f32")'),
        ):
            body = IMAGE.format(work=work, kind=kind, fast=fast)
            libraries = "torch" if kind == "float" else "torch, octavo"
            kinds[f"{name}, first image"] = (f"import {libraries}{CLASSES}", body)
        for imports, body in kinds.values():
            measured(imports, body, environment)  # fills the caches of files and of kernels
        found: dict[str, list[dict[str, Any]]] = {kind: [] for kind in kinds}
        for _ in range(options.rounds):
            for kind, (imports, body) in kinds.items():
                found[kind].append(measured(imports, body, environment))
    rows = {kind: row(runs) for kind, runs in found.items()}
    print(
        f"{'':30}{'import, s':>22}{'load and evaluate, s':>24}{'resident':>10}{'no file':>10}{'peak, MB':>10}"
    )
    for kind, of_kind in rows.items():
        shown = [
            f"{m:.2f} ({low:.2f}-{high:.2f})" for m, low, high in (of_kind["import_s"], of_kind["load_s"])
        ]
        memory = "".join(f"{of_kind[f'{key}_mb']:>10.0f}" for key in ("rss", "anon", "peak"))
        print(f"{kind:30}{shown[0]:>22}{shown[1]:>24}{memory}")
    over = rows["import torch, octavo"]["import_s"][0] - rows["import torch"]["import_s"][0]
    print(f"import octavo over torch's own: {over:.2f} s")
    peers.save(
        options.name, {"rounds": options.rounds, "rows": rows, "import_octavo_over_torch_s": round(over, 3)}
    )


def row(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians with quartiles of seconds, medians of MB."""
    figures: dict[str, Any] = {}
    for key in ("import_s", "load_s"):
        values = [run[key] for run in runs]
        low, middle, high = statistics.quantiles(values, n=4) if len(values) > 1 else values * 3
        figures[key] = [round(value, 3) for value in (middle, low, high)]
    for key, place in (("rss_mb", 0), ("peak_mb", 1), ("anon_mb", 2)):
        figures[key] = statistics.median(run["memory_mb"][place] for run in runs)
    return figures


if __name__ == "__main__":
    main()
