from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
)
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from octavo.diffusion import call_pipeline, capture_pairs, first_call, generators, probe
from octavo.errors import OctavoError

# diffusers' DPM-Solver hands a torch tensor to np.array, of which torch 2.13 and NumPy 2 together warn.
pytestmark = pytest.mark.filterwarnings(
    "ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning"
)

STEPS = 6
SEED = 5


def capture(pipeline: Any, draws: list[list[int]], start: int = 0, **kwargs: Any) -> Any:
    seeded = generators(SEED, start, len(draws))
    return capture_pairs(
        pipeline, draws, generators=seeded, **{"num_inference_steps": STEPS, "first_image": start, **kwargs}
    )


def sampler_loop(unet: Any, scheduler: Any, count: int, **step_arguments: Any) -> list[tuple[Tensor, Tensor]]:
    """The textbook diffusers loop: what the network is handed at each step."""
    seeded = generators(SEED, 0, count)
    x = randn_tensor((count, 3, 8, 8), generator=seeded)
    scheduler.set_timesteps(STEPS)
    handed = []
    with torch.no_grad():
        for t in scheduler.timesteps:
            handed.append((x, t))
            x = scheduler.step(unet(x, t).sample, t, x, generator=seeded, **step_arguments).prev_sample
    return handed


@pytest.mark.parametrize(
    ("kind", "scheduler", "inputs"),
    [
        (DDPMPipeline, DDPMScheduler(), {}),
        (DDIMPipeline, DDIMScheduler(), {"eta": 0.0}),
        (DDIMPipeline, DDIMScheduler(timestep_spacing="trailing"), {"eta": 1.0}),
        (DDPMPipeline, DPMSolverMultistepScheduler(), {}),
        (
            DDPMPipeline,
            DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++", use_karras_sigmas=True),
            {},
        ),
    ],
    ids=["ddpm", "ddim-0", "ddim-1", "dpmsolver++", "sde-dpmsolver++"],
)
def test_captured_is_what_the_sampler_passes(
    unet: Any, kind: Any, scheduler: Any, inputs: dict[str, Any]
) -> None:
    draws = [[STEPS], [2, 5], [1], [3]]
    pairs = capture(kind(unet, scheduler), draws, inputs=inputs)
    handed = sampler_loop(unet, type(scheduler).from_config(scheduler.config), len(draws), **inputs)

    assert [(pair.image, pair.steps_left) for pair in pairs] == [(0, 6), (1, 2), (1, 5), (2, 1), (3, 3)]
    for pair in pairs:
        assert pair.step == STEPS - pair.steps_left
        x, t = handed[pair.step]
        assert list(pair.args) == ["sample", "timestep"] and pair.num_rows == 1
        assert torch.equal(pair.args["sample"], x[pair.image : pair.image + 1])
        assert torch.equal(pair.args["timestep"], t) and pair.args["timestep"].dtype == t.dtype


def test_guided_class_conditional(dit: Callable[..., Any]) -> None:
    """A DiT's loop written out: batched guidance, a timestep and a label for each row."""
    pipeline = dit(DDIMScheduler())
    labels = [3, 1, 999]
    pairs = capture(pipeline, [[4], [6, 1], [2]], inputs={"class_labels": labels, "guidance_scale": 3.0})

    transformer, scheduler = pipeline.transformer, DDIMScheduler()
    x = randn_tensor((3, 4, 8, 8), generator=generators(SEED, 0, 3))
    scheduler.set_timesteps(STEPS)
    classes = torch.tensor([*labels, 1000, 1000, 1000])
    handed = []
    with torch.no_grad():
        for t in scheduler.timesteps:
            both = torch.cat([x, x])
            handed.append((both, t))
            output = transformer(both, timestep=t.expand(6), class_labels=classes).sample[:, :4]
            conditional, unconditional = output.chunk(2)
            x = scheduler.step(unconditional + 3.0 * (conditional - unconditional), t, x).prev_sample

    assert [(pair.image, pair.steps_left) for pair in pairs] == [(0, 4), (1, 6), (1, 1), (2, 2)]
    for pair in pairs:
        both, t = handed[pair.step]
        rows = [pair.image, pair.image + 3]
        assert pair.num_rows == 2 and pair.per_row == {"hidden_states", "timestep", "class_labels"}
        assert torch.equal(pair.args["hidden_states"], both[rows])
        assert pair.args["timestep"].tolist() == [t.item()] * 2
        assert pair.args["class_labels"].tolist() == [labels[pair.image], 1000]


@pytest.mark.parametrize("in_turn", [False, True])
def test_text_condition_guided_at_once_or_in_turn(conditional: Any, in_turn: bool) -> None:
    embeds = torch.randn(5, 3, 8, generator=torch.Generator().manual_seed(0))
    inputs = {"prompt_embeds": embeds, "in_turn": in_turn}
    pairs = capture(conditional, [[3], [5], [3]], start=2, inputs=inputs)
    if in_turn:
        assert [(pair.image, pair.steps_left) for pair in pairs] == [
            (2, 3),
            (2, 3),
            (3, 5),
            (3, 5),
            (4, 3),
            (4, 3),
        ]
        assert {pair.num_rows for pair in pairs} == {1}
    else:
        assert [(pair.image, pair.num_rows) for pair in pairs] == [(2, 2), (3, 2), (4, 2)]
    for image in (2, 3, 4):
        mine = [pair.args for pair in pairs if pair.image == image]
        states = torch.cat([args["encoder_hidden_states"] for args in mine])
        assert torch.equal(states, torch.stack([embeds[image], 0 * embeds[image]]))
        text = torch.cat([args["added_cond_kwargs"]["text_embeds"] for args in mine])
        assert torch.equal(text[0], embeds[image].mean(0))
        assert all(args["return_dict"] is False for args in mine)


def test_a_step_drawn_twice_gives_its_pair_twice(ddpm: Any) -> None:
    pairs = capture(ddpm(DDPMScheduler()), [[2, 4, 2], [3]])
    assert [(pair.image, pair.steps_left) for pair in pairs] == [(0, 2), (0, 4), (0, 2), (1, 3)]
    assert pairs[0] is pairs[2]


@pytest.mark.parametrize(("draws", "calls"), [([[6], [6]], 1), ([[5], [3]], 4), ([[1], [6]], 6)])
def test_stops_when_all_is_caught(ddpm: Any, draws: list[list[int]], calls: int) -> None:
    pipeline = ddpm(DDPMScheduler())
    made = count_calls(pipeline.unet)
    capture(pipeline, draws)
    assert len(made) == calls


def test_a_decoder_is_never_reached(dit: Any) -> None:
    pipeline = dit(DDIMScheduler())
    decoded = count_calls(pipeline.vae.decoder)
    capture(pipeline, [[1]], inputs={"class_labels": 1})
    assert not decoded


def count_calls(module: torch.nn.Module) -> list[int]:
    made: list[int] = []
    module.register_forward_hook(lambda *_: made.append(1))
    return made


def is_clean(pipeline: Any) -> bool:
    return not pipeline.unet._forward_pre_hooks and "step" not in vars(pipeline.scheduler)


def test_the_pipeline_samples_the_same_before_and_after(ddpm: Any) -> None:
    pipeline = ddpm(DPMSolverMultistepScheduler())

    def sample() -> Tensor:
        seeded = generators(0, 0, 2)
        return call_pipeline(pipeline, generators=seeded, num_inference_steps=4, output_type="pt")

    before = sample()
    capture(pipeline, [[3], [4]])
    assert is_clean(pipeline) and torch.equal(sample(), before)


@pytest.mark.parametrize("where", ["step", "forward", "call"])
def test_nothing_is_left_behind_after_an_error(unet: Any, where: str) -> None:
    def broken(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("the user's own mistake")

    class Scheduler(DDPMScheduler):
        def step(self, model_output: Any, timestep: Any, sample: Any, generator: Any = None) -> Any:
            return broken() if where == "step" else super().step(model_output, timestep, sample, generator)

    class Pipeline(DDPMPipeline):
        def progress_bar(self, *args: Any, **kwargs: Any) -> Any:
            return broken() if where == "call" else super().progress_bar(*args, **kwargs)

    pipeline = Pipeline(unet, Scheduler())
    if where == "forward":
        unet.conv_in.forward = broken
    with pytest.raises(RuntimeError, match="the user's own mistake"):
        capture(pipeline, [[2]])
    assert is_clean(pipeline)


def test_the_batch_does_not_change_which_noise_an_image_gets(silent_unet: Any) -> None:
    pipeline = DDPMPipeline(silent_unet, DDPMScheduler())
    draws = [[6], [3, 2], [1], [4], [2]]
    together = capture(pipeline, draws)
    apart = [
        *capture(pipeline, draws[:1]),
        *capture(pipeline, draws[1:3], 1),
        *capture(pipeline, draws[3:], 3),
    ]
    for one, other in zip(together, apart, strict=True):
        assert (one.image, one.steps_left) == (other.image, other.steps_left)
        assert torch.equal(one.args["sample"], other.args["sample"])


def test_captured_tensors_are_copies_of_their_own(ddpm: Any) -> None:
    first, second = capture(ddpm(DDPMScheduler()), [[6], [6]])
    storages = {pair.args["sample"].untyped_storage().data_ptr() for pair in (first, second)}
    assert len(storages) == 2
    assert first.args["sample"].untyped_storage().nbytes() == 3 * 8 * 8 * 4


def test_probe_and_first_call_evaluate_nothing(dit: Any) -> None:
    pipeline = dit(DDIMScheduler())
    made = count_calls(pipeline.transformer)
    inputs = {"class_labels": 4}
    found = probe(pipeline, num_inference_steps=STEPS, inputs=inputs)
    assert found.num_steps == len(found.timesteps) == STEPS and found.timesteps[-1] < found.timesteps[0]
    assert found.rows_per_image == 2
    assert found.parameters == ("hidden_states", "timestep", "class_labels")
    args, kwargs = first_call(pipeline, batch_size=3, inputs=inputs)
    assert not made
    assert args == () and kwargs["hidden_states"].shape == (6, 4, 8, 8)
    pipeline.transformer(*args, **kwargs)


def test_errors_name_the_argument(ddpm: Any) -> None:
    pipeline = ddpm(DDPMScheduler())
    for draws, message in (
        ([], "0 images are drawn for 0 generators"),
        ([[1], []], "image 1 needs one or more steps left"),
        ([[0]], "image 0 needs one or more steps left"),
        ([[7]], "7 steps left, but the sampler makes 6 steps"),
    ):
        with pytest.raises(OctavoError, match=message):
            capture(pipeline, draws)
        assert is_clean(pipeline)
    with pytest.raises(OctavoError, match="1 images are drawn for 2 generators"):
        capture_pairs(pipeline, [[1]], generators=generators(0, 0, 2), num_inference_steps=STEPS)


def test_a_step_the_sampler_skips_is_named(unet: Any) -> None:
    class Impatient(DDPMPipeline):
        def progress_bar(self, iterable: Any = None, total: Any = None) -> Any:
            return iterable[:2]

    with pytest.raises(OctavoError, match="never called its network with 1 of 6 steps left"):
        capture(Impatient(unet, DDPMScheduler()), [[1]])


def test_pipelines_that_cannot_be_watched(unet: Any) -> None:
    pipeline = DDPMPipeline(unet, DDPMScheduler())
    pipeline.scheduler = None
    with pytest.raises(OctavoError, match="has no scheduler"):
        probe(pipeline, num_inference_steps=STEPS)

    class Idle(DDPMPipeline):
        def __call__(
            self,
            batch_size: int = 1,
            generator: Any = None,
            num_inference_steps: int = 1,
            output_type: str = "pt",
        ) -> tuple[None]:
            return (None,)

    with pytest.raises(OctavoError, match="Idle never called its denoiser"):
        probe(Idle(unet, DDPMScheduler()), num_inference_steps=STEPS)


def test_a_network_that_takes_a_list_of_samples_is_told(ddpm: Any) -> None:
    """As ZImageTransformer2DModel does."""
    pipeline = ddpm(DDPMScheduler())
    pipeline.unet.register_forward_pre_hook(lambda module, args: ([*args[0]], *args[1:]))
    with pytest.raises(OctavoError, match=r"^denoiser: its first argument is not a batch of samples"):
        first_call(pipeline)


def test_a_network_that_is_told_a_timestep_for_each_token_is_refused(ddpm: Any) -> None:
    """As WanTransformer3DModel is, of Wan 2.2 with 5B parameters."""
    pipeline = ddpm(DDPMScheduler())
    pipeline.unet.register_forward_pre_hook(lambda module, args: (args[0], torch.ones(len(args[0]), 4)))
    with pytest.raises(OctavoError, match=r"^denoiser: is told a timestep for each token"):
        first_call(pipeline)
