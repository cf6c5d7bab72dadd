"""How the time and the memory of quantizing grow: with parameters, with image size, with samples. Random U-Nets.

    python benchmarks/growth.py                      # every point in a process of its own; about 10 minutes on one core
    python benchmarks/growth.py --axes samples --rounds 3
    python benchmarks/growth.py --recipe best                # into results/growth_best.json, docs/growth_best.svg

A U-Net of two levels (w and 2w channels, attention in the inner one), `ptq4dm` or another recipe, the sampler's 5
steps. Seconds are the processor's in `octavo.quantize`, on one thread: neighbours change them less than the time on the
wall, which is kept too. Memory is the process's resident set at its peak, less what it was before the network was made
(the libraries' own). Work in progress is in a temporary folder, which must not be one in memory. Written:
results/growth.json and docs/growth.svg; docs/growth.md reads the figures.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from html import escape
from pathlib import Path
from statistics import median
from typing import Any

WIDTHS = (48, 64, 96, 128, 192, 256, 384, 448)
SIZES = (16, 24, 32, 48, 64)
SAMPLES = (16, 32, 64, 128, 256, 512, 1024)
BASE = {"width": 48, "size": 16, "samples": 16}
"""What the two other quantities are while one grows."""
AXES = {
    "parameters": [{**BASE, "width": width} for width in WIDTHS],
    "pixels": [{**BASE, "size": size} for size in SIZES],
    "samples": [{**BASE, "samples": samples} for samples in SAMPLES],
}
STEPS = 5
UNITS = {"parameters": "parameters, millions", "pixels": "pixels of an image", "samples": "calibration pairs"}
DOCS = Path(__file__).resolve().parent.parent / "docs"


def measure(width: int, size: int, samples: int, recipe: str) -> dict[str, float]:
    """Quantize one network from nothing; called in a process of its own."""
    import torch

    torch.set_num_threads(1)
    from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel

    import octavo

    octavo.PTQ4DM()  # what is imported at first use is the libraries' too
    before = _memory("VmRSS")
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=size,
        block_out_channels=(width, 2 * width),
        layers_per_block=2,
        norm_num_groups=16,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )
    pipeline = DDIMPipeline(unet.eval(), DDIMScheduler())
    pipeline.set_progress_bar_config(disable=True)
    options = octavo.named_recipe(recipe, samples=samples, steps=STEPS)
    with tempfile.TemporaryDirectory() as folder:
        start, begin = time.perf_counter(), time.process_time()
        octavo.quantize(pipeline, options, batch_size=16, workdir=folder, progress=False)
        wall, seconds = time.perf_counter() - start, time.process_time() - begin
    parameters = sum(p.numel() for p in unet.parameters())
    return {
        "parameters": parameters,
        "pixels": size * size,
        "samples": samples,
        "seconds": seconds,
        "wall_seconds": wall,
        "megabytes": _memory("VmHWM") - before,
        "libraries_megabytes": before,
    }


def _memory(kind: str) -> float:
    """In MB; VmHWM is this process's peak, where `ru_maxrss` would start at its parent's."""
    return int(Path("/proc/self/status").read_text().split(f"{kind}:")[1].split()[0]) / 1024


def power(points: list[dict[str, Any]], axis: str, figure: str) -> float:
    """The exponent p, to 0.01, whose figure = a + b axis^p has the least squared error: 1 is linear growth."""

    def error(p: float) -> float:
        bent = [{axis: point[axis] ** p, figure: point[figure]} for point in points]
        start, slope, _ = line(bent, axis, figure)
        return sum((point[figure] - start - slope * point[axis]) ** 2 for point in bent)

    return min((k / 100 for k in range(10, 301)), key=error)


def line(points: list[dict[str, Any]], axis: str, figure: str) -> tuple[float, float, float]:
    """figure = a + b axis by least squares: a, b, and the largest distance from it as a share of the largest figure."""
    xs, ys = ([point[key] for point in points] for key in (axis, figure))
    x, y = sum(xs) / len(xs), sum(ys) / len(ys)
    slope = sum((a - x) * (b - y) for a, b in zip(xs, ys, strict=True)) / sum((a - x) ** 2 for a in xs)
    start = y - slope * x
    return start, slope, max(abs(b - start - slope * a) for a, b in zip(xs, ys, strict=True)) / max(ys)


def fits(points: list[dict[str, Any]], axis: str) -> dict[str, dict[str, float]]:
    """For seconds and megabytes: the line, and the exponent of what grows beyond the start."""
    found = {}
    for figure in ("seconds", "megabytes"):
        start, slope, off = line(points, axis, figure)
        found[figure] = {
            "exponent": power(points, axis, figure),
            "at_zero": round(start, 3),
            f"per_{axis}": float(f"{slope:.4g}"),
            "off_the_line": round(off, 4),
        }
    return found


def picture(axes: dict[str, list[dict[str, Any]]]) -> str:
    """Seconds above, memory below, a column for each axis; all scales are logarithmic: slopes are exponents."""
    from octavo.report.charts import log_axis, path, short

    wide, high, gap, left, top = 210, 170, 62, 52, 34
    style = (
        'svg{font:12px system-ui,"Segoe UI",Roboto,Helvetica,Arial,sans-serif;color:light-dark(#1c1b19,#e8e5de);'
        "color-scheme:light dark;fill:currentColor}.rule{stroke:light-dark(#dfdbd2,#313237);fill:none}"
        ".soft{fill:light-dark(#66625a,#a09b91)}.line{stroke:light-dark(#b34a00,#f2a14a);stroke-width:1.5;fill:none}"
        ".dot{fill:light-dark(#b34a00,#f2a14a)}"
    )
    parts = []
    for row, (figure, name) in enumerate((("seconds", "processor seconds"), ("megabytes", "memory, MB"))):
        values = [point[figure] for points in axes.values() for point in points]
        y = log_axis(min(values) / 1.3, max(values) * 1.3)
        for column, (axis, points) in enumerate(axes.items()):
            factor = 1e-6 if axis == "parameters" else 1
            xs, ys = [factor * point[axis] for point in points], [point[figure] for point in points]
            x = log_axis(min(xs) / 1.2, max(xs) * 1.2)
            x0, y0 = left + column * (wide + gap), top + row * (high + gap)
            for tick in y.labels:
                at = y0 + high * (100 - tick["at"]) / 100
                parts.append(f'<path class="rule" d="M{x0} {at:.1f}h{wide}"/>')
                parts.append(_text(x0 - 6, at + 4, tick["text"], "end"))
            for tick in x.labels:
                parts.append(_text(x0 + wide * tick["at"] / 100, y0 + high + 16, tick["text"], "middle"))
            parts.append(f'<path class="rule" d="M{x0} {y0 + high}h{wide}"/>')
            parts.append(_text(x0 + wide, y0 + high + 32, UNITS[axis], "end"))
            parts.append(_text(x0, y0 - 8, name, "start"))
            places = [tuple(map(float, place.split(","))) for place in path(x, y, xs, ys).split()]
            scaled = [(x0 + wide * a / 100, y0 + high * b / 100) for a, b in places]
            parts.append(
                f'<polyline class="line" points="{" ".join(f"{a:.1f},{b:.1f}" for a, b in scaled)}"/>'
            )
            for (a, b), value in zip(scaled, ys, strict=True):
                told = f"<title>{short(float(f'{value:.3g}'))}</title>"
                parts.append(f'<circle class="dot" cx="{a:.1f}" cy="{b:.1f}" r="3">{told}</circle>')
    size = f"{left + 3 * wide + 2 * gap + 20} {top + 2 * high + gap + 44}"
    told = "Seconds and memory of quantizing, by parameters, pixels and samples, on logarithmic scales"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {size}" role="img" aria-label="{told}">'
        f"<style>{style}</style>\n" + "\n".join(parts) + "\n</svg>\n"
    )


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" class="soft" text-anchor="{anchor}">{escape(text)}</text>'


def run(point: dict[str, Any], rounds: int) -> dict[str, Any]:
    """One point, `rounds` times: the median of its seconds, the largest of its peaks."""
    command = [sys.executable, __file__, "--point", json.dumps(point)]
    done = [
        json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
        for _ in range(rounds)
    ]
    seconds = [one["seconds"] for one in done]
    return {
        **done[0],
        "seconds": round(median(seconds), 3),
        "all_seconds": [round(second, 3) for second in seconds],
        "wall_seconds": round(median(one["wall_seconds"] for one in done), 3),
        "megabytes": round(max(one["megabytes"] for one in done), 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--axes", nargs="+", default=list(AXES), choices=list(AXES))
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--recipe", default="ptq4dm")
    parser.add_argument("--most", type=int, help="points of each axis, from the smallest on")
    parser.add_argument("--name", help="of the file in results/ (default: growth, or growth_RECIPE)")
    parser.add_argument(
        "--draw", action="store_true", help="picture alone, of what was measured: growth_RECIPE, _pixels, ..."
    )
    parser.add_argument("--point", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.point:
        print(json.dumps(measure(**json.loads(options.point))))
        return
    import peers

    name = "growth" if options.recipe == "ptq4dm" else f"growth_{options.recipe}"
    results, drawn = peers.RESULTS / f"{name}.json", DOCS / f"{name}.svg"
    if options.draw:
        files = [results, *(peers.RESULTS / f"{name}_{axis}.json" for axis in AXES)]
        records = [json.loads(file.read_text()) for file in files if file.is_file()]
        points = {axis: record["points"][axis] for record in records for axis in record["points"]}
        drawn.write_text(picture({axis: points[axis] for axis in AXES}), encoding="utf-8")
        print(json.dumps({axis: fits(points[axis], axis) for axis in AXES}, indent=2))
        return
    found: dict[str, list[dict[str, Any]]] = {axis: [] for axis in options.axes}
    for axis in options.axes:
        for point in AXES[axis][: options.most]:
            found[axis].append(run({**point, "recipe": options.recipe}, options.rounds))
            last = found[axis][-1]
            print(f"{axis} {last[axis]}: {last['seconds']:.1f} s, {last['megabytes']:.0f} MB", flush=True)
    slopes = {axis: fits(points, axis) for axis, points in found.items()}
    print(json.dumps(slopes, indent=2))
    given = {"recipe": options.recipe, "threads": 1, "rounds": options.rounds}
    peers.save(options.name or name, {**given, "fits": slopes, "points": found})
    if set(found) == set(AXES):
        drawn.write_text(picture(found), encoding="utf-8")
        print(drawn)


if __name__ == "__main__":
    main()
