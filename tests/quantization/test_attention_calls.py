from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from octavo.errors import OctavoError
from octavo.quantization import (
    AttentionSpecs,
    attach_attention,
    attention_calls,
    dequantized,
    quantized_products,
)

SPECS = AttentionSpecs.of_bits(3)
SCALES = {name: torch.tensor(0.7) for name in ("query", "key", "value")}


class Owner(nn.Module):
    """Attends to its input, after what is inside it did."""

    def __init__(self, inside: nn.Module | None = None) -> None:
        super().__init__()
        self.inside = inside or nn.Identity()
        self.raises: type[BaseException] | None = None
        self.attends = True

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.inside(x)
        if self.raises is not None:
            raise self.raises
        return F.scaled_dot_product_attention(x, x, x) if self.attends else x


@pytest.fixture
def x(generator: torch.Generator) -> torch.Tensor:
    return torch.randn(2, 6, 8, generator=generator)


@pytest.fixture
def model() -> nn.Sequential:
    return nn.Sequential(Owner(nn.Sequential(nn.Identity(), Owner())), nn.Linear(8, 8)).eval()


@torch.no_grad()
def test_calls_are_seen_under_the_innermost_running_module(model: nn.Sequential, x: torch.Tensor) -> None:
    seen = []
    plain = model(x)
    with attention_calls(model, lambda owner, query, key, value: seen.append((owner, query.clone()))):
        watched = model(x)
        F.scaled_dot_product_attention(x, x, x)  # nobody's of the model
    assert torch.equal(watched, plain)
    assert [owner for owner, _ in seen] == ["0.inside.1", "0"]
    assert torch.equal(seen[0][1], x) and not torch.equal(seen[1][1], x)
    model(x)
    assert len(seen) == 2 and not any(module._forward_hooks for module in model.modules())


@torch.no_grad()
def test_only_the_named_owner_computes_in_integers(model: nn.Sequential, x: torch.Tensor) -> None:
    model.append(Owner())
    plain, before = model(x), model[:2](x)
    attach_attention(model, {"2": SPECS}, {"2": SCALES})
    assert torch.equal(model[:2](x), before), "another owner stays as it was"
    assert not torch.allclose(model(x), plain, atol=1e-3)
    assert torch.equal(model(x), model[2].octavo_attention(before, before, before))
    assert [name for name, _ in quantized_products(model)] == [
        "2.octavo_attention.qk",
        "2.octavo_attention.pv",
    ]


@torch.no_grad()
def test_an_owner_within_an_owner_has_its_own_scales(model: nn.Sequential, x: torch.Tensor) -> None:
    scales = {"0": SCALES, "0.inside.1": {name: 0.3 * scale for name, scale in SCALES.items()}}
    attach_attention(model, dict.fromkeys(scales, SPECS), scales)
    inner = model[0].inside[1].octavo_attention(x, x, x)
    assert torch.equal(model(x), model[1](model[0].octavo_attention(inner, inner, inner)))


@torch.no_grad()
def test_a_copy_has_its_own(model: nn.Sequential, x: torch.Tensor) -> None:
    attach_attention(model, {"0": SPECS}, {"0": SCALES})
    before, other = model(x), copy.deepcopy(model)
    assert torch.equal(other(x), before)
    other[0].octavo_attention.pv.right_scale *= 0.5
    assert torch.equal(model(x), before) and not torch.equal(other(x), before)


@torch.no_grad()
def test_float_again(model: nn.Sequential, x: torch.Tensor) -> None:
    plain, state = model(x), set(model.state_dict())
    attach_attention(model, {"0": SPECS, "0.inside.1": SPECS}, {"0": SCALES, "0.inside.1": SCALES})
    again = dequantized(model)
    assert torch.equal(again(x), plain) and set(again.state_dict()) == state
    assert not torch.equal(model(x), plain), "the original is left as it was"


@torch.no_grad()
@pytest.mark.parametrize("kind", [ValueError, KeyboardInterrupt])
def test_whatever_interrupts_an_owner_ends_the_replacement(
    model: nn.Sequential, x: torch.Tensor, kind: type[BaseException]
) -> None:
    exact = F.scaled_dot_product_attention(x, x, x)
    attach_attention(model, {"0": SPECS}, {"0": SCALES})
    model[0].raises = kind
    with pytest.raises(kind):
        model(x)
    assert torch.equal(F.scaled_dot_product_attention(x, x, x), exact)


def test_attention_that_would_be_float_unseen_is_refused(model: nn.Sequential, x: torch.Tensor) -> None:
    model.append(Owner())
    attach_attention(model, {"2": SPECS}, {"2": SCALES})
    model[2].attends = False
    with pytest.raises(OctavoError, match="Owner: its attention is quantized, but did not call"):
        model(x)


def test_an_unknown_module_is_told(model: nn.Sequential) -> None:
    with pytest.raises(OctavoError, match="7: Sequential has no such module"):
        attach_attention(model, {"7": SPECS}, {"7": SCALES})
