"""Recipe, solver, timesteps and their number, chosen together on the network that will run."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from octavo.calibration import named_recipe
from octavo.checkpoint import save_pipeline
from octavo.diffusion import find_denoiser, probe
from octavo.errors import OctavoError
from octavo.evaluation.features import extract
from octavo.evaluation.frechet import frechet_difference, frechet_estimate
from octavo.evaluation.generate import check_makes_images, generate, to_uint8
from octavo.evaluation.trajectory_search import Target
from octavo.files import check_place, write_json
from octavo.fingerprint import versions
from octavo.quantization import quantized_layers
from octavo.study.tune_networks import DP, FLOAT, Networks, make_networks
from octavo.study.tune_options import Goal, TuneOptions
from octavo.study.tune_plan import Plan, make_plan
from octavo.study.tune_quality import Quality
from octavo.study.tune_search import Choice, Curve, best_within, fastest, pareto_front
from octavo.work import held

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

PIPELINE, WORK, RESULTS = "pipeline", "work", "tune.json"
VERIFY_STREAM = 6 << 28
PACKAGES = ("octavo", "torch", "diffusers", "openvino", "numpy")


def tune(
    pipeline: DiffusionPipeline,
    goal: Goal,
    out: str | os.PathLike[str],
    *,
    target: Target | None = None,
    options: TuneOptions | None = None,
    calibration: Mapping[str, Any] | None = None,
    seed: int = 0,
    batch_size: int = 16,
    inputs: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Choose, verify on other images, and write the winner to `out`/pipeline, an ordinary diffusers folder.

    The time of a choice is its evaluations times the measured seconds of one, known before anything is sampled. So for
    a quality the fastest good choice is found by bisection over steps and by bounds between curves (`fastest`), and for
    a latency only the most steps that fit are sampled (`best_within`). Every score is from the noise of seed + k in a
    stream of its own; the winner and the reference are compared once more on a third.

    `target`: features and statistics for the metric fd. Returns what `out`/tune.json holds: the winner, every score,
    the Pareto front, the verification. Killed and called again it goes on. Raises `OctavoError` if nothing reaches the
    goal, with the best that was found, or for arguments that do not fit.
    """
    options, out = options or TuneOptions(), Path(out)
    _check(pipeline, goal, options, target)
    for recipe in {*options.recipes} - {FLOAT}:
        named_recipe(recipe, **(calibration or {}))
    plan = make_plan(pipeline, options, inputs)
    check_place(out / RESULTS)
    (out / WORK).mkdir(parents=True, exist_ok=True)
    with held(out / WORK, f"{out}: another process tunes here; wait for it, or choose another folder"):
        networks = make_networks(
            pipeline,
            tuple(dict.fromkeys((*options.recipes, FLOAT))),
            out / WORK,
            calibration=calibration or {},
            seed=seed,
            batch_size=batch_size,
            inputs=inputs,
            search=options.search,
            progress=progress,
        )
        own = {"seed": seed, "batch_size": batch_size, "inputs": inputs, "progress": progress}
        run = _Tuning(networks, plan, goal, options, target, out, own)
        return run.finish()


class _Tuning:
    def __init__(
        self,
        networks: Networks,
        plan: Plan,
        goal: Goal,
        options: TuneOptions,
        target: Target | None,
        out: Path,
        own: Mapping[str, Any],
    ) -> None:
        self.networks, self.plan, self.goal, self.options = networks, plan, goal, options
        self.out, self.own = out, dict(own)
        self.reference = networks.fast[FLOAT]
        images = {**self.own, "num_images": options.num_images}
        self.target = target
        self.quality = Quality(
            options.metric,
            out / WORK,
            target=target,
            reference=(self.reference, options.reference_steps),
            **images,
        )
        self.scored: dict[Choice, float] = {}

    def finish(self) -> dict[str, Any]:
        options = self.options
        curves = [
            self.networks.curve(Curve(recipe, solver, spacing), evaluations)
            for recipe in options.recipes
            for (solver, spacing), evaluations in self.plan.evaluations.items()
        ]
        bar = self._bar()
        if self.goal.kind == "quality":
            winner = fastest(curves, lambda choice: self.quality.badness(self.score(choice)) <= bar)
        else:
            winner = best_within(curves, bar, lambda choice: self.quality.badness(self.score(choice)))
        if winner is None:
            raise OctavoError(f"target: nothing reaches it; {self._nearest(curves)}")
        results = self._results(winner, bar)
        plain = self.networks.on(winner.curve, winner.steps, plain=True)
        save_pipeline(plain, self.out / PIPELINE)
        write_json(self.out / RESULTS, results)
        return results

    def score(self, choice: Choice) -> float:
        if choice not in self.scored:
            pipeline = self.networks.on(choice.curve, choice.steps)
            self.scored[choice] = self.quality(pipeline, choice.steps, f"{choice.curve}, {choice.steps}")
        return self.scored[choice]

    def _bar(self) -> float:
        """What badness may be at most, or the seconds of an image."""
        if self.goal.value is None:
            return self.quality.badness(
                self.quality(self.reference, self.options.reference_steps, "reference")
            )
        return self.goal.value if self.goal.kind == "latency" else self.quality.badness(self.goal.value)

    def _nearest(self, curves: Sequence[Sequence[Choice]]) -> str:
        if self.scored:
            choice = min(self.scored, key=lambda choice: self.quality.badness(self.scored[choice]))
            return f"the nearest is {self.scored[choice]:.4g} ({choice.curve}, {choice.steps} steps)"
        times = [curve[0].seconds for curve in curves if curve]
        if times:
            return f"the fastest takes {min(times):.4g} s an image"
        return f"nothing fits the pipeline ({'; '.join(self.networks.left_out[:3])})"

    def _results(self, winner: Choice, bar: float) -> dict[str, Any]:
        front = pareto_front([(c, self.quality.badness(s)) for c, s in self.scored.items()])
        return {
            "goal": asdict(self.goal),
            "bar": bar if self.goal.kind == "latency" else self.quality.badness(bar),
            "metric": self.options.metric,
            "num_images": self.options.num_images,
            "winner": {
                **self._row(winner),
                "timesteps": list(self.networks.trajectory(winner.curve, winner.steps).timesteps),
            },
            "front": [self._row(choice) for choice, _ in front],
            "scored": [self._row(choice) for choice in sorted(self.scored, key=lambda c: c.seconds)],
            "left_out": [*self.plan.left_out, *self.networks.left_out],
            "reference": self._reference_row(),
            "seconds_of_an_evaluation": self.networks.seconds,
            "verification": self._verified(winner),
            "pipeline": str(self.out / PIPELINE),
            "made": {"seed": self.own["seed"], "versions": versions(*PACKAGES)},
        }

    def _row(self, choice: Choice) -> dict[str, Any]:
        return {
            **asdict(choice.curve),
            "steps": choice.steps,
            "seconds": choice.seconds,
            "images_per_second": 1 / choice.seconds,
            self.options.metric: self.scored[choice],
        }

    def _reference_row(self) -> dict[str, Any] | None:
        """The reference as a choice is told, where its FD was measured: to be the bar."""
        if self.goal.kind != "quality" or self.goal.value is not None:
            return None
        steps = self.options.reference_steps
        inputs = self.own["inputs"]
        evaluations = probe(self.networks.plain[FLOAT], num_inference_steps=steps, inputs=inputs).num_steps
        return {
            "steps": steps,
            "images_per_second": 1 / (evaluations * self.networks.seconds[FLOAT]),
            self.options.metric: self._bar(),
        }

    def _verified(self, winner: Choice) -> dict[str, Any] | None:
        """FD of the winner and of the reference on images that nothing was chosen by, and their paired difference."""
        if self.target is None or self.target.statistics is None:
            return None
        pooled = []
        for pipeline, steps, label in (
            (self.networks.on(winner.curve, winner.steps), winner.steps, "verify"),
            (self.reference, self.options.reference_steps, "verify, reference"),
        ):
            images = generate(
                pipeline,
                self.options.verify_images,
                steps=steps,
                label=label,
                **{**self.own, "seed": self.own["seed"] + VERIFY_STREAM},
            )
            pooled.append(extract(self.target.extractor, to_uint8(images)).pooled)
        ours, theirs = pooled
        real = self.target.statistics
        difference = frechet_difference(ours, theirs, real, paired=True)
        return {
            "num_images": self.options.verify_images,
            "fd": frechet_estimate(ours, real).as_json(),
            "fd_reference": frechet_estimate(theirs, real).as_json(),
            "difference": difference.as_json(),
            "reference_steps": self.options.reference_steps,
        }


def _check(pipeline: DiffusionPipeline, goal: Goal, options: TuneOptions, target: Target | None) -> None:
    check_makes_images(pipeline)
    if any(True for _ in quantized_layers(find_denoiser(pipeline)[1])):
        raise OctavoError("pipeline: is quantized already; give the full-precision model")
    if options.metric == "fd" and (target is None or target.statistics is None):
        raise OctavoError("target: the metric fd needs real images (--real-images); or take --metric psnr")
    if options.metric == "psnr" and goal.value is None:
        raise OctavoError("target: quality=reference is for fd; give the PSNR in dB that is good enough")
