"""The time of a mix of float and int8 layers: measured at both ends, by multiply-accumulates between."""

from __future__ import annotations

from pathlib import Path

import pytest

from octavo.errors import OctavoError
from octavo.evaluation.cost import layer_costs
from octavo.quantization import quantized_layers
from octavo.study import layer_time as module
from octavo.study.layer_time import LayerTime, layer_time, times
from octavo.study.one_at_a_time import OneAtATime


@pytest.fixture
def bench(pipeline) -> OneAtATime:  # type: ignore[no-untyped-def]
    return OneAtATime(pipeline, num_images=2, steps=2, seed=0, batch_size=2)


def test_a_layers_share_is_that_of_its_multiplications() -> None:
    time = LayerTime(int8_ms=10, float_ms=30, macs={"a": 3, "b": 1})
    assert time.extra("a") == 1.5 and time.extra("a") + time.extra("b") == 30 / 10 - 1


def test_both_ends_are_measured_in_int8_and_float(quantized, bench: OneAtATime, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    layers = dict(quantized_layers(quantized.unet))
    time = layer_time(bench, layers, tmp_path / "compiled", batch_size=2)
    assert time.int8_ms > 0 and time.float_ms > 0
    assert time.macs == {row.layer: row.macs for row in layer_costs(quantized) if row.layer in layers}
    assert not list(tmp_path.iterdir()) and not list(quantized_layers(bench.network))


def test_a_mix_is_timed_in_turn_with_the_others(quantized, bench: OneAtATime, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    layers = dict(quantized_layers(quantized.unet))
    mix = {name: layer for name, layer in layers.items() if name.startswith("mid_block")}
    found = times(bench, {"mix": mix, "float": {}}, tmp_path / "compiled", batch_size=2, rounds=3)
    assert [len(timing.seconds) for timing in found.values()] == [3, 3]


def test_time_without_integers_is_refused(
    quantized,  # type: ignore[no-untyped-def]
    bench: OneAtATime,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "execute", lambda pipeline, *_: (pipeline, "simulation (torch)"))
    with pytest.raises(OctavoError, match=r"here the network is: simulation \(torch\); give --budget size"):
        times(bench, {"int8": dict(quantized_layers(quantized.unet))}, tmp_path / "c", batch_size=2)
