"""Second-order rounding whose descent keeps its gradient, in float32, beside one in float64 that makes it anew.

    python benchmarks/rounding.py
    python benchmarks/rounding.py --shapes 1280x5120 --threads 1

Layers [output channels, inputs] with random weights of 8 and 4 bits, and second moments of correlated inputs with means
away from zero, rounded by both in turn in one process. Seconds: median with quartiles; the ratio is of the same round.
Beside them what both leave of the output's error, computed in float64, and how many integers differ.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

import peers
import torch

from octavo.evaluation.speed import format_table, table, take_turns
from octavo.quantization import QuantSpec, gptq, round_nearest

KEPT, ANEW = "gradient kept, float32", "gradient anew, float64"


def descend_anew(
    weight: torch.Tensor,
    integers: torch.Tensor,
    moment: torch.Tensor,
    scale: torch.Tensor,
    spec: QuantSpec,
    sweeps: int,
) -> torch.Tensor:
    """The same steps with a gradient computed at the begin of each sweep, which only columns still to come follow."""
    weight, moment, scale = weight.double(), moment.double(), scale.double()
    values = integers.T.double().contiguous()
    for _ in range(sweeps):
        gradient = moment @ (values * scale.T - weight.T)
        for first in range(0, len(values), gptq.BLOCK):
            last = min(first + gptq.BLOCK, len(values))
            changes = torch.zeros(last - first, values.shape[1], dtype=torch.float64)
            for k in range(first, last):
                target = values[k] - gradient[k] / moment[k, k] / scale.T[k]
                best = target.round_().clamp_(spec.qmin, spec.qmax)
                changes[k - first] = (best - values[k]) * scale.T[k]
                values[k] = best
                gradient[k + 1 : last].addr_(moment[k, k + 1 : last], changes[k - first])
            gradient[last:] += moment[last:, first:last] @ changes
    return values.T.to(torch.int8).contiguous()


def problem(channels: int, inputs: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(channels, inputs, generator=generator) / inputs**0.5
    mixing = torch.randn(inputs, inputs, generator=generator) / inputs**0.5
    x = torch.randn(2 * inputs, inputs, generator=generator) @ (torch.eye(inputs) + mixing)
    x += torch.randn(inputs, generator=generator)
    return weight, x.T @ x / len(x)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", nargs="+", default=["320x2880", "1280x1280", "1280x5120"])
    parser.add_argument("--bits", nargs="+", type=int, default=[8, 4])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    ours = gptq._descend
    rows: list[dict[str, Any]] = []
    for shape in options.shapes:
        weight, moment = problem(*map(int, shape.split("x")))
        for bits in options.bits:
            spec = QuantSpec(bits, symmetric=True, granularity="per_channel")
            _, qparams = round_nearest(weight, spec, "minmax")

            def rounded(
                descend: Any,
                weight: Any = weight,
                moment: Any = moment,
                qparams: Any = qparams,
                spec: Any = spec,
            ) -> torch.Tensor:
                gptq._descend = descend
                try:
                    return gptq.round_layer(weight, moment[None], 1, qparams, spec).integers
                finally:
                    gptq._descend = ours

            engines = {KEPT: lambda f=rounded: f(ours), ANEW: lambda f=rounded: f(descend_anew)}
            made = {name: run() for name, run in engines.items()}
            errors = {
                name: float(gptq.output_error(weight, q, qparams.scale, moment.double()).sum())
                for name, q in made.items()
            }
            times = table(take_turns(engines, rounds=options.rounds, warm_up=0), ANEW)
            rows.append(
                {
                    "shape": shape,
                    "bits": bits,
                    "times": times,
                    "error_ratio": errors[KEPT] / errors[ANEW],
                    "integers_that_differ": float((made[KEPT] != made[ANEW]).float().mean()),
                }
            )
            told = {key: rows[-1][key] for key in ("error_ratio", "integers_that_differ")}
            print(
                f"{shape}, {bits} bits: {json.dumps(told)}\n{format_table(times, 'rounding', ANEW)}",
                flush=True,
            )
    peers.save("rounding", {**vars(options), "layers": rows})


if __name__ == "__main__":
    main()
