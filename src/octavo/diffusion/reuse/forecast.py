"""Deep features forecast at a step from those of the last whole steps."""

from __future__ import annotations

from collections.abc import Sequence

MAX_ORDER = 2


def forecast_weights(known: Sequence[float], timestep: float) -> tuple[float, ...]:
    """The weights c, one for each of `known`, of the forecast h(timestep) = sum over k of c_k h(known_k).

    Their sum is 1.

    known: the timesteps of the last m + 1 whole steps, all different. The forecast is the polynomial of degree m in the
    timestep through the features there (Newton's divided differences, written as Lagrange's weights):

        m = 0    h(t_1), the features reused as they are: DeepCache (2312.00858)
        m = 1    h(t_1) + (t - t_1) / (t_1 - t_2) (h(t_1) - h(t_2))

    TaylorSeer (2503.06923) forecasts so with a Taylor series whose derivatives are finite differences of evenly spaced
    whole steps; its first order is m = 1, its second has k^2 where Newton's form has k (k + N).

    >>> forecast_weights([600.0, 900.0], 500.0)
    (1.3333333333333333, -0.3333333333333333)
    >>> forecast_weights([600.0], 500.0)
    (1.0,)
    """
    weights = []
    for own in known:
        weight = 1.0
        for other in known:
            if other != own:
                weight *= (timestep - other) / (own - other)
        weights.append(weight)
    return tuple(weights)
