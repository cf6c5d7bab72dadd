from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from octavo.errors import OctavoError
from octavo.files import write_json
from octavo.study.tune_winner import RESULTS, check_winner_place, save_winner


def test_a_winner_in_full_precision_is_replaced_by_the_next(
    pipeline: Any, quantized: Any, tmp_path: Path
) -> None:
    save_winner(pipeline, tmp_path)
    with pytest.raises(OctavoError, match="holds other things than a pipeline that Octavo wrote"):
        check_winner_place(tmp_path)
    write_json(tmp_path / RESULTS, {"winner": {"recipe": "float"}})
    save_winner(quantized, tmp_path)
    assert "quantization_config" in (tmp_path / "pipeline/unet/config.json").read_text()
    assert (tmp_path / "pipeline/README.md").read_text().count("pipeline")
    write_json(tmp_path / RESULTS, {"winner": {"recipe": "best"}})
    save_winner(pipeline, tmp_path)
    assert "quantization_config" not in (tmp_path / "pipeline/unet/config.json").read_text()


def test_what_is_not_the_winners_is_not_replaced(pipeline: Any, tmp_path: Path) -> None:
    write_json(tmp_path / RESULTS, {"winner": {"recipe": "float"}})
    save_winner(pipeline, tmp_path)
    check_winner_place(tmp_path)
    (tmp_path / "pipeline" / "mine.txt").write_text("mine")
    with pytest.raises(OctavoError, match="choose another folder"):
        save_winner(pipeline, tmp_path)
    assert (tmp_path / "pipeline" / "mine.txt").read_text() == "mine"
