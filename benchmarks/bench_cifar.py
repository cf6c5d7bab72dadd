"""One evaluation of the DDPM CIFAR-10 U-Net: ours against torch eager, OpenVINO and NNCF, in turn in one process.

python benchmarks/bench_cifar.py            # batch 8, then batch 1; needs the `bench` extra (NNCF)
"""

from __future__ import annotations

import argparse

import peers
import torch

import octavo
from octavo.calibration import named_recipe
from octavo.diffusion import find_denoiser, first_call
from octavo.evaluation.peers.architectures import architecture
from octavo.evaluation.peers.calibration import calibration_calls
from octavo.evaluation.peers.fidelity import fidelity, keeping
from octavo.evaluation.speed import format_table, table, take_turns
from octavo.runtimes import audit, executor_of

BASELINE = "torch eager fp32"


def bench(batch_size: int, rounds: int) -> dict[str, object]:
    pipeline = architecture("ddpm-cifar10")
    recipe = named_recipe("best", samples=32, steps=4, pairs_per_trajectory=4)
    quantized = octavo.quantize(pipeline, recipe, batch_size=8, progress=False)
    unet = pipeline.unet
    args, kwargs = first_call(pipeline, batch_size=batch_size)
    calls = [((), call) for call in calibration_calls(pipeline, images=8, batch_size=batch_size, steps=4)]

    def eager() -> object:
        return unet(*args, **kwargs)

    def eager_bf16() -> object:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return unet(*args, **kwargs)

    engines = {BASELINE: eager, "torch eager bf16": eager_bf16}
    for precision in peers.precisions():
        model = peers.openvino_float(unet, args, kwargs)
        for cut, parts in peers.ways_to_cut(batch_size).items():
            engines[f"openvino {precision}{cut}"] = _bound(
                peers.Compiled(model, precision, unet.forward, parts), args, kwargs
            )
    for name, model in peers.nncf_models(unet, calls).items():
        for precision in peers.precisions():
            for cut, parts in peers.ways_to_cut(batch_size).items():
                compiled = peers.Compiled(model, precision, unet.forward, parts)
                engines[f"{name}, {precision}{cut}"] = _bound(compiled, args, kwargs)
    audited = {}
    for precision in (*peers.precisions(), "auto"):
        fast = octavo.accelerate(quantized, precision=precision, batch_size=batch_size)
        _, denoiser = find_denoiser(fast)
        engines[f"octavo int8, {precision}"] = _bound(denoiser, args, kwargs)
        rows = audit(fast)
        audited[precision] = f"{sum(row.ok for row in rows)} of {len(rows)}"
        executor = executor_of(fast)
        assert executor is not None
        chosen = {graph.precision for graph in executor.graphs.values()}
    with torch.inference_mode():
        timed, outputs = keeping(engines)
        timings = take_turns(timed, rounds=rounds)
    found = fidelity(outputs, BASELINE)
    rows = [{**row, **found[str(row["engine"])]} for row in table(timings, BASELINE)]
    nncf_best = min(
        (name for name in timings if name.startswith("nncf")), key=lambda name: timings[name].median
    )
    ours = {
        "auto": "octavo int8, auto",
        "fastest": min(
            (name for name in timings if name.startswith("octavo")), key=lambda name: timings[name].median
        ),
    }
    over_nncf = {
        what: {
            "octavo": name,
            "ratio_low_high": [round(x, 3) for x in timings[name].ratio(timings[nncf_best])],
        }
        for what, name in ours.items()
    }
    print(
        f"\nDDPM CIFAR-10 U-Net, batch {batch_size}, {rounds} rounds\n{format_table(rows, 'evaluation', BASELINE)}"
    )
    for what in over_nncf.values():
        ratio, low, high = what["ratio_low_high"]
        print(f"{what['octavo']} over {nncf_best}: {ratio:.2f}x ({low:.2f}-{high:.2f}); auto chose {chosen}")
    return {
        "batch_size": batch_size,
        "recipe": "best",
        "rounds": rounds,
        "engines": rows,
        "octavo_auto_chose": sorted(chosen),
        "octavo_over_best_nncf": {"nncf": nncf_best, **over_nncf},
        "layers_in_int8": audited,
    }


def _bound(run: object, args: tuple[object, ...], kwargs: dict[str, object]) -> peers.Engine:
    return lambda: run(*args, **kwargs)  # type: ignore[operator]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[8, 1])
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    peers.save("cifar", {"results": [bench(size, options.rounds) for size in options.batch_sizes]})
