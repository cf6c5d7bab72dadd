from __future__ import annotations

import pytest
import torch

from octavo.errors import OctavoError
from octavo.quantization import QuantSpec, round_nearest

SPEC = QuantSpec(8, granularity="per_channel", narrow=True)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_no_integer_is_nearer(bits: int, generator: torch.Generator) -> None:
    spec = QuantSpec(bits, granularity="per_channel", narrow=True)
    weight = torch.randn(5, 3, 3, 3, generator=generator)
    integers, qparams = round_nearest(weight, spec)
    assert integers.dtype == torch.int8
    assert qparams.zero_point.tolist() == [0] * 5
    scale = qparams.scale.view(-1, 1, 1, 1)
    grid = torch.arange(spec.qmin, spec.qmax + 1)
    nearest = (weight.unsqueeze(-1) - scale.unsqueeze(-1) * grid).abs().amin(-1)
    torch.testing.assert_close((weight - scale * integers).abs(), nearest, rtol=1e-5, atol=1e-6)


def test_half_precision_weights_and_parameters_are_left_alone(generator: torch.Generator) -> None:
    weight = torch.nn.Parameter(torch.randn(2, 9, generator=generator).half())
    before = weight.detach().clone()
    integers, qparams = round_nearest(weight, SPEC, "l1")
    assert not integers.requires_grad and qparams.scale.dtype == torch.float32
    assert torch.equal(weight, before)


def test_bad_arguments_are_refused() -> None:
    weight = torch.ones(2, 2)
    for spec in (QuantSpec(8), QuantSpec(8, False, "per_channel")):
        with pytest.raises(OctavoError, match="symmetric per_channel or per_group"):
            round_nearest(weight, spec)
