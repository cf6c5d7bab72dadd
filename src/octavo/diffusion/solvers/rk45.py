"""The probability flow solved by RK45 with step-size control: the reference that every solver of the flow aims at."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Mapping, Sequence
from math import atan, cos, exp, log, sin, tan
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from octavo.diffusion.solvers.continuous import ContinuousSchedule, continuous_schedule
from octavo.diffusion.solvers.inside_pipeline import Solved, Solver, Solving, check_tolerances, solve_inside
from octavo.errors import OctavoError

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

Numbers = NDArray[np.float64]
Slope = Callable[[float, Numbers], Numbers]


def solve_rk45(
    pipeline: DiffusionPipeline,
    *,
    generators: Sequence[torch.Generator],
    inputs: Mapping[str, Any] | None = None,
    rtol: float = 1e-5,
    atol: float = 1e-5,
    first_image: int = 0,
    max_evaluations: int = 10_000,
    on_image: Callable[[], None] = lambda: None,
) -> Solved:
    """An image for each generator: the probability-flow ODE from its noise, by scipy's RK45 to the tolerances given.

    With sigma = tan(phi), x_t = cos(phi) x_0 + sin(phi) eps, and the flow (2011.13456, equation 13) is

        dx / dphi = cos(phi) eps(x, t) - sin(phi) x_0(x, t)

    which has neither betas nor a derivative of the schedule, and states of one size throughout, to which `rtol` and
    `atol` apply (the root mean square over the image of error / (atol + rtol |x|) is kept below 1 at each step; 1e-5
    each is Song et al.'s choice). It is solved from timestep T - 1 to 0 in real timesteps, see `ContinuousSchedule`;
    from there DDIM's last jump gives the image, whose evaluation counts too. Nothing is clipped
    on the way.

    The network computes in float32: tolerances below about 1e-6 ask for what it cannot give. Raises `OctavoError` for
    tolerances that are not positive, without scipy, or where `max_evaluations` do not suffice.
    """
    check_tolerances(rtol, atol)
    _scipy()
    solver = _flow_solver(continuous_schedule(pipeline.scheduler), rtol, atol)
    return solve_inside(
        pipeline,
        solver,
        generators=generators,
        inputs=inputs,
        first_image=first_image,
        max_evaluations=max_evaluations,
        on_image=on_image,
    )


def _flow_solver(schedule: ContinuousSchedule, rtol: float, atol: float) -> Solver:
    bounds = atan(exp(schedule.log_sigma(schedule.last))), atan(exp(schedule.log_sigma(0.0)))

    def solver(start: Tensor, generator: torch.Generator) -> Solving:
        def tensor(numbers: Numbers) -> Tensor:
            return torch.from_numpy(numbers).reshape(start.shape)

        def solve(slope: Slope) -> Numbers:
            first = np.asarray(start.double().cpu()).flatten()
            found = _scipy()(slope, bounds, first, method="RK45", rtol=rtol, atol=atol)
            if not found.success:
                raise OctavoError(f"rk45: {found.message}; give larger tolerances")
            return np.asarray(found.y[:, -1])

        asking = _asked(solve)
        try:
            angle, numbers = next(asking)
            while True:
                timestep, state = schedule.timestep(log(tan(angle))), tensor(numbers)
                prediction = yield timestep, state
                image, eps = schedule.split(prediction.double().cpu(), state, timestep)
                slope = cos(angle) * eps - sin(angle) * image
                angle, numbers = asking.send(np.asarray(slope).flatten())
        except StopIteration as end:
            last = tensor(end.value)
        finally:
            asking.close()
        prediction = yield 0.0, last
        return schedule.image(prediction.double().cpu(), last)

    return solver


def _asked(solve: Callable[[Slope], Numbers]) -> Generator[tuple[float, Numbers], Numbers, Numbers]:
    """`solve(slope)` turned inside out: yields what `slope` is asked for, is sent its answer, returns the solution.

    Scipy calls its function; here the pipeline's loop is what calls. So `solve` runs in a thread of its own, of which
    either it or the caller waits at any time. Ends with the generator, whatever ends that.
    """
    questions: SimpleQueue[Any] = SimpleQueue()
    answers: SimpleQueue[Numbers | None] = SimpleQueue()

    def ask(angle: float, numbers: Numbers) -> Numbers:
        questions.put((float(angle), numbers.copy()))
        answer = answers.get()
        if answer is None:
            raise _Left
        return answer

    def run() -> None:
        try:
            questions.put(_Solution(solve(ask)))
        except BaseException as error:
            questions.put(error)

    thread = threading.Thread(target=run, name="octavo-rk45", daemon=True)
    thread.start()
    try:
        while True:
            question = questions.get()
            if isinstance(question, _Solution):
                return question.numbers
            if isinstance(question, BaseException):
                raise question
            answers.put((yield question))
    finally:
        answers.put(None)
        thread.join()


class _Solution:
    def __init__(self, numbers: Numbers) -> None:
        self.numbers = numbers


class _Left(BaseException):
    """Nobody waits for the solution any more."""


def _scipy() -> Any:
    try:
        from scipy.integrate import solve_ivp
    except ImportError as error:  # diffusers has it only where its user has
        raise OctavoError("rk45: needs scipy (pip install scipy), or choose another solver") from error
    return solve_ivp
