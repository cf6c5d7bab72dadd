from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from octavo.quantization import METRICS

DISTANCES = [name for name, metric in METRICS.items() if metric.distance is not None]


@pytest.mark.parametrize("name", DISTANCES)
def test_counts_are_repetitions_of_values(name: str, generator: torch.Generator) -> None:
    x = torch.linspace(-2, 2, 40)
    x_sim = (x * 3).round() / 3
    counts = torch.randint(1, 9, (40,), generator=generator)
    distance = METRICS[name].distance
    assert distance is not None
    weighted = distance(x, x_sim, counts.double(), -1)
    if name == "kl":  # its values are bins: repetition is what the counts say
        assert torch.isclose(weighted, distance(x, x_sim, 7 * counts.double(), -1))
    else:
        repeated = distance(x.repeat_interleave(counts), x_sim.repeat_interleave(counts), None, -1)
        assert torch.isclose(weighted, repeated, rtol=1e-5)


@pytest.mark.parametrize("name", DISTANCES)
def test_rows_are_independent(name: str, generator: torch.Generator) -> None:
    x = torch.randn(3, 50, generator=generator).sort(-1).values
    x_sim = (x * 2).round() / 2
    counts = torch.rand(3, 50, generator=generator).double()
    distance = METRICS[name].distance
    assert distance is not None
    rows = torch.stack([distance(x[i], x_sim[i], counts[i], -1) for i in range(3)])
    torch.testing.assert_close(distance(x, x_sim, counts, -1), rows)
    torch.testing.assert_close(distance(x.T, x_sim.T, counts.T, 0), rows)


def test_lp_and_l1_by_hand() -> None:
    x, x_sim = torch.tensor([0.0, 1.0, -3.0]), torch.tensor([0.5, 1.0, -1.0])
    for name, p in (("mse", 2.4), ("l1", 1.0)):
        distance = METRICS[name].distance
        assert distance is not None
        assert math.isclose(distance(x, x_sim, None, -1).item(), 0.5**p + 2.0**p, rel_tol=1e-6)


def test_cosine_agrees_with_torch(generator: torch.Generator) -> None:
    x, y = torch.randn(2, 100, generator=generator)
    distance = METRICS["cosine"].distance
    assert distance is not None
    expected = 1 - F.cosine_similarity(x.double(), y.double(), dim=0)
    torch.testing.assert_close(distance(x, y, None, -1), expected)
    zeros = torch.zeros(100)
    assert distance(zeros, zeros, None, -1) == 0
    assert distance(x, zeros, None, -1) == 1


def test_kl_loses_exactly_nothing_where_every_cell_is_even() -> None:
    distance = METRICS["kl"].distance
    assert distance is not None
    x = torch.arange(9.0)
    for shares in (1, 2, 3, 4, 9):  # of a ninth each, whose sums are not exact: ties would fall to chance
        assert (
            distance(
                x, (x / shares).floor() * shares + (shares - 1) / 2, None, -1, step=torch.tensor([shares])
            )
            == 0
        )


def test_kl_by_brute_force() -> None:
    counts = [3.0, 1.0, 0.0, 4.0, 2.0, 6.0]
    cells = [0, 0, 1, 1, 1, 2]
    expected = 0.0
    for i, (count, cell) in enumerate(zip(counts, cells, strict=True)):
        members = [counts[j] for j in range(6) if cells[j] == cell and counts[j] > 0]
        if counts[i] > 0:
            expected += count / 16 * math.log(count / (sum(members) / len(members)))
    distance = METRICS["kl"].distance
    assert distance is not None
    x_sim = torch.tensor([0.5, 0.5, 3.0, 3.0, 3.0, 5.5])
    found = distance(torch.arange(6.0), x_sim, torch.tensor(counts), -1, step=torch.tensor([2.5]))
    assert math.isclose(found.item(), expected, rel_tol=1e-9)


def test_kl_counts_what_is_clipped_at_the_ends_of_the_range() -> None:
    # bins 0..7; integers of step 2 hold bins {2, 3} and {4, 5}: bins 0, 1 and 6, 7 are clipped
    counts = [2.0, 1.0, 5.0, 4.0, 3.0, 0.0, 2.0, 1.0]
    p = [
        2.0 + 1.0 + 5.0,
        4.0,
        3.0 + 2.0 + 1.0,
    ]  # bins 2, 3 and 4: bin 5 is empty, so 4 is the last that is held
    q = [4.5, 4.5, 3.0]
    expected = sum(a / 18 * math.log((a / 18) / (b / 12)) for a, b in zip(p, q, strict=True))
    distance = METRICS["kl"].distance
    assert distance is not None
    x_sim = torch.tensor([2.5] * 4 + [4.5] * 4)
    found = distance(torch.arange(8.0), x_sim, torch.tensor(counts), -1, step=torch.tensor([2.0]))
    assert math.isclose(found.item(), expected, rel_tol=1e-9)
    assert torch.equal(found, distance(torch.arange(8.0), x_sim, torch.tensor(counts), -1))  # the step, found


def test_kl_is_infinite_where_everything_is_clipped() -> None:
    distance = METRICS["kl"].distance
    assert distance is not None
    assert distance(torch.tensor([5.0, 6.0]), torch.zeros(2), None, -1, step=torch.ones(1)) == math.inf


def test_kl_charges_a_flat_tail_for_being_clipped() -> None:
    """Counted as belonging to the end integer, an even tail would cost nothing however much of it is cut off."""
    distance = METRICS["kl"].distance
    assert distance is not None
    x = torch.arange(100.0)
    losses = [
        distance(x, x.clamp(max=high), None, -1, step=torch.ones(1)).item() for high in (99, 80, 50, 20)
    ]
    assert losses[0] == 0
    assert losses == sorted(losses)
    assert losses[1] > 0.1
