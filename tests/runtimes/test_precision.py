from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from octavo.runtimes.precision import faster_precision


class Core:
    """An engine's properties, as far as the choice reads them."""

    def __init__(self, capabilities: tuple[str, ...] = ("BF16",), name: str = "a") -> None:
        self.properties = {"OPTIMIZATION_CAPABILITIES": list(capabilities), "FULL_DEVICE_NAME": name}

    def get_property(self, device: str, name: str) -> Any:
        return self.properties[name]


def chosen(record: Path | None, core: Core | None = None, f32: float = 0.004, bf16: float = 0.0) -> str:
    seconds = {"f32": f32, "bf16": bf16}
    return faster_precision(core or Core(), lambda name: lambda: time.sleep(seconds[name]), record)  # type: ignore[arg-type]


def test_the_faster_is_chosen() -> None:
    assert chosen(None) == "bf16"
    assert chosen(None, f32=0.0, bf16=0.004) == "f32"


def test_it_is_remembered(tmp_path: Path) -> None:
    assert chosen(tmp_path / "precision.json") == "bf16"
    (record,) = tmp_path.iterdir()
    record.write_text(json.dumps({"precision": "f32"}))
    assert chosen(tmp_path / "precision.json") == "f32", "not measured again"


@pytest.mark.parametrize("damage", ["", "{", "[1]", "3", "{}", '{"precision": "f64"}', '{"precision": [1]}'])
def test_a_damaged_record_is_measured_again(tmp_path: Path, damage: str) -> None:
    chosen(tmp_path / "precision.json")
    (record,) = tmp_path.iterdir()
    record.write_text(damage)
    assert chosen(tmp_path / "precision.json") == "bf16"
    assert json.loads(record.read_text())["precision"] == "bf16"


def test_another_processor_measures_for_itself(tmp_path: Path) -> None:
    assert chosen(tmp_path / "precision.json") == "bf16"
    assert chosen(tmp_path / "precision.json", Core(name="b"), f32=0.0, bf16=0.004) == "f32"
    assert chosen(tmp_path / "precision.json", Core(capabilities=())) == "f32", (
        "a record does not make it able"
    )
