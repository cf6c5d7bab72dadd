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


def test_keywords_that_forward_collects_stand_beside_the_others() -> None:
    def collecting(sample, timestep, **conditions):  # type: ignore[no-untyped-def]
        return sample

    call = take_apart(collecting, (torch.zeros(2, 3), 1), {"states": torch.ones(2, 4)})
    assert call.names == ("sample", "timestep", "states")
    assert set(call.kwargs(call.tensors)) == {"sample", "timestep", "states"}


def test_return_dict_is_found_by_position() -> None:
    x = torch.zeros(1, 2)
    assert take_apart(forward, (x, 1), {}).return_dict
    assert not take_apart(forward, (x, 1, None, None, True, False), {}).return_dict


def test_gradients_are_left_behind_and_the_dtype_is_kept() -> None:
    call = take_apart(forward, (torch.zeros(1, 2, dtype=torch.bfloat16, requires_grad=True), 1), {})
    assert call.dtype == torch.bfloat16
    assert call.tensors[0].dtype == torch.float32 and not call.tensors[0].requires_grad


def test_positions_are_no_rows_even_where_there_are_as_many() -> None:
    def flux(hidden_states, timestep, img_ids):  # type: ignore[no-untyped-def]
        return hidden_states

    call = take_apart(flux, (torch.zeros(4, 4, 8), 0.5, torch.zeros(4, 3)), {})
    assert call.row_dynamic_shapes() == ((-1, 4, 8), (-1,), (4, 3))
    assert [tuple(part.shape) for part in call.part(1, 2)] == [(2, 4, 8), (2,), (4, 3)]
