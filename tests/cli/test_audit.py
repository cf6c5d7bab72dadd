"""`octavo audit`: what it lists, and what its words and its figures count."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from command_line import run

import octavo
import octavo.quantization
import octavo.runtimes


@pytest.fixture(scope="module")
def model(pipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:  # type: ignore[no-untyped-def]
    folder = tmp_path_factory.mktemp("model") / "tiny"
    pipeline.save_pretrained(folder)
    return folder


def test_audit_lists_every_layer(saved: Path, capsys) -> None:  # type: ignore[no-untyped-def]
    code, out, err = run(capsys, "audit", saved, "--json")
    assert code == 0, err
    figures = json.loads(out)
    assert figures["in_int8"] == figures["audited"] == len(figures["layers"]) > 0
    assert figures["quantized_layers"] == figures["audited"] + figures["float_activations"]
    assert "run in int8 (100.0 %)" in run(capsys, "audit", saved)[1]


def test_the_audit_counts_what_its_words_name(saved: Path, capsys, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    """Of a CPU without VNNI: two kernels for those in int8, and the layers with float activations apart from them."""
    of_engine = octavo.runtimes.audit
    monkeypatch.setattr(
        octavo.runtimes, "audit", lambda fast: [replace(row, kernels=2) for row in of_engine(fast)]
    )
    monkeypatch.setattr(octavo.quantization, "layer_counts", lambda *_: {"float_activations": 3})
    out = run(capsys, "audit", saved, "--no-layers")[1]
    assert re.fullmatch(
        r"(\d+) of \1 layers with integer activations run in int8 \(100\.0 %\), \1 of them in two kernels "
        r"\(this CPU has no VNNI; with --pair-limit, or 7-bit weights, one\); 3 more have integer weights alone",
        out.strip(),
    )


def test_the_audit_of_a_float_model_lists_the_names_that_patterns_match(model: Path, capsys) -> None:  # type: ignore[no-untyped-def]
    code, out, err = run(capsys, "audit", model)
    assert code == 2 and "no quantized layers" in err
    assert {"conv_in", "mid_block.resnets.0.conv1"} < set(out.splitlines())
    figures = json.loads(run(capsys, "audit", model, "--json")[1])
    assert figures["float_layers"] == out.splitlines()[:-1] and not figures["layers"]
