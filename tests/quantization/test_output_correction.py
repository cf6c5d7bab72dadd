from __future__ import annotations

import numpy as np
import pytest
import torch

from octavo.errors import OctavoError
from octavo.quantization import OutputCorrection

TIMESTEPS = torch.tensor([1.0, 250.5, 990.0])
K = torch.tensor([0.5, -0.25, 0.125])
MEAN = torch.tensor([[1.0, 0.0], [2.0, -4.0], [0.0, 8.0]])


@pytest.mark.parametrize("timestep", [0, 1, 100, 250.5, 400.25, 990, 999])
def test_both_parts_are_linear_between_the_timesteps_and_constant_beyond(
    timestep: float, generator: torch.Generator
) -> None:
    correction = OutputCorrection(TIMESTEPS, K, MEAN.view(3, 2, 1, 1))
    y = torch.randn(4, 2, 3, 5, generator=generator)
    k = np.interp(timestep, TIMESTEPS, K)
    mean = torch.tensor([np.interp(timestep, TIMESTEPS, MEAN[:, c]) for c in range(2)]).view(2, 1, 1)
    torch.testing.assert_close(correction(y, torch.tensor(timestep)), ((y - mean) / (1 + k)).float())


def test_each_row_has_its_own_timestep(generator: torch.Generator) -> None:
    correction = OutputCorrection(TIMESTEPS, K, MEAN.view(3, 2, 1, 1))
    y = torch.randn(3, 2, 4, 4, generator=generator)
    timesteps = torch.tensor([990, 30, 1])
    alone = [correction(y[i : i + 1], timesteps[i]) for i in range(3)]
    assert torch.equal(correction(y, timesteps), torch.cat(alone))


def test_channels_are_where_the_means_shape_has_them(generator: torch.Generator) -> None:
    y = torch.randn(2, 7, 2, generator=generator)
    tokens = OutputCorrection(TIMESTEPS, K, MEAN.view(3, 1, 2))(y, torch.tensor(250.5))
    torch.testing.assert_close(tokens, (y - MEAN[1]) / 0.75)


def test_a_table_of_one_timestep_holds_for_all() -> None:
    correction = OutputCorrection(torch.tensor([5.0]), torch.tensor([1.0]), torch.tensor([[[[3.0]]]]))
    y = torch.full((2, 1, 1, 1), 5.0)
    assert correction(y, torch.tensor([0, 900])).flatten().tolist() == [1.0, 1.0]


def test_the_table_stays_float32_and_the_output_its_own_dtype() -> None:
    correction = OutputCorrection(TIMESTEPS.double(), K, MEAN.view(3, 2, 1, 1)).to(torch.bfloat16)
    assert {buffer.dtype for buffer in correction.buffers()} == {torch.float32}
    y = torch.ones(1, 2, 1, 1, dtype=torch.bfloat16)
    assert correction(y, torch.tensor(1, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_an_empty_one_has_the_shapes_of_what_is_loaded_into_it() -> None:
    full = OutputCorrection(TIMESTEPS, K, MEAN.view(3, 2, 1, 1))
    empty = OutputCorrection.empty((3, 2, 1, 1))
    empty.load_state_dict(full.state_dict())
    assert all(torch.equal(tensor, empty.state_dict()[name]) for name, tensor in full.state_dict().items())


@pytest.mark.parametrize(
    ("timesteps", "k", "mean"),
    [(TIMESTEPS[:2], K, MEAN), (TIMESTEPS, K, MEAN[:2]), (TIMESTEPS[:0], K[:0], MEAN[:0])],
)
def test_shapes_that_do_not_fit_are_refused(
    timesteps: torch.Tensor, k: torch.Tensor, mean: torch.Tensor
) -> None:
    with pytest.raises(OctavoError, match="output_correction: timesteps"):
        OutputCorrection(timesteps, k, mean)
