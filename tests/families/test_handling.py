"""What people do with a pipeline besides calling it: move, offload, copy, pickle, compile. It works or says why not."""

from __future__ import annotations

import copy
import functools
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPAGPipeline
from diffusers.models.attention_processor import AttnProcessor2_0

import octavo
from octavo.diffusion import call_pipeline, first_call, generators
from octavo.runtimes.network import float32_copy, has_foreign_code, shared_copy

RECIPE = octavo.PTQ4DM(samples=2, steps=2)
WITHOUT_ONNX = pytest.mark.skipif("not __import__('importlib').util.find_spec('onnxruntime')")


def evaluated(pipeline: Any, network: Any = None) -> torch.Tensor:
    args, kwargs = first_call(pipeline, batch_size=2)
    with torch.no_grad():
        output: torch.Tensor = (pipeline.unet if network is None else network)(*args, **kwargs).sample
    return output


@pytest.fixture(scope="module", params=["openvino", pytest.param("onnx", marks=WITHOUT_ONNX)])
def fast(quantized: Any, request: pytest.FixtureRequest) -> Any:
    return octavo.accelerate(quantized, request.param, precision="f32", batch_size=2)


@pytest.fixture(scope="module")
def plain(pipeline: Any) -> Any:
    return octavo.quantize(pipeline, RECIPE, progress=False)


def test_deepcopy(quantized: Any, fast: Any) -> None:
    for pipeline in (quantized, fast):
        other = copy.deepcopy(pipeline)
        assert other.unet is not pipeline.unet
        assert torch.equal(evaluated(other), evaluated(pipeline))
    assert all(row.ok for row in octavo.audit(copy.deepcopy(fast)))


def test_pickling(quantized: Any, fast: Any) -> None:
    simulated = pickle.loads(pickle.dumps(quantized.unet))
    assert torch.equal(evaluated(quantized, simulated), evaluated(quantized))
    with pytest.raises(octavo.OctavoError, match=r"^pickle: an accelerated pipeline cannot be pickled"):
        pickle.dumps(fast.unet)


def test_moving_to_a_device(quantized: Any, fast: Any) -> None:
    there = copy.deepcopy(quantized).to("meta")
    assert {tensor.device.type for tensor in there.unet.state_dict().values()} == {"meta"}
    assert torch.equal(evaluated(copy.deepcopy(quantized).to("cpu")), evaluated(quantized))
    with pytest.raises(
        octavo.OctavoError, match=r"sample: is on meta, but an accelerated network runs on the CPU"
    ):
        fast.unet(torch.zeros(2, 3, 8, 8, device="meta"), 1)
    with pytest.raises(octavo.OctavoError, match=r"its unet is on meta; openvino runs it on the CPU"):
        octavo.accelerate(there)


def test_offloading(quantized: Any, pipeline: Any, plain: Any) -> None:
    offloaded = copy.deepcopy(quantized)
    with pytest.raises(RuntimeError, match="requires accelerator, but not found"):
        offloaded.enable_model_cpu_offload()
    offloaded.enable_model_cpu_offload(device="cpu")  # the same hooks, to the only device that there is
    assert hasattr(offloaded.unet, "_hf_hook")
    assert torch.equal(evaluated(offloaded), evaluated(quantized))
    original = copy.deepcopy(pipeline)
    original.enable_model_cpu_offload(device="cpu")
    again = octavo.quantize(original, RECIPE, progress=False)
    assert torch.equal(evaluated(again), evaluated(plain))


def test_loading_onto_a_device_by_its_map(quantized: Any, tmp_path: Path) -> None:
    """diffusers' own; a map that spreads layers over devices offloads them, which is told as below."""
    quantized.save_pretrained(tmp_path / "int8")
    there = type(quantized).from_pretrained(tmp_path / "int8", device_map="cpu")
    assert torch.equal(evaluated(there), evaluated(quantized))


def test_offloading_layer_by_layer_is_told(quantized: Any, pipeline: Any) -> None:
    for given, call in ((pipeline, octavo.quantize), (quantized, octavo.accelerate)):
        offloaded = copy.deepcopy(given)
        offloaded.enable_sequential_cpu_offload(device="cpu")
        with pytest.raises(
            octavo.OctavoError, match=r"^unet: .*: is offloaded; quantize|is on meta; .* load it again"
        ):
            call(offloaded, *([RECIPE] if call is octavo.quantize else []))


def test_an_offloaded_pipeline_is_accelerated(quantized: Any) -> None:
    """It evaluated its simulation from the second call on: a pipeline that offloads takes its hooks off and on again,
    and brought the forward back that the network had before it was accelerated."""
    offloaded = copy.deepcopy(quantized)
    offloaded.enable_model_cpu_offload(device="cpu")
    made, plain = (octavo.accelerate(one, precision="f32", batch_size=2) for one in (offloaded, quantized))
    expected = evaluated(plain)
    assert torch.equal(evaluated(made), expected)  # by the one graph in the cache
    call_pipeline(made, generators=generators(0, 0, 2), num_inference_steps=2)
    assert torch.equal(evaluated(made), expected) and hasattr(made.unet, "_hf_hook")
    assert not torch.equal(evaluated(quantized), expected)  # the simulation differs in last bits
    assert not has_foreign_code(float32_copy(offloaded.unet)) and hasattr(offloaded.unet, "_hf_hook")
    offloaded.unet._old_forward = lambda *args, **kwargs: None
    assert has_foreign_code(float32_copy(offloaded.unet))


def test_an_accelerated_pipeline_is_offloaded(fast: Any) -> None:
    offloaded = copy.deepcopy(fast)
    offloaded.enable_model_cpu_offload(device="cpu")
    for pipeline in (offloaded, copy.deepcopy(offloaded)):
        assert torch.equal(evaluated(pipeline), evaluated(fast)) and octavo.audit(pipeline)


def test_offloading_from_another_device_is_told(quantized: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The network rests on the CPU, and is called elsewhere."""
    monkeypatch.setattr(type(quantized), "_execution_device", torch.device("cuda:0"))
    with pytest.raises(
        octavo.OctavoError,
        match=r"^pipeline: offloads from cuda:0, and openvino runs its unet on the CPU: call",
    ):
        octavo.accelerate(quantized)


def test_copies_leave_offloading_and_its_chain_of_networks_behind(quantized: Any) -> None:
    """A hook knows the network that is moved before its own: it was copied, with all its weights."""
    chain = torch.nn.Linear(3, 3)
    offloaded = copy.deepcopy(quantized)
    offloaded.enable_model_cpu_offload(device="cpu")
    offloaded.unet._hf_hook.chain = chain
    copied: list[Any] = []
    chain.__deepcopy__ = copied.append
    other = shared_copy(offloaded.unet)
    assert not copied and not {"_hf_hook", "_old_forward", "forward"} & vars(other).keys()
    assert vars(offloaded.unet)["_hf_hook"].chain is chain


def test_a_forward_that_is_back_in_place_of_the_executor_is_told(fast: Any) -> None:
    """The executor's audit would go on to tell of int8."""
    other = copy.deepcopy(fast)
    vars(other.unet).pop("forward")
    with pytest.raises(
        octavo.OctavoError, match=r"^UNet2DModel: computes by its own forward again, and no long"
    ):
        octavo.audit(other)
    assert octavo.audit(fast)


def test_quantizing_what_was_compiled(pipeline: Any, plain: Any, tmp_path: Path) -> None:
    compiled = copy.deepcopy(pipeline)
    compiled.unet = torch.compile(compiled.unet, backend="eager")
    made = octavo.quantize(compiled, RECIPE, progress=False)
    made.save_pretrained(tmp_path / "int8")
    expected = plain.unet.state_dict()
    state = octavo.load(tmp_path / "int8").unet.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in expected.items())


def test_compiling_the_simulation(quantized: Any) -> None:
    """All of it; aot_eager and inductor, which take longer, were tried by hand (docs/log.md)."""
    network = torch.compile(copy.deepcopy(quantized).unet, backend="eager")
    torch.testing.assert_close(evaluated(quantized, network), evaluated(quantized), rtol=1e-4, atol=1e-5)


def test_what_treats_rows_by_their_place_is_refused() -> None:
    pipeline = object.__new__(StableDiffusionPAGPipeline)
    for call in (octavo.quantize, octavo.accelerate):
        with pytest.raises(
            octavo.OctavoError, match=r"^pipeline: StableDiffusionPAGPipeline perturbs attention in"
        ):
            call(pipeline, *([RECIPE] if call is octavo.quantize else []))


def test_the_dtype_that_it_has_is_no_cast(quantized: Any, fast: Any) -> None:
    """`from_pipe` asks for float32: it was refused, as if one had asked to cast."""
    for pipeline in (quantized, fast):
        assert pipeline.to(torch.float32) is pipeline and pipeline.to("cpu", torch.float32) is pipeline
        other = type(pipeline).from_pipe(pipeline)
        assert torch.equal(evaluated(other), evaluated(pipeline))
        with pytest.raises(octavo.OctavoError, match=r"^dtype: unet is quantized, and is not cast"):
            pipeline.to(torch.bfloat16)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"threads": -1}, r"^threads: -1 is not a whole number from 1$"),
        ({"threads": 1.5}, r"^threads: 1\.5 is not"),
        ({"batch_size": 0}, r"^batch_size: 0 is not a whole number from 1$"),
        ({"inputs": ["dog"]}, r"^inputs: \['dog'\] is no mapping; give arguments by name"),
    ],
)
def test_arguments_of_the_wrong_kind_are_told(quantized: Any, arguments: dict[str, Any], told: str) -> None:
    with pytest.raises(octavo.OctavoError, match=told):
        octavo.accelerate(quantized, **arguments)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"seed": 1.5}, r"^seed: 1\.5 is not a whole number from 0"),
        ({"seed": -1}, r"^seed: -1 is not a whole number from 0"),
        ({"inputs": ["dog"]}, r"^inputs: \['dog'\] is no mapping"),
    ],
)
def test_arguments_of_quantize_of_the_wrong_kind_are_told(
    pipeline: Any, arguments: dict[str, Any], told: str
) -> None:
    with pytest.raises(octavo.OctavoError, match=told):
        octavo.quantize(pipeline, RECIPE, progress=False, **arguments)


def test_a_dtype_by_name_is_told() -> None:
    with pytest.raises(octavo.OctavoError, match=r"^dtype: 'bfloat16' is no torch\.dtype"):
        octavo.load("digits", dtype="bfloat16")  # type: ignore[arg-type]


def test_code_of_the_user_s_own_is_not_kept_on_the_disk(quantized: Any) -> None:
    """Its graph is named by a path; the code behind it may be another by the next run."""

    class Doubling(AttnProcessor2_0):
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return 2.0 * super().__call__(*args, **kwargs)

    class Own(torch.nn.Dropout):
        pass

    network = copy.deepcopy(quantized.unet)
    assert not has_foreign_code(network)
    network.mid_block.attentions[0].set_processor(Doubling())
    assert has_foreign_code(network)
    network = copy.deepcopy(quantized.unet)
    network.mid_block.resnets[0].dropout = Own(0.0)
    assert has_foreign_code(network)
    network = copy.deepcopy(quantized.unet)
    network.mid_block.resnets[0].upsample = functools.partial(evaluated)
    assert has_foreign_code(network)
