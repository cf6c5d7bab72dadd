from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from octavo.errors import OctavoError
from octavo.quantization import AttentionSpecs, QuantAttention, QuantProduct, QuantSpec

SPECS = AttentionSpecs.of_bits(8)
SCALES = {"query": 0.03, "key": 0.06, "value": 0.025}


def attention(bits: int = 8) -> QuantAttention:
    return QuantAttention(
        AttentionSpecs.of_bits(bits), {name: torch.tensor(scale) for name, scale in SCALES.items()}
    )


def operands(generator: torch.Generator, queries: int, keys: int) -> list[torch.Tensor]:
    """Two images, three heads of 8 dimensions, values of 5."""
    shapes = ((queries, 8), (keys, 8), (keys, 5))
    return [torch.randn(2, 3, *shape, generator=generator) for shape in shapes]


def integer(x: float, scale: float, low: int, high: int) -> int:
    return max(low, min(high, round(x * float(torch.tensor(scale).reciprocal()))))


def by_hand(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, added: torch.Tensor | None = None
) -> torch.Tensor:
    """One head, in Python's own integers and floats, with SCALES: the formulas of the module's text."""
    output = torch.zeros(len(q), v.shape[1])
    keys = [[integer(x, SCALES["key"], -64, 63) for x in row] for row in k.tolist()]
    values = [[integer(x, SCALES["value"], -128, 127) for x in row] for row in v.tolist()]
    for i, row in enumerate(q.tolist()):
        query = [integer(x, SCALES["query"], -128, 127) for x in row]
        sums = [sum(a * b for a, b in zip(query, key, strict=True)) for key in keys]
        scores = [SCALES["query"] * SCALES["key"] * s / math.sqrt(len(query)) for s in sums]
        if added is not None:
            scores = [s + float(a) for s, a in zip(scores, added[i], strict=True)]
        exponentials = [math.exp(s - max(scores)) for s in scores]
        rounded = [round(127 * e) for e in exponentials]
        for c in range(v.shape[1]):
            total = sum(e * value[c] for e, value in zip(rounded, values, strict=True))
            output[i, c] = SCALES["value"] / 127 * total / sum(exponentials)
    return output


@pytest.mark.parametrize("keys", [6, 9], ids=["self", "cross"])
@pytest.mark.parametrize("masked", [None, "bool", "float"])
def test_it_is_what_the_formulas_say(generator: torch.Generator, keys: int, masked: str | None) -> None:
    q, k, v = operands(generator, 6, keys)
    mask, added = None, None
    if masked:
        kept = torch.rand(6, keys, generator=generator) < 0.7
        kept[:, 0] = True
        added = torch.zeros(6, keys).masked_fill(~kept, -math.inf)
        mask = kept if masked == "bool" else added
    output = attention()(q, k, v, attn_mask=mask)
    for image in range(2):
        for head in range(3):
            expected = by_hand(q[image, head], k[image, head], v[image, head], added)
            torch.testing.assert_close(output[image, head], expected, atol=1e-6, rtol=1e-5)


def test_it_is_near_torchs_own_and_takes_its_arguments(generator: torch.Generator) -> None:
    q, k, v = operands(generator, 16, 16)
    bias = torch.randn(2, 1, 16, 16, generator=generator)
    one_head = {"query": q, "key": k[:, :1], "value": v[:, :1]}
    for arguments in (
        {"query": q, "key": k, "value": v},
        {"query": q, "key": k, "value": v, "scale": 0.1},
        {"query": q, "key": k, "value": v, "is_causal": True},
        {"query": q, "key": k, "value": v, "attn_mask": bias},
        {**one_head, "enable_gqa": True},
    ):
        exact, rounded = F.scaled_dot_product_attention(**arguments), attention()(**arguments)
        assert 0 < float((rounded - exact).norm() / exact.norm()) < 0.03


def test_the_error_shrinks_with_the_bits(generator: torch.Generator) -> None:
    """Every operand has its part in it, so each must have been rounded."""
    q, k, v = operands(generator, 16, 16)
    exact = F.scaled_dot_product_attention(q, k, v)
    errors = []
    for bits in (4, 7):
        scales = {name: torch.tensor(4 / 2 ** (bits - 1)) for name in SCALES}
        errors.append(float((QuantAttention(AttentionSpecs.of_bits(bits), scales)(q, k, v) - exact).norm()))
    assert errors[0] > 6 * errors[1] > 0


def test_even_attention_on_many_keys_is_not_rounded_away() -> None:
    """Each of 4096 keys has less probability than half a step of 1/255."""
    values = torch.linspace(-1, 3, 4096).view(4096, 1)
    output = attention()(torch.zeros(1, 8), torch.zeros(4096, 8), values)
    assert float(output) == pytest.approx(float((values / 0.025).round().mean() * 0.025), abs=1e-5)


def test_a_row_without_keys_gives_zeros_as_torchs_does(generator: torch.Generator) -> None:
    q, k, v = (0.5 * x for x in operands(generator, 3, 4))
    kept = torch.ones(3, 4, dtype=torch.bool)
    kept[1] = False
    for mask in (kept, torch.zeros(3, 4).masked_fill(~kept, -math.inf)):
        output = attention()(q, k, v, attn_mask=mask)
        exact = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        assert not output[:, :, 1].any() and not exact[:, :, 1].any()
        torch.testing.assert_close(output, exact, atol=0.05, rtol=0)


def test_dropout_is_refused(generator: torch.Generator) -> None:
    with pytest.raises(OctavoError, match="dropout_p"):
        attention()(*operands(generator, 2, 2), dropout_p=0.1)


def test_a_mask_beside_is_causal_is_refused_as_by_torch(generator: torch.Generator) -> None:
    mask = torch.ones(2, 2, dtype=torch.bool)
    with pytest.raises(OctavoError, match="is_causal"):
        attention()(*operands(generator, 2, 2), attn_mask=mask, is_causal=True)


@pytest.mark.parametrize("specs", [(SPECS.query, SPECS.key), (SPECS.exponentials, SPECS.value)])
def test_sums_are_those_of_int32_at_the_ends_of_the_ranges(specs: tuple[QuantSpec, QuantSpec]) -> None:
    """... and no two products of them exceed int16, with the left operand shifted to be unsigned."""
    left_spec, right_spec = specs
    generator = torch.Generator().manual_seed(1)
    one = torch.tensor(1.0)
    ends = [torch.tensor([spec.qmin, spec.qmax]) for spec in specs]
    left = ends[0][torch.randint(2, (4, 64, 512), generator=generator)]
    right = ends[1][torch.randint(2, (4, 512, 32), generator=generator)]
    left[0], right[0] = left_spec.qmax, right_spec.qmin
    product = QuantProduct(left_spec, right_spec, one, one)
    far = 1000.0  # beyond the ends: saturates
    output = product(left * torch.where(left.abs() > 1, far, 1.0), right * far)
    assert torch.equal(output.int(), left.int() @ right.int())
    unsigned = left_spec.qmax - min(left_spec.qmin, 0)
    assert 2 * unsigned * right_spec.qmax < 2**15 and 2 * unsigned * -right_spec.qmin <= 2**15


def test_scales_keep_float32_and_outputs_the_querys_dtype(generator: torch.Generator) -> None:
    q, k, v = (x.bfloat16() for x in operands(generator, 4, 4))
    cast = attention().to(torch.bfloat16)
    assert all(buffer.dtype == torch.float32 for buffer in cast.buffers())
    assert cast(q, k, v).dtype == torch.bfloat16
    torch.testing.assert_close(cast(q, k, v), attention()(q.float(), k.float(), v.float()).bfloat16())


def test_specs_go_through_json_and_refuse_what_has_no_kernel() -> None:
    assert AttentionSpecs.from_dict(SPECS.to_dict()) == SPECS
    assert SPECS.to_dict()["query"] == SPECS.query.to_dict(), (
        "digests rest on it: no field but the spec's own"
    )
    few = AttentionSpecs.of_bits(5)
    assert {spec.bits for spec in (few.query, few.key, few.exponentials, few.value)} == {5}
    for changed in ({"query": QuantSpec(symmetric=False)}, {"exponentials": QuantSpec()}):
        with pytest.raises(OctavoError, match="attention: "):
            AttentionSpecs(**{**vars(SPECS), **changed})
    with pytest.raises(KeyError):
        AttentionSpecs.from_dict({"query": SPECS.query.to_dict()})
