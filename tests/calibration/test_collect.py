from __future__ import annotations

from pathlib import Path

import pytest
import torch

from octavo.calibration import PTQ4DM, collect_pairs
from octavo.calibration.collect import plan_batches
from octavo.diffusion import Single
from octavo.errors import OctavoError


def test_every_drawn_pair_is_caught_with_its_timestep(pipeline, recipe, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    store = collect_pairs(pipeline, recipe, tmp_path, batch_size=4, progress=False)
    pipeline.scheduler.set_timesteps(recipe.steps)
    timesteps = pipeline.scheduler.timesteps.tolist()
    pairs = [pair for batch in store for pair in batch]
    assert len(pairs) == recipe.samples
    planned = [t for batch in plan_batches(recipe, recipe.steps, 0, 4) for row in batch.captured for t in row]
    assert [pair.steps_left for pair in pairs] == planned
    for pair in pairs:
        assert int(pair.args["timestep"]) == timesteps[recipe.steps - pair.steps_left]


def test_no_image_is_calibrated_on_that_is_sampled_from_the_same_seed(pipeline, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    recipe = PTQ4DM(samples=3, steps=2, timesteps=Single(1.0), pairs_per_trajectory=1)
    store = collect_pairs(pipeline, recipe, tmp_path, seed=5, batch_size=3, progress=False)
    for pair in store.load(0):
        (noise,) = pair.args["sample"]
        own, sampled = (
            torch.randn(noise.shape, generator=torch.Generator().manual_seed(seed + 5 + pair.image))
            for seed in (2**31, 0)
        )
        assert torch.equal(noise, own) and not torch.equal(noise, sampled)


def test_batches_are_sorted_so_that_they_can_stop_early() -> None:
    batches = plan_batches(PTQ4DM(samples=64, steps=50, pairs_per_trajectory=1), 50, 0, 8)
    reached = [min(t for row in batch.captured for t in row) for batch in batches]
    assert reached == sorted(reached, reverse=True)
    assert sorted(k for batch in batches for k in batch.images) == list(range(64))
    assert sum(batch.evaluations for batch in batches) < 8 * 50


def test_several_pairs_of_one_trajectory_need_fewer_trajectories() -> None:
    batches = plan_batches(PTQ4DM(samples=10, steps=50, pairs_per_trajectory=4), 50, 0, 8)
    assert [len(batch.images) for batch in batches] == [3]
    assert sorted(len(row) for row in batches[0].captured) == [2, 4, 4]


def test_a_step_drawn_twice_is_kept_twice(pipeline, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    recipe = PTQ4DM(samples=12, steps=4, pairs_per_trajectory=6)
    store = collect_pairs(pipeline, recipe, tmp_path, batch_size=2, progress=False)
    pairs = store.load(0)
    (batch,) = plan_batches(recipe, 4, 0, 2)
    assert [pair.steps_left for pair in pairs] == [t for row in batch.captured for t in row]
    assert [pair.image for pair in pairs] == [k for k in batch.images for _ in range(6)]
    assert len({(pair.image, pair.steps_left) for pair in pairs}) < len(pairs)


def test_a_batch_on_disk_is_not_computed_again(pipeline, recipe, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    store = collect_pairs(pipeline, recipe, tmp_path, batch_size=4, progress=False)
    whole = store.path(1).read_bytes()
    kept = store.path(0).stat().st_mtime_ns
    store.path(1).unlink()
    again = collect_pairs(pipeline, recipe, tmp_path, batch_size=4, progress=False)
    assert again.path(1).read_bytes() == whole
    assert again.path(0).stat().st_mtime_ns == kept


def test_as_published_mislabels_as_the_research_code_does(pipeline, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    recipe = PTQ4DM(samples=6, steps=4, timesteps="as_published", pairs_per_trajectory=1)
    store = collect_pairs(pipeline, recipe, tmp_path, batch_size=6, progress=False)
    (batch,) = plan_batches(recipe, 4, 0, 6)
    fed = [int(pair.args["timestep"]) for pair in store.load(0)]
    assert batch.labels is not None
    assert fed == [label - 1 for row in batch.labels for label in row]


def test_a_damaged_batch_is_named(pipeline, recipe, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    store = collect_pairs(pipeline, recipe, tmp_path, batch_size=12, progress=False)
    store.path(0).write_bytes(store.path(0).read_bytes()[:-100])
    with pytest.raises(OctavoError, match="pairs-00000"):
        store.load(0)


def test_image_noise_does_not_depend_on_the_batch(pipeline, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    recipe = PTQ4DM(samples=6, steps=3, timesteps="single", pairs_per_trajectory=1)
    first = collect_pairs(pipeline, PTQ4DM(samples=6, steps=3), tmp_path / "a", batch_size=6, progress=False)
    del first
    alone = collect_pairs(pipeline, recipe, tmp_path / "b", batch_size=1, progress=False)
    together = collect_pairs(pipeline, recipe, tmp_path / "c", batch_size=6, progress=False)
    a = torch.cat([pair.args["sample"] for batch in alone for pair in batch])
    b = torch.cat([pair.args["sample"] for batch in together for pair in batch])
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_as_published_keeps_both_labels_of_a_step_drawn_twice(pipeline, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """Index T-1 and T-2 are both caught with one step left, and are told different indices."""
    recipe = PTQ4DM(samples=24, steps=4, timesteps="as_published", pairs_per_trajectory=12)
    (planned,) = plan_batches(recipe, 4, 0, 8)
    assert planned.labels is not None
    (batch,) = collect_pairs(pipeline, recipe, tmp_path, batch_size=8, progress=False)
    told = [int(pair.args["timestep"]) + 1 for pair in batch]
    assert told == [label for row in planned.labels for label in row]
    caught = [(pair.image, pair.steps_left) for pair in batch]
    assert any(caught[i] == caught[j] and told[i] != told[j] for i in range(len(told)) for j in range(i)), (
        "the case is there"
    )
