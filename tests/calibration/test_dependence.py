"""Which layers read nothing but the timestep: found by following the data."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from diffusers import DDIMPipeline, DiTPipeline, UNet2DConditionModel, UNet2DModel
from torch import nn

from octavo.calibration import rules_of, trace
from octavo.calibration.dependence import OTHER, TIMESTEP, Dependence, with_tensor_timestep
from octavo.calibration.labels import Labels
from octavo.calibration.recipe import PTQ4DM
from octavo.calibration.tracing import trace_network
from octavo.errors import OctavoError


def test_everything_that_is_read_counts() -> None:
    t, x, constant = torch.ones(1), torch.ones(1, 4), torch.ones(4)
    with Dependence({TIMESTEP: t, OTHER: [{"x": x}]}) as dependence:
        both = torch.cat([t.cos().expand(1, 1), x], dim=1)
        written = torch.zeros(2, 4)
        written[0] = x[0]
        shape_only = torch.ones(x.shape[0]) * t
        view = t[None].expand(3, 1)
        free = constant * 2
    assert dependence.of(both) == {TIMESTEP, OTHER}
    assert dependence.of(written) == {OTHER}
    assert dependence.of(shape_only) == dependence.of(view) == {TIMESTEP}
    assert dependence.of(free) == frozenset()


def test_what_became_a_number_may_be_anywhere() -> None:
    t, x = torch.ones(1), torch.ones(1, 4)
    with Dependence({TIMESTEP: t, OTHER: x}) as dependence:
        before = t + 1
        number = float(x.sum())
        after = t * number
    assert dependence.of(before) == {TIMESTEP}
    assert dependence.of(after) == {TIMESTEP, OTHER}


def test_freed_memory_takes_its_label_with_it() -> None:
    labels: Labels[int] = Labels()
    for k in range(50):
        x = torch.zeros(1000)
        assert labels.of(x) is None
        labels.put(x, k)
        assert labels.of(x[3:]) == k
        del x


def test_the_timestep_becomes_a_tensor() -> None:
    kwargs, inputs = with_tensor_timestep({"sample": torch.ones(1), "timestep": 7, "class_labels": None})
    assert int(kwargs["timestep"]) == 7 and inputs[TIMESTEP] is kwargs["timestep"]


def test_the_mlp_and_every_projection_of_an_unconditional_unet(pipeline: DDIMPipeline) -> None:
    names = {name for name, layer in pipeline.unet.named_modules() if isinstance(layer, nn.Linear)}
    expected = {
        name for name in names if name.startswith("time_embedding.") or name.endswith("time_emb_proj")
    }
    traced = trace(pipeline)
    assert set(traced.timestep_layers) == expected and len(expected) > 5
    kept = rules_of(PTQ4DM(time_embedding="float"), traced)
    assert set(rules_of(PTQ4DM(), traced)) - set(kept) == expected
    weights_alone = rules_of(PTQ4DM(time_embedding="weights"), traced)
    assert {name for name, rule in weights_alone.items() if rule.activations.is_float} == expected
    given = rules_of(PTQ4DM(time_embedding="weights", bits={"time_embedding.linear_1": (8, 8)}), traced)
    assert given["time_embedding.linear_1"].activations.bits == 8


def test_class_labels_leave_the_mlp_alone(
    dit: DiTPipeline, make_pipeline: Callable[..., DDIMPipeline]
) -> None:
    """With a class embedding the projections read more than the timestep: those are no function of it."""
    found = trace(dit, {"class_labels": [1]}).timestep_layers
    assert found and all(".timestep_embedder.linear_" in name for name in found)
    base = make_pipeline()
    with torch.random.fork_rng():
        unet = UNet2DModel(**{**dict(base.unet.config), "num_class_embeds": 3}).eval()
    kwargs, sources = with_tensor_timestep(
        {"sample": torch.randn(1, 3, 8, 8), "timestep": 5, "class_labels": torch.tensor([1])}
    )
    seen: dict[str, frozenset[str]] = {}
    with torch.no_grad(), Dependence(sources) as dependence:

        def record(name: str) -> Callable[..., None]:
            return lambda _, args: seen.update({name: dependence.of(args[0])})

        for name, layer in unet.named_modules():
            if isinstance(layer, nn.Linear) and "time" in name:
                layer.register_forward_pre_hook(record(name))
        unet(**kwargs)
    assert seen["time_embedding.linear_2"] == {TIMESTEP}
    assert seen["mid_block.resnets.0.time_emb_proj"] == {TIMESTEP, OTHER}


def test_the_field_has_three_values() -> None:
    with pytest.raises(OctavoError, match="time_embedding: 'table' is not one of float, weights, quantized"):
        PTQ4DM(time_embedding="table")  # type: ignore[arg-type]


class WithUnread(nn.Module):
    """`aside` is computed and dropped, `through` goes on by way of memory that is written to."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.aside, self.through, self.last = (nn.Linear(4, 4) for _ in range(4))

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor, return_dict: bool) -> tuple[torch.Tensor]:
        x = self.first(sample)
        self.aside(x)
        written = torch.zeros_like(x)
        written[:, :1] = self.through(x)[:, :1]
        return (self.last(written),)


def test_layers_that_the_output_does_not_depend_on() -> None:
    traced = trace_network(WithUnread(), {"sample": torch.ones(2, 4), "timestep": 3})
    assert traced.executed == ("first", "aside", "through", "last") and traced.unread == ("aside",)
    rules = rules_of(PTQ4DM(bits={"aside": (4, 8)}, first_and_last="quantized"), traced)
    assert [name for name, rule in rules.items() if rule.activations.is_float] == ["aside"]
    assert rules["aside"].weights.bits == 4


class WithPositions(nn.Module):
    """`embedding` reads the numbers of the positions, which depend on the shape alone, `first` the image."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.embedding, self.last = nn.Linear(4, 4), nn.Linear(1, 4), nn.Linear(4, 4)

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor, return_dict: bool) -> tuple[torch.Tensor]:
        positions = torch.arange(sample.shape[1], dtype=sample.dtype)[:, None]
        return (self.last(self.first(sample) + self.embedding(positions)),)


def test_layers_whose_inputs_no_input_changes_have_float_activations() -> None:
    traced = trace_network(WithPositions(), {"sample": torch.ones(2, 3, 4), "timestep": 3})
    assert traced.executed == ("first", "embedding", "last") and traced.constant == ("embedding",)
    rules = rules_of(PTQ4DM(bits={"embedding": (4, 8)}, first_and_last="quantized"), traced)
    assert [name for name, rule in rules.items() if rule.activations.is_float] == ["embedding"]
    assert rules["embedding"].weights.bits == 4


class ByKeyword(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor, return_dict: bool) -> tuple[torch.Tensor]:
        return (self.first(input=sample),)


def test_a_layer_that_is_called_by_keyword_is_named() -> None:
    with pytest.raises(OctavoError, match=r"^first: ByKeyword hands its input over by keyword"):
        trace_network(ByKeyword(), {"sample": torch.ones(2, 4), "timestep": 3})


def test_labels_of_freed_memory_are_let_go() -> None:
    """Each that stays is a block that the heap cannot be joined over: SDXL's evaluation left 5.5 GB of holes."""
    labels = Labels[int]()
    kept = [torch.zeros(1) for _ in range(100)]
    for i in range(10_000):
        if i % 100 == 0:
            labels.put(kept[i // 100], i)
        labels.put(torch.zeros(1), i)
    assert len(labels._of_storage) < 1000
    assert [labels.of(x) for x in kept] == [100 * i for i in range(100)]


def test_a_text_that_runs_before_the_image_is_not_at_the_edge() -> None:
    """As in Kolors and DeepFloyd IF: the first layer on more than [rows, features] embeds the text."""
    torch.manual_seed(0)
    network = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8,),
        norm_num_groups=4,
        layers_per_block=1,
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        mid_block_type=None,
        cross_attention_dim=8,
        encoder_hid_dim=6,
        encoder_hid_dim_type="text_proj",
    )
    call = {
        "sample": torch.randn(1, 4, 8, 8),
        "timestep": 3,
        "encoder_hidden_states": torch.randn(1, 5, 6),
    }
    traced = trace_network(network, call)
    assert traced.executed.index("encoder_hid_proj") < traced.executed.index("conv_in")
    assert traced.edges == ("conv_in", "conv_out")
