"""Forecasts: exact for what is a polynomial in the timestep."""

from __future__ import annotations

import pytest

from octavo.diffusion.reuse import forecast_weights

KNOWN = [300.0, 450.0, 800.0]


@pytest.mark.parametrize("order", [0, 1, 2])
def test_polynomials_are_forecast_exactly(order: int) -> None:
    known = KNOWN[: order + 1]
    for timestep in (299.0, 120.0, 1.0):
        weights = forecast_weights(known, timestep)
        for degree in range(order + 1):
            told = sum(weight * t**degree for weight, t in zip(weights, known, strict=True))
            assert told == pytest.approx(timestep**degree)
        beyond = sum(weight * t ** (order + 1) for weight, t in zip(weights, known, strict=True))
        assert beyond != pytest.approx(timestep ** (order + 1), rel=1e-3)


def test_what_is_known_is_returned() -> None:
    for k, timestep in enumerate(KNOWN):
        assert forecast_weights(KNOWN, timestep) == tuple(float(i == k) for i in range(3))
