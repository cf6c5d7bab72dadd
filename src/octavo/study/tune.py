"""Recipe, solver, timesteps and their number, chosen together on the network that will run."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from octavo.calibration import named_recipe
from octavo.diffusion import find_denoiser, probe
from octavo.diffusion.samplers import with_scheduler
from octavo.diffusion.trajectories.bound import plain_name
from octavo.diffusion.trajectories.use import without_trajectory
from octavo.diffusion.trajectories.visit import check_visits_all
from octavo.errors import OctavoError
from octavo.evaluation.generate import check_makes_images, whole_batches
from octavo.evaluation.target import Target
from octavo.files import write_json
from octavo.fingerprint import versions
from octavo.quantization import quantized_layers
from octavo.study.tune_cost import cost_at_most
from octavo.study.tune_networks import DP, FLOAT, Networks, make_networks
from octavo.study.tune_options import Goal, TuneOptions
from octavo.study.tune_plan import Plan, adds_noise, make_plan
from octavo.study.tune_quality import Quality
from octavo.study.tune_search import Choice, Curve, Curves, best_within, fastest, most_asked, pareto_front
from octavo.study.tune_spending import Spending
from octavo.study.tune_verify import VERIFY_AT_MOST, Verification
from octavo.study.tune_winner import PIPELINE, RESULTS, check_winner_place, save_winner
from octavo.work import held

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

WORK = "work"
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

    The time of a choice is its evaluations times the measured seconds of one, known before anything is sampled; what a
    pipeline does besides (decoding latents, encoding prompts, the solver's own arithmetic) is not in it. So for a
    quality the fastest good choice is found by bisection over steps and by bounds between curves (`fastest`), and for a
    latency only the most steps that fit are sampled (`best_within`). Every score is from the noise of seed + k in a
    stream of its own; the winner and the reference are compared once more on a third (`Verification`). A winner that
    does not hold there gives way to the next slower choice that was scored as good, twice at most; where none holds,
    "verified" is False and the one with the least FD is written.

    A trajectory that the pipeline has already is put aside. `target`: features and statistics for the metric fd.
    Returns what `out`/tune.json holds: the winner, every score, the Pareto front, the verification, what was left out,
    the cost in evaluations of the network, at most and as it came. Killed and called again it goes on; in a folder of
    other arguments it uses what is the same and nothing else. Raises `OctavoError` if nothing reaches the goal, with
    the best that was found, or for arguments that do not fit, before anything is made.
    """
    options, out, calibration = options or TuneOptions(), Path(out), calibration or {}
    pipeline = without_trajectory(pipeline)
    _check(pipeline, goal, options, target, calibration, inputs)
    if DP in options.spacings:
        check_visits_all(pipeline, inputs, "leave dp out of the spacings (--spacings), or give strength=1")
    plan = make_plan(pipeline, options, inputs)
    own: dict[str, Any] = {"seed": seed, "batch_size": batch_size, "inputs": inputs}
    at_most = cost_at_most(pipeline, goal, options, plan, calibration=calibration, **own)
    check_winner_place(out)
    (out / WORK).mkdir(parents=True, exist_ok=True)
    with (
        held(out / WORK, f"{out}: another process tunes here; wait for it, or choose another folder"),
        closing(Spending(at_most, progress, [f"left out: {line}" for line in plan.left_out])) as spending,
    ):
        networks = make_networks(
            pipeline,
            tuple(dict.fromkeys((*options.recipes, FLOAT))),
            out / WORK,
            calibration=calibration,
            search=options.search,
            progress=progress,
            spending=spending,
            **own,
        )
        return _Tuning(networks, plan, goal, options, target, out, own).finish()


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
        self.out, self.own, self.spending = out, own, networks.spending
        self.reference = networks.fast[FLOAT]
        if options.metric == "psnr" and adds_noise(self.reference.scheduler, own["inputs"]):
            self.reference = with_scheduler(self.reference, "ddim")
        steps = options.reference_steps
        self.reference_evaluations = probe(
            networks.plain[FLOAT], num_inference_steps=steps, inputs=own["inputs"]
        ).num_steps
        self.quality = Quality(
            options.metric,
            out / WORK,
            target=target,
            reference=(self.reference, steps),
            num_images=options.num_images,
            **own,
        )
        self.verification: Verification | None = None
        if options.metric == "fd" and target is not None:
            self.verification = Verification(
                goal,
                target,
                (self.reference, steps, self.reference_evaluations),
                out / WORK,
                num_images=options.verify_images,
                spending=self.spending,
                **own,
            )
        self.scored: dict[Choice, float] = {}

    def finish(self) -> dict[str, Any]:
        curves = [
            self.networks.curve(Curve(recipe, solver, spacing), evaluations)
            for recipe in dict.fromkeys(self.options.recipes)
            for (solver, spacing), evaluations in self.plan.evaluations.items()
        ]
        if self.options.metric == "psnr":
            with self._stage("reference", self.reference_evaluations, "reference") as on_images:
                self.quality.make_reference(on_images)
        bar = self._bar()
        if self.goal.kind == "quality":
            winner = fastest(curves, lambda choice: self.badness(choice) <= bar, self._expect)
        else:
            self._expect([[choice for choice in curve if choice.seconds <= bar][-1:] for curve in curves])
            winner = best_within(curves, bar, self.badness)
        if winner is None:
            raise OctavoError(f"target: nothing reaches it; {self._nearest(curves)}")
        winner, verification, rejected = self._verified(winner, bar)
        results = self._results(winner, bar, verification, rejected)
        plain = self.networks.on(winner.curve, winner.steps, plain=True)
        save_winner(plain, self.out)
        write_json(self.out / RESULTS, results)
        return results

    def badness(self, choice: Choice) -> float:
        if choice not in self.scored:
            pipeline = self.networks.on(choice.curve, choice.steps)
            label = f"{choice.curve}, {choice.steps} steps"
            with self._stage("scores", self._evaluations(choice), label) as on_images:
                self.scored[choice] = self.quality(pipeline, choice.steps, on_images)
        return self.quality.badness(self.scored[choice])

    def _evaluations(self, choice: Choice) -> int:
        return self.plan.evaluations[choice.curve.solver, choice.curve.spacing][choice.steps]

    @contextmanager
    def _stage(self, kind: str, evaluations: int, label: str) -> Iterator[Callable[[int], None]]:
        """Yields what is to be told of every n images of a score that are made."""
        images = whole_batches(self.options.num_images, self.own["batch_size"])
        with self.spending.stage(kind, images * evaluations, label) as advance:
            yield lambda count: advance(count * evaluations)

    def _expect(self, curves: Curves) -> None:
        """What may be left to do while the choices of `curves` may still be asked for."""
        images = whole_batches(self.options.num_images, self.own["batch_size"])
        asked = sum(most_asked([self._evaluations(choice) for choice in curve]) for curve in curves)
        self.spending.expect(images * asked + self.spending.at_most["verification"])

    def _bar(self) -> float:
        """What badness may be at most, or the seconds of an image."""
        if self.goal.value is None:
            with self._stage("reference", self.reference_evaluations, "reference") as on_images:
                score = self.quality(self.reference, self.options.reference_steps, on_images)
            return self.quality.badness(score)
        return self.goal.value if self.goal.kind == "latency" else self.quality.badness(self.goal.value)

    def _nearest(self, curves: Sequence[Sequence[Choice]]) -> str:
        if self.scored:
            choice = min(self.scored, key=self.badness)
            return f"the nearest is {self.scored[choice]:.4g} ({choice.curve}, {choice.steps} steps)"
        times = [curve[0].seconds for curve in curves if curve]
        if times:
            return f"the fastest takes {min(times):.4g} s an image"
        return f"nothing fits the pipeline ({'; '.join(self.networks.left_out[:3])})"

    def _verified(
        self, winner: Choice, bar: float
    ) -> tuple[Choice, dict[str, Any] | None, list[dict[str, Any]]]:
        """The first of the winner and the slower good choices that holds on other images; and those that do not."""
        if self.verification is None:
            return winner, None, []
        slower = [
            choice
            for choice in self.scored
            if choice.seconds > winner.seconds and self.badness(choice) <= bar
        ]
        self._expect([])
        tried: list[tuple[Choice, dict[str, Any]]] = []
        for choice in [winner, *sorted(slower, key=lambda choice: choice.seconds)][:VERIFY_AT_MOST]:
            pipeline = self.networks.on(choice.curve, choice.steps)
            told = self.verification(pipeline, choice.steps, self._evaluations(choice))
            tried.append((choice, told))
            if told["verified"] is not False:
                break
        else:
            tried.sort(key=lambda pair: -pair[1]["fd"]["value"])
        winner, verification = tried[-1]
        return (
            winner,
            verification,
            [{**self._row(choice), "verification": told} for choice, told in tried[:-1]],
        )

    def _results(
        self,
        winner: Choice,
        bar: float,
        verification: dict[str, Any] | None,
        rejected: list[dict[str, Any]],
    ) -> dict[str, Any]:
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
            "verified": verification and verification["verified"],
            "rejected": rejected,
            "front": [self._row(choice) for choice, _ in front],
            "scored": [self._row(choice) for choice in sorted(self.scored, key=lambda c: c.seconds)],
            "left_out": [*self.plan.left_out, *self.networks.left_out],
            "reference": self._reference_row(bar),
            "reference_solver": plain_name(self.reference.scheduler),
            "reference_steps": self.options.reference_steps,
            "seconds_of_an_evaluation": self.networks.seconds,
            "verification": verification,
            "network_evaluations": {"at_most": self.spending.at_most, "made": self.spending.counts},
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

    def _reference_row(self, bar: float) -> dict[str, Any] | None:
        """The reference as a choice is told, where its FD was measured: to be the bar."""
        if self.goal.value is not None:
            return None
        return {
            "steps": self.options.reference_steps,
            "images_per_second": 1 / (self.reference_evaluations * self.networks.seconds[FLOAT]),
            self.options.metric: bar,
        }


def _check(
    pipeline: DiffusionPipeline,
    goal: Goal,
    options: TuneOptions,
    target: Target | None,
    calibration: Mapping[str, Any],
    inputs: Mapping[str, Any] | None,
) -> None:
    check_makes_images(pipeline)
    if "eta" in (inputs or {}):
        raise OctavoError("eta: is DDIM's alone; name it with the solver (--solvers ddim:0.5,unipc)")
    if any(True for _ in quantized_layers(find_denoiser(pipeline)[1])):
        raise OctavoError("pipeline: is quantized already; give the full-precision model")
    if options.metric == "fd" and (target is None or target.statistics is None):
        raise OctavoError("target: the metric fd needs real images (--real-images); or take --metric psnr")
    if options.metric == "psnr" and goal.value is None:
        raise OctavoError("target: quality=reference is for fd; give the PSNR in dB that is good enough")
    for recipe in options.recipes:
        if recipe != FLOAT:
            named_recipe(recipe, **calibration)
