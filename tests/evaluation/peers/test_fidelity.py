from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

from octavo.evaluation.peers.fidelity import below_best, fidelity, first_tensor, keeping
from octavo.evaluation.similarity import psnr


def test_of_images_it_is_the_psnr_of_octavo_evaluate() -> None:
    exact = torch.rand(1, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    other = (exact + 0.03 * torch.randn(exact.shape, generator=torch.Generator().manual_seed(1))).clamp(0, 1)
    found = fidelity({"fp32": exact, "int8": other}, "fp32", 1.0)["int8"]
    expected = psnr(*(np.moveaxis(x.numpy(), 1, -1) for x in (other, exact)))
    assert found["psnr"] == pytest.approx(float(expected[0]), abs=1e-3)
    assert found["relative_error"] == pytest.approx(float((other - exact).norm() / exact.norm()), rel=1e-4)


def test_of_predictions_the_peak_is_their_range_so_that_scale_does_not_matter() -> None:
    exact = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    other = exact + 0.1
    found = [fidelity({"fp32": k * exact, "x": k * other}, "fp32")["x"] for k in (1.0, 50.0)]
    expected = 20 * math.log10(float(exact.max() - exact.min()) / 0.1)
    assert found[0]["psnr"] == pytest.approx(expected, abs=1e-2) and found[0] == pytest.approx(found[1])


@pytest.mark.parametrize("value", [0.0, 3.0, float("nan"), float("inf")])
def test_what_is_no_number_is_null_in_json(value: float) -> None:
    exact = torch.full((2, 2), value)
    found = fidelity({"fp32": exact, "int8": exact + 1.0}, "fp32")
    assert found["int8"]["psnr"] is None and found["fp32"]["psnr"] is None
    json.dumps(found, allow_nan=False)


def test_engines_leave_what_they_returned_last() -> None:
    values = iter(range(10))
    timed, outputs = keeping({"a": lambda: next(values), "b": lambda: {"y": (torch.ones(1),)}})
    assert timed["a"]() == 0 and timed["a"]() == 1 == outputs["a"]
    timed["b"]()
    assert first_tensor(outputs["b"]).dtype == torch.float64


def test_half_a_decibel_is_allowed() -> None:
    assert below_best(39.5, 40.0)["holds"] and not below_best(39.4, 40.0)["holds"]
    assert below_best(41.0, 40.0)["below"] == -1.0
    assert below_best(None, 40.0)["holds"] is None
