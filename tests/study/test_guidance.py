"""Guidance by several network calls at a step, one after the other: each call keeps its own timestep and condition."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel
from diffusers.utils.torch_utils import randn_tensor

from octavo.calibration import PTQ4DM, PairStore, collect_pairs, trace
from octavo.calibration.collect import plan_batches
from octavo.diffusion import CalibrationPair, call_pipeline, generators
from octavo.study.cells import Cell
from octavo.study.sources import own_samples, pairs_from
from octavo.study.tables import plan_tables
from octavo.study.workbench import Workbench

STEPS = 4
INPUTS = {"class_labels": [1, 2, 3]}


class GuidedInTurn(DDIMPipeline):
    """At each of the first `guided` steps two network calls, with the image's class and with class 0; then only one."""

    guided = STEPS

    @torch.no_grad()
    def __call__(  # type: ignore[no-untyped-def, override]
        self, class_labels, generator=None, num_inference_steps: int = 10, output_type: str = "np"
    ) -> tuple[Any]:
        classes = torch.tensor(class_labels)
        x = randn_tensor((len(classes), 3, 8, 8), generator=generator)
        self.scheduler.set_timesteps(num_inference_steps)
        for k, t in enumerate(self.scheduler.timesteps):
            noise = self.unet(x, t, class_labels=classes).sample
            if k < self.guided:
                noise = 2 * noise - self.unet(x, t, class_labels=0 * classes).sample
            x = self.scheduler.step(noise, t, x).prev_sample
        images = (x / 2 + 0.5).clamp(0, 1)
        return (images if output_type == "pt" else images.permute(0, 2, 3, 1).numpy(),)


@pytest.fixture(scope="module")
def guided() -> GuidedInTurn:
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=8,
        in_channels=3,
        out_channels=3,
        layers_per_block=1,
        block_out_channels=(32, 32),
        norm_num_groups=8,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        num_class_embeds=4,
    )
    return GuidedInTurn(unet.eval(), DDIMScheduler())


def collected(pipeline: GuidedInTurn, recipe: PTQ4DM, folder: Path) -> PairStore:
    return collect_pairs(pipeline, recipe, folder, seed=0, batch_size=4, inputs=INPUTS, progress=False)


def calls(store: PairStore) -> list[CalibrationPair]:
    return [pair for batch in store for pair in batch]


def told(pairs: list[CalibrationPair]) -> list[tuple[int, int, int, int]]:
    """Image, steps left, and what the network is told: timestep and class."""
    return [
        (pair.image, pair.steps_left, int(pair.args["timestep"]), int(pair.args["class_labels"]))
        for pair in pairs
    ]


def as_published(recipe: PTQ4DM, guided: int) -> list[tuple[int, int, int, int]]:
    """`told` as the plan has it: each draw's label in every call of its step, the class, then class 0 if guided."""
    return [
        (image, steps_left, label - 1, condition)
        for batch in plan_batches(recipe, STEPS, 0, 4)
        for image, captured, labels in zip(batch.images, batch.captured, batch.labels or [], strict=True)
        for steps_left, label in zip(captured, labels, strict=True)
        for condition in ((image % 3 + 1, 0) if STEPS - steps_left < guided else (image % 3 + 1,))
    ]


def test_as_published_mislabels_every_call_of_a_step_alike(guided: GuidedInTurn, tmp_path: Path) -> None:
    recipe = PTQ4DM(samples=24, steps=STEPS, timesteps="as_published", pairs_per_trajectory=8)
    pairs = calls(collected(guided, recipe, tmp_path))
    assert told(pairs) == as_published(recipe, STEPS) and len(pairs) == 2 * 24
    for first, second in zip(pairs[::2], pairs[1::2], strict=True):
        assert torch.equal(first.args["sample"], second.args["sample"])
    assert any(int(pair.args["timestep"]) != pair.steps_left - 1 for pair in pairs), "the index is inverted"


def test_as_published_where_only_some_steps_are_guided(
    guided: GuidedInTurn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(GuidedInTurn, "guided", 2)
    recipe = PTQ4DM(samples=24, steps=STEPS, timesteps="as_published", pairs_per_trajectory=8)
    pairs = calls(collected(guided, recipe, tmp_path))
    assert told(pairs) == as_published(recipe, 2) and 24 < len(pairs) < 2 * 24


def test_other_sources_give_the_calls_of_a_step_one_sample(guided: GuidedInTurn, tmp_path: Path) -> None:
    recipe = PTQ4DM(samples=24, steps=STEPS, pairs_per_trajectory=8)
    pairs = collected(guided, recipe, tmp_path / "denoising")
    clean = own_samples(guided, 3, steps=STEPS, seed=0, batch_size=2, inputs=INPUTS)
    images = call_pipeline(
        guided, generators=generators(0, 0, 2), num_inference_steps=STEPS, output_type="pt", inputs=INPUTS
    )
    torch.testing.assert_close((clean[:2] / 2 + 0.5).clamp(0, 1), images)
    for source in ("forward", "noise", "raw"):
        store = pairs_from(source, pairs, tmp_path / source, guided.scheduler, clean, steps=STEPS, seed=0)
        made = calls(store)
        assert told(made) == told(calls(pairs)) and len(made) == 2 * 24
        samples = [pair.args["sample"] for pair in made]
        assert all(torch.equal(*both) for both in zip(samples[::2], samples[1::2], strict=True))
        drawn = {sample.numpy().tobytes() for sample in samples}
        assert len(drawn) == (3 if source == "raw" else 24)  # a step drawn twice has noise of its own
        if source == "raw":
            assert all(torch.equal(pair.args["sample"][0], clean[pair.image]) for pair in made)


def test_the_row_as_published_measures_these_pairs(
    guided: GuidedInTurn, options, by_torch, tmp_path: Path
) -> None:  # type: ignore[no-untyped-def]
    traced = trace(guided, INPUTS)
    (table,) = plan_tables(replace(options, tables=("T3",)), guided, traced)
    (row,) = [row for row in table.rows if row.label.startswith("as published")]
    assert row.variant is not None
    bench = Workbench(
        guided, traced, options, tmp_path / "work", tmp_path / "references", "tiny", inputs=INPUTS
    )
    measured = bench.measure(Cell(row.variant, 0))
    assert measured["figures"]["psnr"]["value"] > 5
    (folder,) = bench.work.glob("pairs-*/denoising")
    stored = calls(PairStore(folder, len(list(folder.glob("pairs-*")))))
    assert len(stored) == 2 * options.samples and {pair.steps_left for pair in stored} <= {1, 2, 3, 4}
    assert {int(pair.args["timestep"]) for pair in stored} <= {0, 1, 2, 3}
