from __future__ import annotations

from pathlib import Path

import psutil
import pytest

import octavo
from octavo.errors import OctavoError
from octavo.evaluation.generate import generate
from octavo.evaluation.similarity import psnr
from octavo.quantization import quantized_layers
from octavo.runtimes import convert
from octavo.study import engine
from octavo.study.engine import execute
from octavo.study.layer_time import times
from octavo.study.one_at_a_time import OneAtATime


def images(pipeline):  # type: ignore[no-untyped-def]
    return generate(pipeline, 2, steps=3, batch_size=2, progress=False)


def test_eight_bits_run_in_integers_and_float_in_float(pipeline, quantized, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    fast, how = execute(quantized, 2, tmp_path)
    assert how == "int8 (OpenVINO)" and all(row.ok for row in octavo.audit(fast))
    assert any(tmp_path.iterdir())  # in the folder it was told, not in the user's cache
    assert psnr(images(fast), images(quantized)).min() > 35
    assert execute(pipeline, 2, tmp_path)[1] == "float (OpenVINO f32)"


def test_integers_for_weights_alone_are_told_from_float(pipeline, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """Nothing is to run in integers there, so nothing is refused: its time may be asked for."""
    recipe = octavo.PTQ4DM(samples=2, steps=2, include="time_embedding.*", time_embedding="weights")
    quantized = octavo.quantize(pipeline, recipe, batch_size=2, progress=False)
    assert execute(quantized, 2, tmp_path)[1] == "float activations (OpenVINO f32)"
    bench = OneAtATime(pipeline, num_images=2, steps=2, seed=0, batch_size=2)
    mix = {"mix": dict(quantized_layers(quantized.unet))}
    assert times(bench, mix, tmp_path, batch_size=2, rounds=1)["mix"].median > 0


def test_what_has_no_kernel_is_simulated_without_a_word(  # type: ignore[no-untyped-def]
    pipeline,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(convert, "KERNEL_BITS", 6)  # levels that no integer kernel takes
    recipe = octavo.PTQ4DM(activations=6, samples=4, steps=3)
    six = octavo.quantize(pipeline, recipe, batch_size=4, progress=False)
    level = engine.RUNTIMES.level
    fast, how = execute(six, 2, tmp_path)
    assert how == "simulation (OpenVINO f32)"
    assert psnr(images(fast), images(six)).min() > 25
    assert not caplog.records and not capsys.readouterr().err
    assert engine.RUNTIMES.level == level


def test_torch_takes_over_where_openvino_cannot(  # type: ignore[no-untyped-def]
    pipeline, quantized, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*args: object, **kwargs: object) -> None:
        raise OctavoError("OpenVINO cannot be imported")

    monkeypatch.setattr(engine, "OpenVINOExecutor", fails)
    assert execute(quantized, 2, tmp_path) == (quantized, "simulation (torch)")
    assert execute(pipeline, 2, tmp_path) == (pipeline, "float (torch)")


def test_hundreds_of_conversions_do_not_fill_the_memory(digits, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """Torch keeps what it traces: 45 MB a conversion of the bundled model, unless it is told to forget."""
    used = []
    for k in range(5):
        execute(digits, 2, tmp_path / str(k))
        used.append(psutil.Process().memory_full_info().uss / 1e6)
    assert used[-1] - used[0] < 90, used
