"""One small report for all tests, and a real browser to look at it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from octavo.calibration import trace
from octavo.report import ReportData, gather_report, save_report
from octavo.study import Sampler, StudyOptions
from octavo.study.activations import activations_over_time
from octavo.study.cells import Cell
from octavo.study.results import tables_of
from octavo.study.tables import plan_tables


def figure(value: float | None) -> dict[str, Any]:
    return {"value": value, "low": None, "high": None, "method": ""}


def measured(cell: Cell) -> dict[str, Any] | None:
    """A made-up cell of `octavo study`: T4's metrics are 2 dB apart, KL is still missing, the cosine is not finite."""
    metric, bits = cell.variant.recipe.metric, cell.variant.recipe.activations
    if metric == "kl" or bits == 6:
        return None
    psnr = 30.0 + 2 * ("l1", "cosine", "mse", "minmax").index(metric) + (0.0, 0.5, 1.3)[cell.seed]
    figures = {
        "psnr": psnr,
        "fd": None if metric == "cosine" else 10 ** (2 - (psnr - 30) / 2),
        "fd_real": 40 - psnr,
    }
    return {
        "how": "int8 (OpenVINO)",
        "figures": {name: figure(value) for name, value in figures.items()},
        "reference_figures": {"fd_real": {"value": 1.5, "low": 1.0, "high": 2.0, "method": "jackknife"}},
    }


@pytest.fixture(scope="session")
def study(pipeline, quantized) -> dict[str, Any]:  # type: ignore[no-untyped-def]
    """As `octavo study` writes it and `read_study` reads it, its cells made up."""
    options = StudyOptions(
        steps=4, samplers=(Sampler("ddim", 4),), low_bits=((8, 6),), low_bit_tables=("T4",)
    )
    tables = plan_tables(options, pipeline, trace(pipeline))
    return {
        "model": "tiny",
        "made": {
            "command": "octavo study tiny",
            "machine": "x86_64",
            "threads": 2,
            "versions": {"torch": "2"},
        },
        "options": options.to_dict(),
        "finished": False,
        "cells": {"done": 27, "planned": 90, "seconds": 5400.0},
        "tables": tables_of(tables, options.seeds, measured),
        "activation_layers": activations_over_time(pipeline, quantized, options.base_sampler),
    }


@pytest.fixture(scope="session")
def report_data(pipeline, quantized, study) -> ReportData:  # type: ignore[no-untyped-def]
    """30 pairs, so that some are folded away."""
    return gather_report(
        quantized,
        pipeline,
        title="tiny-int8",
        num_images=30,
        steps=4,
        batch_size=10,
        precision="f32",
        rounds=3,
        study=study,
        progress=False,
    )


@pytest.fixture(scope="session")
def page(report_data: ReportData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("report") / "report.html"
    save_report(report_data, out)
    return out


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """Headless Chromium by selenium, with its console and network logs. Skipped, and said so, without either."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    if not chromium or not driver:
        pytest.skip("no chromium and chromedriver: apt-get install chromium chromium-driver")
    webdriver = pytest.importorskip("selenium.webdriver", reason="no selenium: pip install selenium")
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    chrome = webdriver.Chrome(options=options, service=Service(driver))
    yield chrome
    chrome.quit()
