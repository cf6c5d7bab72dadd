"""One small report for all tests, and a real browser to look at it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from octavo.report import ReportData, gather_report, save_report

STUDY = {
    "model": "tiny",
    "finished": False,
    "tables": [
        {
            "name": "T4",
            "title": "metric",
            "bits": "W8A8",
            "base": "MSE (p = 2.4)",
            "notes": ["Executed as: openvino."],
            "rows": [
                {
                    "label": label,
                    "kind": "quantized",
                    "figures": {
                        "psnr": {"value": value, "low": value - 1, "high": value + 1, "method": "t"},
                        "fd": {"value": None, "low": None, "high": None, "method": "not finite"},
                    },
                    "paper": {"is": 7.38, "fid": 100.52, "sfid": 63.01, "note": ""},
                }
                for label, value in (("L1", 31.5), ("MSE (p = 2.4)", 40.25))
            ]
            + [{"label": "KL", "kind": "pending", "figures": {}, "paper": None}],
        }
    ],
}


@pytest.fixture(scope="session")
def report_data(pipeline, quantized) -> ReportData:  # type: ignore[no-untyped-def]
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
        study=STUDY,
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
