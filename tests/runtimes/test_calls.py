from __future__ import annotations

import torch

from octavo.runtimes.calls import take_apart


def forward(sample, timestep, states=None, added=None, flag=True, return_dict=True):  # type: ignore[no-untyped-def]
    return sample


def test_every_form_of_timestep_becomes_one_per_row() -> None:
    x = torch.zeros(3, 2)
    for timestep in (7, 7.0, torch.tensor(7), torch.tensor([7, 7, 7]), torch.tensor([7])):
        call = take_apart(forward, (x, timestep), {})
        assert call.names == ("sample", "timestep")
        assert torch.equal(call.tensors[1], torch.full((3,), 7.0))


def test_defaults_and_return_dict_make_no_difference() -> None:
    x = torch.zeros(1, 2)
    plain = take_apart(forward, (x, 1), {})
    wordy = take_apart(
        forward, (), {"sample": x, "timestep": 1, "states": None, "flag": True, "return_dict": False}
    )
    assert plain.constants == wordy.constants and plain.names == wordy.names
    assert take_apart(forward, (x, 1), {"flag": False}).constants != plain.constants


def test_nested_tensors_come_back_in_their_places() -> None:
    x, ids = torch.zeros(2, 2), torch.ones(2, 6, dtype=torch.int64)
    extra = [torch.ones(2, 1), torch.ones(2, 2)]
    call = take_apart(forward, (x, 1), {"added": {"ids": ids, "extra": extra, "name": "a"}})
    assert call.names == ("sample", "timestep", "added.ids", "added.extra.0", "added.extra.1")
    again = call.kwargs(call.tensors)
    assert again["added"]["ids"] is call.tensors[2] and again["added"]["name"] == "a"
    assert call.tensors[2].dtype == torch.int64


def test_tracing_example_repeats_rows_and_leaves_other_tensors() -> None:
    call = take_apart(forward, (torch.arange(3.0).view(1, 3), 5), {"states": torch.zeros(7, 4)})
    sample, timestep, states = call.batched(2)
    assert sample.shape == (2, 3) and timestep.shape == (2,) and states.shape == (7, 4)
    assert call.row_dynamic_shapes() == ((-1, 3), (-1,), (7, 4))
