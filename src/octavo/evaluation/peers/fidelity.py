"""Fidelity beside speed: how far what each engine returned while it was timed is from full precision."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

MOST_BELOW_BEST = 0.5
"""dB that a recipe may lose against `best` for its speed to count."""


def keeping(engines: Mapping[str, Callable[[], Any]]) -> tuple[dict[str, Callable[[], Any]], dict[str, Any]]:
    """The engines, and a dictionary in which each leaves what it returned last."""
    outputs: dict[str, Any] = {}

    def kept(name: str, run: Callable[[], Any]) -> Callable[[], Any]:
        def call() -> Any:
            outputs[name] = run()
            return outputs[name]

        return call

    return {name: kept(name, run) for name, run in engines.items()}, outputs


def fidelity(
    outputs: Mapping[str, Any], baseline: str, peak: float | None = None
) -> dict[str, dict[str, Any]]:
    """name -> {"psnr", "relative_error"} of each output y against the baseline's y*, JSON-safe.

        psnr = 10 log10(peak^2 / mean (y - y*)^2) in dB,        relative_error = ||y - y*|| / ||y*||

    outputs  whatever engines return: the first tensor in it, [N, ...].
    peak     1 for images in [0, 1]; None, for predictions and latents: max y* - min y*.

    None stands for what is no number: the PSNR of what is equal, and both where y* is constant or not finite.

    >>> y = torch.tensor([0.0, 1.0])
    >>> fidelity({"fp32": y, "int8": (y + 0.1,)}, "fp32")["int8"]
    {'psnr': 20.0, 'relative_error': 0.14142}
    """
    tensors = {name: first_tensor(output) for name, output in outputs.items()}
    exact = tensors[baseline]
    peak = float(exact.max() - exact.min()) if peak is None else peak
    found = {}
    for name, tensor in tensors.items():
        squared = float((tensor - exact).square().mean())
        ratio = float((tensor - exact).norm() / exact.norm())
        decibels = 10 * math.log10(peak**2 / squared) if squared > 0 and 0 < peak < math.inf else math.nan
        found[name] = {"psnr": _number(decibels, 3), "relative_error": _number(ratio, 5)}
    return found


def below_best(psnr: float | None, best: float | None) -> dict[str, Any]:
    """What the recipe `best` reaches, and whether another gives up more than MOST_BELOW_BEST for its speed.

    >>> below_best(39.25, 40.0)
    {'psnr': 40.0, 'below': 0.75, 'allowed': 0.5, 'holds': False}
    >>> below_best(39.25, None)["holds"] is None
    True
    """
    known = psnr is not None and best is not None
    below = round(best - psnr, 3) if psnr is not None and best is not None else None
    holds = bool(below <= MOST_BELOW_BEST) if known and below is not None else None
    return {"psnr": best, "below": below, "allowed": MOST_BELOW_BEST, "holds": holds}


def first_tensor(output: Any) -> Tensor:
    """The first tensor of whatever an engine returns, float64."""
    while not hasattr(output, "dtype"):
        output = next(iter(output.values())) if hasattr(output, "values") else output[0]
    return torch.as_tensor(output).double()


def _number(value: float, digits: int) -> float | None:
    """To so many significant decimals, the same in every JSON; None for NaN and infinity."""
    return (
        float(f"{value:.{digits}f}" if digits == 3 else f"{value:.{digits}g}")
        if math.isfinite(value)
        else None
    )
