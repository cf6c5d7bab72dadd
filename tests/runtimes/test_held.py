from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from octavo.runtimes import network as networks
from octavo.runtimes.calls import take_apart
from octavo.runtimes.convert import to_openvino
from octavo.runtimes.held import ReadsValues, RefusingToRead, with_held
from octavo.runtimes.kept_graphs import HELD
from octavo.runtimes.openvino import OpenVINOExecutor


@pytest.fixture(autouse=True)
def kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs of this file's networks are cached, as those of known packages are."""
    monkeypatch.setattr(networks, "KNOWN", {*networks.KNOWN, __name__.partition(".")[0]})


class Cut(nn.Module):
    """Cuts its text to the length that it reads in a mask, as Lumina2Transformer2DModel does."""

    def forward(
        self, sample: torch.Tensor, timestep: torch.Tensor, text: torch.Tensor, mask: torch.Tensor
    ) -> torch.Tensor:
        lengths = mask.sum(1).tolist()
        means = [row[:length].mean(0) for row, length in zip(text, lengths, strict=True)]
        return sample * timestep[:, None] + torch.stack(means)


def call_of(lengths: list[int]) -> tuple[torch.Tensor, ...]:
    rows = len(lengths)
    mask = torch.arange(5) < torch.tensor(lengths)[:, None]
    return torch.randn(rows, 4), torch.full((rows,), 7.0), torch.randn(rows, 5, 4), mask


def test_a_mask_whose_lengths_are_read_has_a_graph_for_each_of_its_values(tmp_path: Path) -> None:
    network = Cut().eval()
    for _ in range(2):  # converted, and from the cache
        executor = OpenVINOExecutor(network, precision="f32", cache=tmp_path)
        for lengths in ([2, 3], [3, 2], [5], [2, 3], [4, 4, 1]):
            inputs = call_of(lengths)
            torch.testing.assert_close(executor(*inputs), network(*inputs))
        assert len(executor.graphs) == 4
    assert {path.read_text() for path in tmp_path.glob(f"*/*/{HELD}")} == {"mask"}


def test_the_lengths_are_read_anew_where_nothing_is_cached(tmp_path: Path) -> None:
    network = Cut().eval()
    network.register_forward_hook(lambda module, args, output: output * 2)
    executor = OpenVINOExecutor(network, precision="f32", cache=tmp_path)
    for lengths in ([2, 3], [3, 2]):
        inputs = call_of(lengths)
        torch.testing.assert_close(executor(*inputs), 2 * Cut()(*inputs))
    assert not list(tmp_path.iterdir())


def test_a_damaged_note_of_what_is_held_is_written_anew(tmp_path: Path) -> None:
    network, inputs = Cut().eval(), call_of([2, 3])
    OpenVINOExecutor(network, precision="f32", cache=tmp_path)(*inputs)
    (note,) = tmp_path.glob(f"*/*/{HELD}")
    for damage in ("", "no_such_input"):
        note.write_text(damage)
        executor = OpenVINOExecutor(network, precision="f32", cache=tmp_path)
        torch.testing.assert_close(executor(*inputs), network(*inputs))
        assert note.read_text() == "mask"


def test_what_cannot_hold_a_tensor_says_so_in_a_line() -> None:
    network = Cut().eval()
    with pytest.raises(
        ReadsValues, match=r"^Cut: its graph is for the values of mask .*octavo\.accelerate"
    ) as e:
        to_openvino(network, take_apart(network.forward, call_of([2, 3]), {}))
    assert e.value.names == {"mask"} and "\n" not in str(e.value)


@pytest.mark.parametrize(
    "read",
    [
        lambda ids: ids.tolist(),
        lambda ids: int((ids + 1).max()),
        lambda ids: bool((ids.float() * 0.5 > 1).any()),
        lambda ids: range(ids.sum()),
        lambda ids: torch.zeros(3)[0].copy_(ids[0]).item(),
        lambda ids: torch.zeros(3).index_put_((torch.tensor(1),), ids[0].float()).tolist(),
    ],
)
def test_what_is_computed_from_a_tensor_is_followed(read: Callable[[torch.Tensor], object]) -> None:
    ids = torch.tensor([1, 2, 3])
    with pytest.raises(ReadsValues), RefusingToRead("Network", ["ids"], [ids]):
        read(ids)


def test_shapes_and_floats_may_be_read() -> None:
    ids, image = torch.tensor([[1, 2, 3]]), torch.ones(2)
    with RefusingToRead("Network", ["ids", "image"], [ids, image]):
        assert range(ids.shape[1]) == range(ids.size(1)) == range(3) and len(ids) == 1
        assert torch.zeros_like(ids).tolist() == ids.new_zeros(1, 3).tolist() == [[0, 0, 0]]
        assert image.sum().item() == 2


def test_other_values_are_another_graph_and_the_same_are_not() -> None:
    def forward(sample, timestep, masks=None):  # type: ignore[no-untyped-def]
        return sample

    def held(*values: int) -> str:
        masks = {"text": torch.tensor(values), "picture": torch.ones(1)}
        call = with_held(take_apart(forward, (torch.zeros(1, 2), 1), {"masks": masks}), ["masks.text"])
        assert call.names == ("sample", "timestep", "masks.picture")
        assert torch.equal(call.kwargs(call.tensors)["masks"]["text"], masks["text"])
        assert call.kwargs(call.tensors)["masks"]["picture"] is call.tensors[2]
        return call.constants

    assert held(1, 2) == held(1, 2) != held(2, 1)
