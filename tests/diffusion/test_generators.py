from __future__ import annotations

import pytest
import torch

from octavo.diffusion import generators
from octavo.errors import OctavoError


def test_image_k_is_seeded_with_seed_plus_k_alone() -> None:
    together = [torch.randn(5, generator=g) for g in generators(seed=3, start=0, count=6)]
    later = [torch.randn(5, generator=g) for g in generators(seed=3, start=4, count=2)]
    assert torch.equal(together[4], later[0]) and torch.equal(together[5], later[1])
    alone = torch.randn(5, generator=torch.Generator().manual_seed(3 + 5))
    assert torch.equal(together[5], alone)


@pytest.mark.parametrize("argument", ["seed", "start", "count"])
def test_negative_numbers(argument: str) -> None:
    with pytest.raises(OctavoError, match=f"{argument}: -1 is negative"):
        generators(**{"seed": 0, "start": 0, "count": 1, argument: -1})


def test_seeds_that_torch_would_repeat_are_refused() -> None:
    """If torch ever reads all 64 bits, the first assertion says that the limit can go."""
    first, second = (torch.randn(5, generator=torch.Generator().manual_seed(s)) for s in (7, 7 + 2**32))
    assert torch.equal(first, second)
    assert len(generators(seed=2**32 - 2, start=0, count=2)) == 2
    with pytest.raises(OctavoError, match="seed: 4294967296 is not below"):
        generators(seed=2**32 - 2, start=0, count=3)
