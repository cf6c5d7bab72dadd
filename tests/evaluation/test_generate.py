from __future__ import annotations

import numpy as np
import pytest

from octavo.diffusion.solvers.inside_pipeline import Solved
from octavo.errors import OctavoError
from octavo.evaluation import generate as generation
from octavo.evaluation.generate import generate, generate_solving, to_uint8
from octavo.evaluation.similarity import psnr
from octavo.evaluation.speed import Timing, take_turns


def test_images_do_not_depend_on_the_batch_size(pipeline) -> None:  # type: ignore[no-untyped-def]
    whole = generate(pipeline, 5, steps=2, batch_size=5, progress=False)
    parts = generate(pipeline, 5, steps=2, batch_size=2, progress=False)
    assert whole.shape == (5, 8, 8, 3) and whole.dtype == np.float32
    assert np.abs(whole - parts).max() < 1e-4
    assert np.abs(whole[0] - whole[1]).max() > 0.1
    assert np.array_equal(
        generate(pipeline, 2, steps=2, seed=3, progress=False),
        generate(pipeline, 2, steps=2, seed=3, progress=False),
    )


def test_videos_are_refused_before_anything_runs() -> None:
    from diffusers import LTXPipeline

    with pytest.raises(OctavoError, match="LTXPipeline makes videos; sample them by its own call"):
        generate(object.__new__(LTXPipeline), 1, progress=False)


def test_to_uint8_rounds() -> None:
    assert to_uint8(np.array([0.0, 0.5, 1.0], dtype=np.float32)).tolist() == [0, 128, 255]


def test_psnr_is_per_image_and_infinite_for_equals() -> None:
    reference = np.zeros((2, 4, 4, 1), dtype=np.float32)
    images = reference.copy()
    images[1] += 0.01
    assert psnr(images, reference)[0] == np.inf
    assert psnr(images, reference)[1] == pytest.approx(40.0, abs=1e-4)
    with pytest.raises(OctavoError, match="shape"):
        psnr(images[:1], reference)


def test_engines_take_turns() -> None:
    order: list[str] = []
    timings = take_turns(
        {"a": lambda: order.append("a"), "b": lambda: order.append("b")}, rounds=3, warm_up=1
    )
    assert order == ["a", "b"] * 4
    assert len(timings["a"].seconds) == 3


def test_ratio_is_how_many_times_faster() -> None:
    fast, slow = Timing([1.0, 1.0, 2.0]), Timing([3.0, 2.0, 4.0])
    assert fast.ratio(slow) == (2.0, 2.0, 2.5)
    assert fast.median == 1.0


def test_nan_among_images_whose_steps_a_solver_chose_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    images = np.zeros((2, 4, 4, 3), np.float32)
    images[1, 0, 0, 0] = np.nan
    monkeypatch.setitem(generation.SOLVING, "rk45", lambda *args, **kwargs: Solved(images, (3, 3)))
    with pytest.raises(OctavoError, match="image 1: holds NaN or infinity"):
        generate_solving(object(), "rk45", 2, progress=False)  # type: ignore[arg-type]
