from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from octavo.errors import OctavoError
from octavo.quantization import QParams, QuantSpec


@pytest.mark.parametrize(
    ("arguments", "ends", "dtype"),
    [
        ({"bits": 8}, (-128, 127), torch.int8),
        ({"bits": 8, "narrow": True}, (-127, 127), torch.int8),
        ({"bits": 8, "symmetric": False}, (0, 255), torch.uint8),
        ({"bits": 2}, (-2, 1), torch.int8),
        ({"bits": 2, "narrow": True}, (-1, 1), torch.int8),
        ({"bits": 4, "symmetric": False}, (0, 15), torch.uint8),
        ({"bits": 32}, (0, 0), torch.float32),
    ],
)
def test_integers(arguments: dict[str, Any], ends: tuple[int, int], dtype: torch.dtype) -> None:
    spec = QuantSpec(**arguments)
    assert (spec.qmin, spec.qmax) == ends
    assert spec.dtype == dtype


def test_dict_round_trip_through_json() -> None:
    for spec in (
        QuantSpec(4, False, "per_channel"),
        QuantSpec(4, granularity="per_group", narrow=True, group_size=64),
        QuantSpec(8, granularity="per_channel", narrow=True, pair_limit=True),
    ):
        assert QuantSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec


def test_a_spec_without_groups_or_limit_is_written_as_it_always_was() -> None:
    """Its dictionary is part of the digest of every checkpoint."""
    assert QuantSpec().to_dict() == {
        "bits": 8,
        "symmetric": True,
        "granularity": "per_tensor",
        "narrow": False,
    }


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"bits": 9}, "bits: 9"),
        ({"bits": 1}, "bits: 1"),
        ({"bits": 16}, "bits: 16"),
        ({"bits": 32, "narrow": True}, "bits: 32 are for activations that stay float"),
        ({"bits": 32, "symmetric": False}, "bits: 32 are for activations that stay float"),
        ({"bits": 32, "granularity": "per_channel"}, "bits: 32 are for activations that stay float"),
        ({"bits": True}, "bits: True"),
        ({"bits": 8.0}, "bits: 8.0"),
        ({"symmetric": 1}, "symmetric: 1"),
        ({"symmetric": False, "narrow": True}, "narrow"),
        ({"granularity": "per_row"}, "per_row"),
        ({"granularity": "per_group", "bits": 4}, "group_size: None .*per_group"),
        ({"granularity": "per_group", "bits": 4, "group_size": 1}, "group_size: 1"),
        ({"granularity": "per_group", "bits": 4, "group_size": 8.0}, "group_size: 8.0"),
        ({"granularity": "per_group", "bits": 4, "group_size": True}, "group_size: True"),
        ({"granularity": "per_group", "bits": 5, "group_size": 8}, "at most 4 bits"),
        ({"granularity": "per_group", "bits": 4, "symmetric": False, "group_size": 8}, "symmetric"),
        ({"granularity": "per_channel", "bits": 4, "group_size": 8}, "group_size: only"),
        ({"granularity": []}, "granularity"),
        ({"granularity": "per_channel", "pair_limit": 1}, "pair_limit: 1 is neither"),
        ({"granularity": "per_channel", "bits": 7, "pair_limit": True}, "pair_limit: only symmetric 8-bit"),
        (
            {"granularity": "per_channel", "symmetric": False, "pair_limit": True},
            "pair_limit: only symmetric",
        ),
        ({"pair_limit": True}, "pair_limit: only symmetric 8-bit weights per_channel"),
        ({"width": 8}, "unknown key 'width'"),
        ([8], "not a mapping"),
    ],
)
def test_bad_values_are_refused_in_one_line(values: Any, message: str) -> None:
    with pytest.raises(OctavoError, match=message):
        QuantSpec.from_dict(values)


@pytest.mark.parametrize(
    ("scale", "zero_point"),
    [
        (torch.ones(()).double(), torch.zeros((), dtype=torch.int32)),
        (torch.ones(()), torch.zeros((), dtype=torch.int64)),
        (torch.ones(2), torch.zeros(3, dtype=torch.int32)),
        (torch.ones(2, 1), torch.zeros(2, 1, dtype=torch.int32)),
    ],
)
def test_parameters_that_do_not_fit_are_refused(scale: torch.Tensor, zero_point: torch.Tensor) -> None:
    with pytest.raises(OctavoError, match="qparams"):
        QParams(scale, zero_point)
