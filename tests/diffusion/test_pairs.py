from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler
from safetensors.torch import load_file, save_file

from octavo.diffusion import CalibrationPair, capture_pairs, collate, flatten, generators, unflatten
from octavo.errors import OctavoError


def pair(image: int = 0, rows: int = 2, **more: Any) -> CalibrationPair:
    rng = torch.Generator().manual_seed(image)
    args = {
        "sample": torch.randn(rows, 3, 4, 4, generator=rng),
        "timestep": torch.tensor(17 + image),
        "added": {
            "ids": torch.arange(rows * 2).reshape(rows, 2),
            "states": [torch.randn(rows, 5, generator=rng)],
        },
        "residuals": (torch.randn(rows, 2, generator=rng), None),
        "frequencies": torch.ones(7),
        "return_dict": False,
        **more,
    }
    per_row = frozenset({"sample", "added.ids", "added.states.0", "residuals.0"})
    return CalibrationPair(args, per_row, rows, image, step=3, steps_left=7)


def assert_same(a: Any, b: Any) -> None:
    assert type(a) is type(b)
    if isinstance(a, dict):
        assert list(a) == list(b)
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for one, other in zip(a, b, strict=True):
            assert_same(one, other)
    elif torch.is_tensor(a):
        assert a.dtype == b.dtype and torch.equal(a, b)
    else:
        assert a == b


def test_round_trip_through_files(tmp_path: Path) -> None:
    original = pair(scale=0.5, half=torch.ones(2, dtype=torch.bfloat16))
    tensors, description = flatten(original)
    save_file(tensors, tmp_path / "pair.safetensors")
    stored = unflatten(load_file(tmp_path / "pair.safetensors"), json.loads(json.dumps(description)))
    assert_same(vars(stored), vars(original))


def test_what_cannot_be_stored_is_named() -> None:
    with pytest.raises(OctavoError, match=r"extra\.1 is a Generator, which cannot be stored"):
        flatten(pair(extra=[1, torch.Generator()]))


@pytest.mark.parametrize("spoil", ["args", "per_row", "num_rows"])
def test_damaged_descriptions(spoil: str) -> None:
    tensors, description = flatten(pair())
    with pytest.raises(OctavoError, match="do not fit"):
        unflatten(tensors, {key: value for key, value in description.items() if key != spoil})
    with pytest.raises(OctavoError, match="do not fit"):
        unflatten({}, description)


def test_collate_joins_rows_and_keeps_the_rest() -> None:
    one, other = pair(0, rows=2), pair(1, rows=1)
    batch = collate([one, other])
    assert batch["timestep"].tolist() == [17, 17, 18]
    assert torch.equal(batch["sample"], torch.cat([one.args["sample"], other.args["sample"]]))
    assert torch.equal(batch["added"]["states"][0][2:], other.args["added"]["states"][0])
    assert batch["residuals"][0].shape == (3, 2) and batch["residuals"][1] is None
    assert batch["frequencies"].shape == (7,) and batch["return_dict"] is False


@pytest.mark.parametrize(
    ("timestep", "expected"),
    [
        (9, torch.tensor([9, 9])),
        (2.5, torch.tensor([2.5, 2.5], dtype=torch.float64)),
        (torch.tensor(2.5), torch.tensor([2.5, 2.5])),
        (torch.tensor([9]), torch.tensor([9, 9])),
        (torch.tensor([9, 8]), torch.tensor([9, 8])),
    ],
)
def test_timesteps_in_any_form_become_one_per_row(timestep: Any, expected: torch.Tensor) -> None:
    batch = collate([pair(timestep=timestep)])
    assert batch["timestep"].dtype == expected.dtype and torch.equal(batch["timestep"], expected)


def test_a_collated_batch_evaluates_as_its_pairs_do(ddpm: Any) -> None:
    pipeline = ddpm(DDPMScheduler())
    pairs = capture_pairs(pipeline, [[5], [2], [3, 1]], generators=generators(0, 0, 3), num_inference_steps=5)
    with torch.no_grad():
        together = pipeline.unet(**collate(pairs)).sample
        apart = torch.cat([pipeline.unet(**one.args).sample for one in pairs])
    torch.testing.assert_close(together, apart, rtol=1e-5, atol=1e-5)


def test_pairs_that_do_not_go_together() -> None:
    one = pair()
    longer = pair(1)
    longer.args["sample"] = torch.zeros(2, 3, 8, 8)
    for others, message in (
        ([], "there is none"),
        ([one, pair(1, scale=0.5)], "scale is in some of the pairs only"),
        ([one, pair(1, return_dict=True)], "return_dict is not the same"),
        ([one, pair(1, frequencies=torch.zeros(7))], "frequencies is not the same"),
        ([one, longer], "sample has rows of 2 shapes"),
        ([one, replace(one, per_row=one.per_row - {"sample"})], "sample is cut into rows in some"),
    ):
        with pytest.raises(OctavoError, match=message):
            collate(others)
