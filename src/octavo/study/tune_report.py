"""What `octavo tune` found, as text: the winner, its verification, the Pareto front."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def tune_text(results: Mapping[str, Any]) -> str:
    """The results of `octavo.study.tune.tune` for a terminal."""
    winner, metric = results["winner"], results["metric"]
    lines = [
        f"winner: {choice_name(winner)}, {winner['images_per_second']:.2f} images/s by the network alone, {metric} "
        f"{winner[metric]:.4g} (asked: {results['bar']:.4g} {'s' if results['goal']['kind'] == 'latency' else metric})",
        f"timesteps: {' '.join(map(str, winner['timesteps']))}",
    ]
    if metric == "psnr":
        lines.append(
            f"dB to full precision in {results['reference_steps']} steps of {results['reference_solver']}"
        )
    if results["goal"]["kind"] == "latency":
        lines.append(
            "seconds are the network's, measured in turn; decoding latents, encoding prompts and the solver's own "
            "arithmetic come on top"
        )
    if verified := results["verification"]:
        lines.append(
            f"on {verified['num_images']:,} other images: FD {_interval(verified['fd'])}, full precision in "
            f"{verified['reference_steps']} steps {_interval(verified['fd_reference'])}, difference "
            f"{_interval(verified['difference'])}"
        )
        if worse := not_excluded(results):
            lines.append(f"not excluded at 97.5 %: {worse}; more --verify-images tell more")
    lines += [
        f"not held on other images: {choice_name(row)}, {_failure(results, row['verification'])}"
        for row in results["rejected"]
    ]
    if results["verified"] is False:
        lines.append(
            f"NOT VERIFIED: the winner is {_failure(results, results['verification'])}; none of the "
            f"{1 + len(results['rejected'])} choices tried holds: give more --num-images, or more --steps"
        )
    lines += ["", f"{'images/s':>9}  {metric:>9}  front"]
    lines += [
        f"{row['images_per_second']:>9.2f}  {row[metric]:>9.4g}  {choice_name(row)}"
        for row in results["front"]
    ]
    if left_out := results.get("left_out"):
        lines += ["", *(f"left out: {line}" for line in left_out)]
    return "\n".join([*lines, "", f"pipeline: {results['pipeline']}"])


def not_excluded(results: Mapping[str, Any]) -> str:
    """How much worse than asked for the winner may still be: the upper end of the 95 % interval, "" where none is.

    For a number that is its FD, where the interval reaches beyond what was asked; else FD above the reference's.

    >>> estimate = {"value": -0.26, "low": -1.44, "high": 0.93}
    >>> told = {"difference": estimate, "fd_reference": {"value": 4.32}}
    >>> not_excluded({"goal": {"kind": "quality", "value": None}, "verification": told})
    "an FD above full precision's by up to 0.93, 22 % of that"
    """
    told, goal = results["verification"], results["goal"]
    if goal["kind"] == "quality" and goal["value"] is not None:
        high = told["fd"]["high"]
        return f"an FD of up to {high:.4g}, asked {goal['value']:.4g}" if (high or 0) > goal["value"] else ""
    high, reference = told["difference"]["high"], told["fd_reference"]["value"]
    if high is None or high <= 0:
        return ""
    share = f", {100 * high / reference:.0f} % of that" if reference > 0 else ""
    return f"an FD above full precision's by up to {high:.4g}{share}"


def choice_name(row: Mapping[str, Any]) -> str:
    """A choice in words: recipe, solver, timesteps and how many."""
    return f"{row['recipe']}, {row['solver']}, {row['spacing']}, {row['steps']} steps"


def _failure(results: Mapping[str, Any], verification: Mapping[str, Any]) -> str:
    """By how much a choice fails on other images."""
    if results["goal"]["value"] is None:
        return f"worse than full precision by {_interval(verification['difference'])}"
    return f"at FD {_interval(verification['fd'])}, asked {results['bar']:.4g}"


def _interval(estimate: Mapping[str, Any]) -> str:
    if estimate["low"] is None:
        return f"{estimate['value']:.4g}"
    return f"{estimate['value']:.4g} ({estimate['low']:.4g} to {estimate['high']:.4g})"
