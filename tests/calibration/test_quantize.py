from __future__ import annotations

import copy
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from PIL import Image

import octavo
from octavo.calibration import collect, evaluate
from octavo.calibration.job import job_folder, job_name
from octavo.diffusion import generators
from octavo.errors import OctavoError
from octavo.quantization import QuantConv2d, QuantLinear, quantized_layers
from octavo.threads import torch_threads


class _DropsVariance(DDIMScheduler):  # type: ignore[misc]
    """DDIM knows nothing of a learned variance: it takes the prediction's half."""

    def step(self, model_output, *args, **kwargs):  # type: ignore[no-untyped-def]
        return super().step(model_output[:, :3], *args, **kwargs)


def image(pipeline):  # type: ignore[no-untyped-def]
    return pipeline(
        batch_size=2, generator=generators(0, 0, 2), num_inference_steps=3, output_type="np"
    ).images


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_the_result_is_of_the_same_class_and_the_original_untouched(make_pipeline, recipe) -> None:  # type: ignore[no-untyped-def]
    original = make_pipeline(seed=3)
    before, config = copy.deepcopy(original.unet.state_dict()), dict(original.unet.config)
    pixels = image(original)
    original.scheduler.set_timesteps(7)
    scheduler = str(vars(original.scheduler))
    quantized = octavo.quantize(original, recipe, progress=False)
    assert type(quantized) is type(original) and type(quantized.unet) is type(original.unet)
    assert same(original.unet.state_dict(), before) and dict(original.unet.config) == config
    assert str(vars(original.scheduler)) == scheduler
    assert (image(original) == pixels).all()
    assert quantized.scheduler is not original.scheduler
    assert "save_pretrained" not in vars(original)
    assert not original.unet._forward_pre_hooks and not original.unet.conv_in._forward_pre_hooks


def test_every_conv_and_linear_but_the_edges_is_quantized(pipeline, quantized) -> None:  # type: ignore[no-untyped-def]
    layers = dict(quantized_layers(quantized.unet))
    float_layers = [
        name
        for name, module in quantized.unet.named_modules()
        if type(module) in (torch.nn.Conv2d, torch.nn.Linear)
    ]
    assert float_layers == ["conv_in", "conv_out"]
    assert {type(layer) for layer in layers.values()} == {QuantConv2d, QuantLinear}
    assert all(layer.weight_int8.dtype == torch.int8 for layer in layers.values())


def test_quantized_images_resemble_the_original(pipeline, quantized) -> None:  # type: ignore[no-untyped-def]
    error = ((image(quantized) - image(pipeline)) ** 2).mean()
    assert 0 < error < 1e-3


def test_same_arguments_same_bits_and_another_seed_other_bits(pipeline, recipe, quantized) -> None:  # type: ignore[no-untyped-def]
    again = octavo.quantize(pipeline, recipe, batch_size=4, progress=False)
    assert same(again.unet.state_dict(), quantized.unet.state_dict())
    other = octavo.quantize(pipeline, recipe, batch_size=4, seed=99, progress=False)
    assert not same(other.unet.state_dict(), quantized.unet.state_dict())


@pytest.mark.parametrize("killed_in", ["collect", "observe"])
def test_a_killed_run_goes_on_and_ends_with_the_same_bits(  # type: ignore[no-untyped-def]
    pipeline, recipe, quantized, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed_in: str
) -> None:
    class Killed(BaseException):
        pass

    calls = 0

    def dies(*args: object, **kwargs: object) -> object:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise Killed
        return real(*args, **kwargs)

    module, name = (collect, "capture_pairs") if killed_in == "collect" else (evaluate, "collate")
    real = getattr(module, name)
    monkeypatch.setattr(module, name, dies)
    with pytest.raises(Killed):
        octavo.quantize(pipeline, recipe, batch_size=4, workdir=tmp_path, progress=False)
    (job,) = tmp_path.iterdir()
    assert any(job.iterdir())
    resumed = octavo.quantize(pipeline, recipe, batch_size=4, workdir=tmp_path, progress=False)
    assert calls == 4  # the first batch was not done again: 1, killed in 2, then 2 and 3
    assert same(resumed.unet.state_dict(), quantized.unet.state_dict())
    assert not list(tmp_path.iterdir())


def test_operations_round_output_and_input_to_their_grids(make_pipeline) -> None:  # type: ignore[no-untyped-def]
    recipe = octavo.PTQ4DM(samples=4, steps=2, network_output=True, learned_variance=True, sampled_image=True)
    six_channels = make_pipeline(out_channels=6)
    six_channels.scheduler = _DropsVariance.from_config(six_channels.scheduler.config)
    unet = octavo.quantize(six_channels, recipe, progress=False).unet
    assert sorted(unet.octavo_operations) == ["learned_variance", "network_output", "sampled_image"]
    x = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    for output in (unet(x, 5).sample, unet(sample=x, timestep=5, return_dict=False)[0]):
        for part, name in zip(output.chunk(2, dim=1), ("network_output", "learned_variance"), strict=True):
            steps = part / unet.octavo_operations[name].scale
            torch.testing.assert_close(steps, steps.round(), atol=1e-3, rtol=0)


def test_a_network_without_variance_says_so(pipeline) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(OctavoError, match="learned_variance"):
        octavo.quantize(pipeline, octavo.PTQ4DM(samples=2, steps=2, learned_variance=True), progress=False)


def test_mistakes_are_told_before_anything_is_collected(pipeline, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    for change in ({"exclude": ("*",)}, {"exclude": ("nothing*",)}, {"learned_variance": True}):
        with pytest.raises(OctavoError):
            octavo.quantize(pipeline, octavo.PTQ4DM(**change), workdir=tmp_path, progress=False)
        assert not list(tmp_path.iterdir())


def test_the_same_job_twice_at_once_is_refused(pipeline, recipe, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    name = job_name(pipeline, recipe, 0, 16, None)
    with job_folder(tmp_path, name), pytest.raises(OctavoError, match="another process"):
        octavo.quantize(pipeline, recipe, workdir=tmp_path, progress=False)


def test_work_on_another_number_of_threads_is_not_mixed_in(  # type: ignore[no-untyped-def]
    pipeline, recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def dies(*args, **kwargs):  # type: ignore[no-untyped-def]
        raise KeyboardInterrupt

    with torch_threads(1):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(evaluate, "collate", dies)
            octavo.quantize(pipeline, recipe, batch_size=4, workdir=tmp_path, progress=False)
        (work,) = tmp_path.iterdir()
        assert work.name == job_name(pipeline, recipe, 0, 4, None)
    with torch_threads(2):
        assert job_name(pipeline, recipe, 0, 4, None) != work.name
        made = octavo.quantize(pipeline, recipe, batch_size=4, workdir=tmp_path, progress=False)
    assert made.unet.hf_quantizer.quantization_config.calibration["threads"] == 2
    assert list(tmp_path.iterdir()) == [work]


def test_a_job_is_named_by_the_whole_of_its_inputs(pipeline, recipe) -> None:  # type: ignore[no-untyped-def]
    array = np.zeros(5000)
    changed = array.copy()
    changed[2500] = 1e-9
    tensor = torch.zeros(3)
    variants: list[dict[str, object]] = [
        {},
        {"a": array},
        {"a": changed},
        {"a": [tensor]},
        {"a": [tensor + 1e-7]},
        {"a": [[0.0, 0.0, 0.0]]},
        {"a": Image.fromarray(np.zeros((4, 4), dtype=np.uint8))},
    ]
    names = [job_name(pipeline, recipe, 0, 16, inputs) for inputs in variants]
    assert len(set(names)) == len(names)
    assert names[-1] == job_name(
        pipeline, recipe, 0, 16, {"a": Image.fromarray(np.zeros((4, 4), dtype=np.uint8))}
    )
    with pytest.raises(OctavoError, match=r"inputs\.a"):
        job_name(pipeline, recipe, 0, 16, {"a": object()})


def test_dropout_has_no_part_in_calibration(make_pipeline, recipe, quantized) -> None:  # type: ignore[no-untyped-def]
    training = make_pipeline()
    training.unet.train()
    for module in training.unet.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    again = octavo.quantize(training, recipe, batch_size=4, progress=False)
    assert same(again.unet.state_dict(), quantized.unet.state_dict())
    assert training.unet.training and training.unet.mid_block.training


def test_a_process_that_is_killed_outright_can_go_on(  # type: ignore[no-untyped-def]
    pipeline, recipe, quantized, tmp_path: Path
) -> None:
    pipeline.save_pretrained(tmp_path / "model")
    code = (
        "import octavo, os, signal\n"
        "from octavo.calibration import evaluate\n"
        "real, calls = evaluate.collate, []\n"
        "def dies(*args):\n"
        "    calls.append(1)\n"
        "    if len(calls) == 3: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return real(*args)\n"
        "evaluate.collate = dies\n"
        f"octavo.quantize(octavo.load({str(tmp_path / 'model')!r}), octavo.PTQ4DM(samples=12, steps=4,"
        " pairs_per_trajectory=1), batch_size=4,"
        f" workdir={str(tmp_path / 'work')!r}, progress=False)\n"
    )
    killed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    (job,) = (tmp_path / "work").iterdir()
    assert (job / "observers.safetensors").is_file()
    resumed = octavo.quantize(pipeline, recipe, batch_size=4, workdir=tmp_path / "work", progress=False)
    assert same(resumed.unet.state_dict(), quantized.unet.state_dict())
    assert not list((tmp_path / "work").iterdir())


def test_what_is_quantized_already_is_refused(quantized) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(OctavoError, match="quantized already"):
        octavo.quantize(quantized, progress=False)


def test_lower_bits_are_coarser(pipeline) -> None:  # type: ignore[no-untyped-def]
    errors = []
    for bits in (8, 4):
        recipe = octavo.PTQ4DM(samples=4, steps=2, weights=bits, activations=bits)
        errors.append(
            ((image(octavo.quantize(pipeline, recipe, progress=False)) - image(pipeline)) ** 2).mean()
        )
    assert errors[1] > 10 * errors[0]
