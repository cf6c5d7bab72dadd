"""What the report says of a model that is too far from its original."""

from __future__ import annotations

import pytest

from octavo.report import ReportData
from octavo.report.data import Gallery, ImagePair, Interval, Verdict
from octavo.report.words import checks, headline


@pytest.mark.parametrize(
    ("decibels", "told", "limit"),
    [
        (45.0, "and 45.0 dB from full precision.", None),
        (30.0, "and 30.0 dB from full precision.", None),
        (29.9, "but 29.9 dB from full precision: visibly different.", "below 30 dB"),
        (20.0, "but 20.0 dB from full precision: visibly different.", "below 30 dB"),
        (11.2, "but 11.2 dB from full precision: visibly different, not fit to ship.", "below 20 dB"),
        (float("nan"), "but nan dB from full precision: visibly different, not fit to ship.", "below 20 dB"),
    ],
)
def test_a_bad_model_is_called_one(decibels: float, told: str, limit: str | None) -> None:
    data = ReportData("m", {}, Verdict(25, 100, Interval(decibels), 8))
    assert headline(data).endswith(told)
    found = checks(data)
    assert bool(found) == bool(limit)
    for check in found:
        assert check["sign"] == "\u2717" and limit and limit in check["text"]


@pytest.mark.parametrize(("decibels", "sign"), [(28.0, "\u2013"), (17.5, "\u2717")])
def test_one_bad_image_speaks_against_a_good_mean(decibels: float, sign: str) -> None:
    gallery = Gallery([ImagePair(3, decibels, "", "", "")], 64, 1.0, 8, 8)
    (check,) = checks(ReportData("m", {}, Verdict(25, 100, Interval(45.0), 64), gallery=gallery))
    assert check["sign"] == sign and f"{decibels:.1f} dB" in check["text"]
