"""Results kept between passes: the bits of computing everything again, and none kept that are more than tensors."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from tiny_families import FAMILIES, build
from tiny_guided import GUIDED
from torch import nn

import octavo
from octavo.calibration import collect_pairs, kept_results, second_order
from octavo.calibration.calls import watched_calls
from octavo.calibration.evaluate import evaluate_rows, evaluations, rows_at_once
from octavo.calibration.kept_results import KeptResults, folder_beside
from octavo.calibration.second_order import round_again
from octavo.diffusion import find_denoiser
from octavo.errors import OctavoError
from octavo.quantization import quantized_layers

RECIPE = octavo.PTQ4DM(weights=4, samples=4, steps=3, pairs_per_trajectory=2)


@pytest.mark.filterwarnings(
    "ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning"
)
@pytest.mark.parametrize("family", ["sd", "sd3", "flux", "svd", "lumina2"])
def test_of_a_network_in_many_passes_nothing_runs_a_third_time_and_to_the_same_bits(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline, inputs = build(family, {**GUIDED, **FAMILIES})
    component, denoiser = find_denoiser(pipeline)
    options: Any = {"batch_size": 2, "inputs": inputs, "progress": False}
    coarse = getattr(octavo.quantize(pipeline, RECIPE, **options), component)
    pairs = collect_pairs(pipeline, RECIPE, tmp_path, **options)
    layers = dict(quantized_layers(coarse))
    monkeypatch.setattr(
        second_order, "MOMENT_BYTES", sum(map(second_order._moment_bytes, layers.values())) // 8
    )
    passes = len(second_order._passes(layers))
    assert passes > 6
    first = next(iter(rows_at_once(pairs.load(0))))
    with torch.inference_mode():
        calls = Counter(call.module for call in watched_calls(coarse, lambda: evaluate_rows(coarse, first)))
    found, runs = [], []
    for state in (None, tmp_path / "state.safetensors"):
        network, ran = copy.deepcopy(coarse), Counter[str]()
        for name, layer in quantized_layers(network):
            layer.accumulate = _counted(name, layer.accumulate, ran)  # type: ignore[method-assign]
        round_again(network, denoiser, pairs, state=state, progress=False)
        found.append({name: layer.weight_int8 for name, layer in quantized_layers(network)})
        runs.append(ran)
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())
    # one evaluation is watched, and in the last pass the last layer is not reached
    assert all(runs[1][name] <= calls[name] * (1 + 2 * evaluations(pairs)) for name in layers)
    assert max(runs[0][name] / calls[name] for name in layers) > 1 + passes // 2 * evaluations(pairs)
    assert {path.name for path in tmp_path.iterdir()} == {"pairs-00000.safetensors", "state.safetensors"}


def _counted(name: str, accumulate: Callable[..., Any], ran: Counter[str]) -> Callable[..., Any]:
    def counted(*args: Any) -> Any:
        ran[name] += 1
        return accumulate(*args)

    return counted


class Parts(nn.Module):
    """Five parts, one behind the other, whose layers are doubled after the pass that is theirs."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.parts = nn.ModuleList([nn.Sequential(nn.Linear(4, 4), nn.SiLU()) for _ in range(5)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first = x
        for i, part in enumerate(self.parts):
            x = part(x)
            first = x if i == 0 else first
        return x + first

    def passes(self, kept: KeptResults | None, rows: list[torch.Tensor]) -> list[torch.Tensor]:
        seen = []
        for i, part in enumerate(self.parts):
            if kept:
                kept.begin_pass({f"parts.{j}.0" for j in range(i, 5)}, is_last=i == 4)
            for number, x in enumerate(rows):
                if kept:
                    with kept.evaluation(number):
                        seen.append(self(x))
                else:
                    seen.append(self(x))
            part[0].weight.mul_(2)
        return seen


def parts_and_kept(folder: Path, limit: int | None = None) -> tuple[Parts, KeptResults]:
    network = Parts()
    calls = watched_calls(network, lambda: network(torch.ones(1, 4)))
    return network, KeptResults(network, calls, folder, limit)


ROWS = [torch.full((1, 4), float(i)) for i in range(3)]


@pytest.mark.parametrize("limit", [0, 40, None])
def test_what_there_is_no_room_for_is_computed_again(limit: int | None, tmp_path: Path) -> None:
    network, kept = parts_and_kept(tmp_path / "kept", limit)
    ran: list[int] = []
    network.parts[0][1].register_forward_hook(lambda *_: ran.append(0))
    with torch.inference_mode():
        ours = network.passes(kept, ROWS)
        theirs = Parts().passes(None, ROWS)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    # of three rows, in the first two of five passes; in all five where there is no room. 40 bytes hold two results
    fewest, most = {0: (15, 15), 40: (7, 14), None: (6, 6)}[limit]
    assert fewest <= len(ran) <= most


def test_a_disk_that_is_full_keeps_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    network, kept = parts_and_kept(tmp_path / "kept")

    def full(tensors: Any, path: Path) -> None:
        path.write_bytes(b"half")
        raise SafetensorError("No space left on device (os error 28)")

    monkeypatch.setattr(kept_results, "save_file", full)
    with torch.inference_mode():
        ours, theirs = network.passes(kept, ROWS), Parts().passes(None, ROWS)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert not list((tmp_path / "kept").iterdir())


def test_only_what_is_read_again_is_on_the_disk(tmp_path: Path) -> None:
    """The first part's result, which the end reads, and the last finished one's."""
    network, kept = parts_and_kept(tmp_path / "kept")
    sizes = []
    network.parts[4].register_forward_hook(lambda *_: sizes.append(len(list((tmp_path / "kept").glob("*")))))
    with torch.inference_mode():
        network.passes(kept, ROWS[:1])
    assert sizes == [
        0,
        1,
        2,
        3,
        2,
    ]  # the second's is read once more, while the third's is made, and dropped behind it
    assert not list((tmp_path / "kept").iterdir())


def test_an_evaluation_that_comes_to_a_changing_layer_early_is_not_kept(tmp_path: Path) -> None:
    network, kept = parts_and_kept(tmp_path / "kept")
    kept.begin_pass({"parts.2.0"})
    with torch.inference_mode():
        with kept.evaluation(0):
            network(ROWS[0])
        assert kept._given_up == set()
        with kept.evaluation(1):
            network.parts[2](ROWS[0])
            network(ROWS[0])
    assert kept._given_up == {1}


def test_an_evaluation_with_other_calls_is_not_kept(tmp_path: Path) -> None:
    """Its first part runs once more, so that every later call of that name would be another one."""
    network, kept = parts_and_kept(tmp_path / "kept")
    kept.begin_pass({"parts.2.0"})
    with torch.inference_mode(), kept.evaluation(0):
        network.parts[0](ROWS[0])
        network(ROWS[0])
    assert kept._given_up == {0}


def test_what_somebody_removed_or_damaged(tmp_path: Path) -> None:
    network, kept = parts_and_kept(tmp_path / "kept")
    kept.begin_pass({f"parts.{i}.0" for i in (2, 3, 4)})
    with torch.inference_mode():
        for number in (0, 1):
            with kept.evaluation(number):
                expected = network(ROWS[0])
        kept.begin_pass({f"parts.{i}.0" for i in (3, 4)})
        for path in (tmp_path / "kept").glob("0-*"):
            path.unlink()
        with kept.evaluation(0):
            assert torch.equal(network(ROWS[0]), expected)
        for path in (tmp_path / "kept").glob("1-*"):
            path.write_bytes(b"half")
        with pytest.raises(OctavoError, match="not readable any more; start again"), kept.evaluation(1):
            network(ROWS[0])
    assert kept._given_up == {0, 1}


def test_what_a_killed_run_left_is_removed(tmp_path: Path) -> None:
    state = tmp_path / "state.safetensors"
    (tmp_path / "state-results").mkdir()
    (tmp_path / "state-results" / "0-0.safetensors").write_bytes(b"half")
    with folder_beside(state) as folder:
        assert folder == tmp_path / "state-results" and not folder.exists()
    with folder_beside(None) as folder:
        assert folder is None


class Twice(nn.Module):
    """A module called within another and behind it, a mask, one result twice, a module whose `forward` is its own."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.SiLU()
        self.inner = nn.Sequential(nn.Linear(4, 4), self.shared)
        self.masked = Masked()
        self.end = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y, mask, same = self.masked(self.inner(x))
        assert same is y
        return self.end(self.shared(y * mask).to(torch.bfloat16).float())


class Masked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.forward = self.own  # type: ignore[method-assign]

    def own(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        y = (x + 1).T.contiguous().T
        return y, y > 0, y


def test_calls_that_share_modules_and_results_of_several_kinds(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = Twice()
    ran: list[str] = []
    with torch.inference_mode():
        calls = watched_calls(network, lambda: network(torch.ones(2, 4)))
        kept = KeptResults(network, calls, tmp_path / "kept")
        kept.begin_pass({"end"})
        x = torch.randn(2, 4, generator=torch.Generator().manual_seed(0))
        with kept.evaluation(0):
            expected = network(x)
        network.shared.register_forward_hook(lambda *_: ran.append("shared"))
        network.inner[0].register_forward_hook(lambda *_: ran.append("linear"))
        kept.begin_pass({"end"})
        with kept.evaluation(0):
            assert torch.equal(network(x), expected)
    assert ran == ["shared"]  # the one behind, given back itself; `inner` is not even asked
    assert "own" in str(vars(network.masked)["forward"]) and "forward" not in vars(network.inner)


class Box(nn.Module):
    """One part, which does as it is told."""

    def __init__(self, does: Callable[[Box, torch.Tensor, list[Any]], Any]) -> None:
        super().__init__()
        self.does, self.layer, self.at = does, nn.Linear(2, 2), 0
        self.cache: list[torch.Tensor] = []

    def forward(self, x: torch.Tensor, more: list[Any]) -> Any:
        return self.does(self, x, more)


class Around(nn.Module):
    def __init__(self, does: Callable[[Box, torch.Tensor, list[Any]], Any]) -> None:
        super().__init__()
        self.box, self.end = Box(does), nn.Linear(2, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        more: list[Any] = []
        result = self.box(x * 1, more)
        if isinstance(result, tuple):
            result = result[0]
        read = [result, *more, *self.box.cache]
        return self.end(sum(read))  # type: ignore[arg-type]


def _kept_in_cache(box: Box, x: torch.Tensor, more: list[Any]) -> Any:
    box.cache.append(x * 2)
    return x + 1


def _counts(box: Box, x: torch.Tensor, more: list[Any]) -> Any:
    box.at += 1
    return x + 1


def _into_arguments(box: Box, x: torch.Tensor, more: list[Any]) -> Any:
    more.append(2)
    return x + 1


def _parts(box: Box, x: torch.Tensor, more: list[Any]) -> Any:
    y = x + 1
    return y[:1], y[1:]


def _overlapping(box: Box, x: torch.Tensor, more: list[Any]) -> Any:
    y = x + 1
    return y[:1], y


@pytest.mark.parametrize(
    ("does", "is_repeatable"),
    [
        (lambda box, x, more: box.layer(x), True),
        (lambda box, x, more: (x + 1, None, 3), True),
        (lambda box, x, more: (x + 1).add_(1), True),
        (lambda box, x, more: x, False),
        (lambda box, x, more: x.view(-1, 2), False),
        (lambda box, x, more: x.add_(1) + 1, False),
        (lambda box, x, more: (x + 1)[:, :1].expand(2, 2), False),
        (lambda box, x, more: (x + 1).T, True),
        (lambda box, x, more: (x + 1, object()), False),
        (lambda box, x, more: x + torch.rand(2, 2), False),
        (lambda box, x, more: nn.functional.dropout(x + 1, training=False), True),
        (_kept_in_cache, False),
        (_counts, False),
        (_into_arguments, False),
        (_parts, True),
        (_overlapping, False),
    ],
)
def test_what_can_be_given_back_instead_of_a_call(does: Any, is_repeatable: bool) -> None:
    network = Around(does)
    with torch.inference_mode():
        calls = watched_calls(network, lambda: network(torch.ones(2, 2)))
    (box,) = [call for call in calls if call.module == "box"]
    assert box.repeatable is is_repeatable
    assert "forward" not in vars(network.box)
