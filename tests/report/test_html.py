"""The page as text, and what goes into it."""

from __future__ import annotations

import base64
import io
import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import octavo
from octavo.errors import OctavoError
from octavo.quantization import quantized_layers, walk
from octavo.report import ReportData, charts, gather_report, save_report, to_html
from octavo.report.charts import error_scale
from octavo.report.colours import viridis
from octavo.report.cost import cost_rows, peak_memories
from octavo.report.data import ErrorMap, Interval, Verdict
from octavo.report.pictures import gallery, heat_map
from octavo.report.words import checks, headline


def pixels(uri: str, mode: str | None = None) -> np.ndarray:
    with Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))) as picture:
        return np.asarray(picture.convert(mode) if mode else picture)


def test_the_page_shows_every_part(report_data: ReportData, page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    ids = re.findall(r'<section id="(\w+)" aria', text)
    parts = ["images", "cost", "quality", "layers", "ranges", "calibration", "audit", "study"]
    assert ids == [*parts, "activations", "use"]
    assert re.findall(r'<li><a href="#(\w+)"', text) == ["verdict", *parts, "use"]
    assert re.findall(r'<li class="sub"><a href="#([\w-]+)"', text)[-2:] == ["T4-W8A6", "activations"]
    assert len(re.findall(r'class="tile"', text)) == 30
    assert headline(report_data) in text
    for row in report_data.audit:
        assert f"<code>{'.<wbr>'.join(row['layer'].split('.'))}</code>" in text
    assert "ndtc(mean=0.4, std=0.5)" in text and "12 calibration pairs" in text
    assert 'class="dot theirs"' in text and "not yet measured" in text  # the study: drawn, and honest
    assert page.stat().st_size < 5_000_000


def test_nothing_in_the_page_points_outside(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    places = re.findall(r'(?:src|href|data-worst|action)="([^"]*)"', text)
    assert len(places) > 90 and all(place.startswith(("data:", "#")) for place in places)
    assert not re.search(r"url\(|@import|https?://", text)


def test_what_a_model_is_called_cannot_become_code(report_data: ReportData) -> None:
    evil = "</script><img src=x onerror=alert(1)>"
    errors = replace(report_data.errors, layers=[evil, *report_data.errors.layers[1:]])  # type: ignore[type-var,union-attr]
    text = to_html(replace(report_data, title=evil, errors=errors, loading=evil, recipe={evil: evil}))
    assert "<img src=x" not in text
    assert text.count("</script>") == 2


def test_parts_that_are_absent_are_left_out() -> None:
    text = to_html(ReportData("bare", {}))
    assert "<section" not in text and "<h1>bare</h1>" in text


def test_what_is_gathered_is_json_and_fits_together(report_data: ReportData) -> None:
    state = json.loads(json.dumps(report_data.to_dict(), allow_nan=False))
    layers = len(report_data.audit)
    assert layers == len(state["errors"]["layers"]) > 10
    assert all(len(row) == 4 for row in state["errors"]["errors"]) and len(state["errors"]["timesteps"]) == 4
    assert sum(state["calibration"]["pairs"]) == 12 and len(state["calibration"]["pairs"]) == 4
    assert state["float_layers"] == ["conv_in", "conv_out"]
    assert (
        state["verdict"]["speed"]["low"]
        <= state["verdict"]["speed"]["value"]
        <= state["verdict"]["speed"]["high"]
    )
    assert state["verdict"]["psnr"]["value"] == pytest.approx(
        np.mean(state["gallery"]["psnr_values"]), abs=0.01
    )
    assert 4 < state["cost"]["reference"]["bops"] / state["cost"]["model"]["bops"] <= 16
    assert {(point["engine"], point["steps"]) for point in state["trade_off"]} == {
        (engine, steps) for engine in ("torch eager fp32", "Octavo int8") for steps in (1, 2, 4)
    }
    assert [point["psnr"] for point in state["trade_off"] if point["psnr"] is None] == [None]
    assert 3 <= len(state["ranges"]) <= 6 and "from_pretrained(" in state["loading"]


def test_what_both_models_cost_stands_side_by_side(report_data: ReportData) -> None:
    rows = {row["name"]: row for row in cost_rows(report_data)}
    assert list(rows) == [
        "Size of the unet",
        "Bit operations",
        "The network alone",
        "A whole image",
        "Peak memory",
    ]
    assert all(row["share"] for row in rows.values())
    memory = report_data.cost
    for name in (
        "model",
        "reference",
    ):  # of fresh processes: far more than the libraries, far less than this one
        peak, libraries = memory[name]["peak_memory_bytes"], memory[name]["libraries_memory_bytes"]
        assert 100e6 < libraries < peak < 4e9
    assert rows["Peak memory"]["ours"].endswith(" MB") and rows["Peak memory"]["ours_span"].endswith(
        "libraries"
    )
    assert (
        "sampler included" in rows["A whole image"]["note"]
        and "batch of 10" in rows["The network alone"]["note"]
    )
    text = to_html(report_data)
    assert "Speed of the network alone" in text and "Whole images, sampler included" in text


def test_costs_that_were_not_measured_are_said_to_be(report_data: ReportData) -> None:
    bare = {"latency": None, "peak_memory_bytes": None, "libraries_memory_bytes": None}
    cost = {name: {**found, **bare} for name, found in report_data.cost.items()}
    simulated = replace(report_data, cost=cost, trade_off=[])
    rows = {row["name"]: row for row in cost_rows(simulated)}
    for name in ("The network alone", "Peak memory"):
        assert rows[name]["ours"] == rows[name]["theirs"] == "not measured" and rows[name]["share"] is None
    assert "A whole image" not in rows and to_html(simulated).count("not measured") == 4


def test_memory_that_cannot_be_measured_stops_nothing(  # type: ignore[no-untyped-def]
    pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"inputs": {}, "threads": 1}
    assert peak_memories({"model": (pipeline, {**settings, "inputs": {"image": object()}})}) == {}
    monkeypatch.setattr("octavo.evaluation.peak_memory.sys.executable", "/bin/false")
    assert peak_memories({"model": (pipeline, settings)}) == {}


def test_pairs_are_ordered_by_distance_and_the_difference_is_theirs() -> None:
    generator = np.random.default_rng(0)
    reference = generator.random((5, 8, 8, 3), dtype=np.float32) * 0.5
    images = reference.copy()
    for k, error in enumerate((0.01, 0.3, 0.0, 0.1, 0.02)):
        images[k, 2, 3] += error
    found = gallery(images, reference, seed=7)
    assert [pair.seed for pair in found.pairs] == [8, 10, 11, 7, 9]
    assert found.pairs[-1].psnr == 100.0
    shown = pixels(found.pairs[0].difference, "RGB")
    level = round(63 * min(0.3 / found.difference_top, 1)) / 63
    assert np.array_equal(shown[2, 3], viridis(np.array(level)))
    assert np.array_equal(shown[0, 0], viridis(np.array(0.0)))
    assert np.array_equal(pixels(found.pairs[0].reference), (reference[1] * 255).round())


def test_large_images_are_shown_smaller_and_not_all() -> None:
    reference = np.random.default_rng(0).random((12, 300, 300, 3), dtype=np.float32)
    found = gallery(reference * 0.9, reference, seed=0, most_bytes=3_000_000)
    assert found.shrunk and 1 < len(found.pairs) < found.num_images == 12
    assert max(pixels(found.pairs[0].reference).shape) == 256
    assert found.pairs[-1].psnr == pytest.approx(max(found.psnr_values))
    assert sum(len(p.reference) + len(p.quantized) + len(p.difference) for p in found.pairs) < 3_300_000


def test_the_heat_map_has_a_pixel_for_each_layer_and_timestep() -> None:
    errors = ErrorMap(["a", "b"], [9.0, 5.0, 1.0], [[0.01, 0.02, None], [0.1, 0.05, 0.04]], [1, 0])
    low, high = error_scale(errors)
    assert (low, high) == (0.01, 0.1)
    picture = pixels(heat_map(errors, low, high, errors.worst))
    assert picture.shape == (2, 3, 4)
    assert np.array_equal(picture[0, 0, :3], viridis(np.array(1.0))) and picture[1, 2, 3] == 0
    assert np.array_equal(picture[1, 0, :3], viridis(np.array(0.0)))


@pytest.mark.parametrize(
    ("speed", "told", "signs"),
    [(Interval(2.0, 1.8, 2.2), "2.0\xd7 faster", ""), (Interval(0.5, 0.4, 0.6), "2.0\xd7 slower", "\u2717")],
)
def test_the_verdict_does_not_flatter(speed: Interval, told: str, signs: str) -> None:
    data = ReportData("m", {}, Verdict(25, 100, Interval(45.0, 44.0, 46.0), 8, speed))
    undecided = replace(data, verdict=replace(data.verdict, p_value=0.9))  # type: ignore[type-var]
    assert checks(undecided)[-1]["sign"] == "\u2013" and "does not tell" in checks(undecided)[-1]["text"]
    assert told in headline(data)
    assert "".join(check["sign"] for check in checks(data)) == signs


def test_a_float_fallback_is_shown_as_one() -> None:
    rows = [{"layer": "a", "kernel": "brgemm", "precision": "u8", "ok": True}]
    rows.append({"layer": "b", "kernel": "jit", "precision": "f32", "ok": False})
    (check,) = checks(ReportData("m", {}, audit=rows))
    assert check["sign"] == "\u2717" and check["text"].startswith("1 of 2 layers with integer activations")


def test_layers_of_two_kernels_are_told() -> None:
    rows = [
        {"layer": name, "kernel": "jit", "precision": "u8", "ok": True, "kernels": n}
        for name, n in (("a", 2), ("b", 1))
    ]
    (check,) = checks(ReportData("m", {}, audit=rows))
    assert "1 take two kernels" in check["text"]
    assert charts.kernels(rows) == [("jit (u8) x 2", 1), ("jit (u8)", 1)]


def test_layers_whose_weights_alone_are_integers_have_a_list_of_their_own(pipeline) -> None:  # type: ignore[no-untyped-def]
    """Every layer is on one of three lists, and the audit's words count two of them."""
    recipe = octavo.PTQ4DM(samples=2, steps=2, time_embedding="weights")
    made = octavo.quantize(pipeline, recipe, batch_size=2, progress=False)
    data = gather_report(
        made, pipeline, num_images=2, steps=2, batch_size=2, runtime="torch", rounds=1, progress=False
    )
    layers = dict(quantized_layers(made.unet))
    assert data.weights_alone == [name for name, layer in layers.items() if layer.input_spec.is_float] != []
    audited, alone = len(data.audit), len(data.weights_alone)
    assert audited + alone == len(layers)
    assert {*data.weights_alone, *data.float_layers, *(row["layer"] for row in data.audit)} == {
        name for name, _ in walk(pipeline.unet)
    }
    text = to_html(data)
    shown = text.split(f"Weights alone in integers, computed in float ({alone})")[1].split("</details>")[0]
    assert all(".<wbr>".join(name.split(".")) in shown for name in data.weights_alone)
    assert f"Every layer with integer activations ({audited})" in text
    (check,) = [one["text"] for one in checks(data) if "simulation" in one["text"]]
    assert check.startswith(
        f"{audited} layers with integer activations in torch's simulation; {alone} more have integer weights alone:"
    )


def test_other_places_are_refused(report_data: ReportData, tmp_path: Path) -> None:
    with pytest.raises(OctavoError, match=r"ends in \.html"):
        save_report(report_data, tmp_path / "report.pdf")
    with pytest.raises(OctavoError, match=r"study\.json"):
        to_html(replace(report_data, study={"rows": []}))
    assert not list(tmp_path.iterdir())
