"""`octavo bench`: what it compares with what, and that no figure of speed stands without its fidelity."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import run
from diffusers import DDIMScheduler, LDMPipeline, UNet2DModel, VQModel

import octavo
from octavo.cli import bench as command
from octavo.cli.bench_models import compared, is_best
from octavo.diffusion import find_denoiser
from octavo.errors import OctavoError
from octavo.evaluation.peers import PEERS, choose
from octavo.evaluation.peers.choose import Peer
from octavo.quantization import quantized_layers
from octavo.runtimes.core import openvino_core
from octavo.runtimes.precision import has_bf16

SHORT = ("--batch-size", "2", "--rounds", "3", "--precision", "f32")


@pytest.fixture(scope="module")
def model(pipeline: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bench") / "tiny"
    pipeline.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def coarse(pipeline: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of 4 bits, whose rounding nobody can overlook."""
    folder = tmp_path_factory.mktemp("bench") / "coarse"
    recipe = octavo.PTQ4DM(weights=4, samples=4, steps=2)
    octavo.quantize(pipeline, recipe, batch_size=4, progress=False).save_pretrained(folder)
    return folder


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """(figures, text) of one run, where the command prints one of the two."""

    def call(*arguments: object) -> Any:
        seen: list[Any] = []
        monkeypatch.setattr(command, "print_figures", lambda found, _, text: seen.append((found, text)))
        code, _, err = run(capsys, "bench", *arguments, *SHORT)
        assert code == 0, err
        json.dumps(seen[0][0], allow_nan=False)
        return seen[0]

    return call


def test_a_pipeline_that_does_not_run_in_bf16_is_timed_without_it(tmp_path: Path, bench: Any) -> None:
    """LDMPipeline draws its latents in float32, whatever its network is in: the command ended by torch's error."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        blocks = {"block_out_channels": (32,), "layers_per_block": 1, "norm_num_groups": 8}
        unet = UNet2DModel(
            sample_size=8, down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",), **blocks
        )
        pipeline = LDMPipeline(VQModel(**blocks, num_vq_embeddings=8), unet.eval(), DDIMScheduler())
    octavo.quantize(pipeline, octavo.PTQ4DM(samples=2, steps=2), progress=False).save_pretrained(
        tmp_path / "int8"
    )
    found, text = bench(tmp_path / "int8", "--steps", "2")
    assert [row["engine"] for row in found["image"]] == ["torch eager fp32", "octavo int8, as it is"]
    assert "FAILED: torch eager bf16, whole images (RuntimeError" in text
    assert len(found["evaluation"]) == 3


def test_every_figure_stands_beside_its_psnr(coarse: Path, model: Path, bench: Any) -> None:
    """Of the images too; and from the weights in full precision where these are given."""
    before = torch.get_num_threads()
    found, text = bench(coarse, "--steps", "2", "--threads", str(before + 1))
    assert "PSNR, dB" in text and "NOT to the model that it was made of" in text
    assert "below `best` is not known" in text and "precision measures it" in text
    assert "\n2 images, 2 steps (int8 remainder" in f"\n{text}" and "one evaluation, batch 2 (int8" in text
    assert ("torch emulates bf16" in text) == (not has_bf16(openvino_core()))
    assert found["threads"] == before + 1 and torch.get_num_threads() == before
    assert found["reference"] == "dequantized" and found["recipe"] == "as it is" and found["steps"] == 2
    assert found["best"]["holds"] is None
    for unit in ("evaluation", "image"):
        rows = found[unit]
        names = [row["engine"] for row in rows]
        assert names == ["torch eager fp32", "torch eager bf16", "octavo int8, as it is"]
        assert rows[0]["ratio"] == 1.0 and all(r["ratio_low"] <= r["ratio"] <= r["ratio_high"] for r in rows)
        assert rows[0]["psnr"] is None and rows[0]["relative_error"] == 0
        assert all(row["psnr"] > 20 for row in rows[1:]), unit
    assert [row["threads"] for row in found["evaluation"]] == [before + 1] * 3
    given, text = bench(coarse, "--steps", "1", "--reference", model)
    assert "PSNR: to torch fp32 of --reference" in text
    assert given["reference"] == str(model)
    assert given["evaluation"][-1]["psnr"] < found["evaluation"][-1]["psnr"] - 5


def test_a_folder_that_best_made_is_best_itself(pipeline: Any, coarse: Path, tmp_path: Path) -> None:
    recipe = octavo.named_recipe("best", samples=4, steps=2, pairs_per_trajectory=2)
    octavo.quantize(pipeline, recipe, batch_size=4, progress=False).save_pretrained(tmp_path / "best")
    assert compared(str(tmp_path / "best"), None, None, None).is_best
    assert not compared(str(coarse), None, None, None).is_best
    assert is_best(octavo.named_recipe("best", samples=64, steps=20).to_dict())
    changes: list[dict[str, Any]] = [{"pair_limit": True}, {"exclude": ("mid*",)}, {"bits": {"mid*": (4, 8)}}]
    assert not any(is_best(octavo.named_recipe("best", **change).to_dict()) for change in changes)


def test_too_many_steps_are_told_before_anything_is_compiled(
    coarse: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("octavo.runtimes.accelerate", lambda *args, **kwargs: pytest.fail("compiled"))
    code, _, err = run(capsys, "bench", coarse, "--steps", "2000", *SHORT)
    assert code == 2 and "steps: 2,000 is more than the 1,000" in err


def test_what_best_reaches_is_measured_for_another_recipe(model: Path, bench: Any) -> None:
    found, text = bench(model, "--steps", "1", "--recipe", "ptq4dm", "--pair-limit")
    assert "dB below `best`, which has" in text
    assert found["recipe"] == "ptq4dm, pair limit" and found["reference"] == "MODEL"
    assert found["evaluation"][-1]["engine"] == "octavo int8, ptq4dm, pair limit"
    own, best = found["evaluation"][-1]["psnr"], found["best"]
    assert best["below"] == pytest.approx(best["psnr"] - own, abs=1e-3) and best["holds"] == (
        best["below"] <= 0.5
    )


def test_peers_are_left_out_for_two_different_reasons(
    model: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []

    def fails(task: Any) -> Any:
        seen.append(task)
        raise RuntimeError("no kernel")

    monkeypatch.setattr(
        choose, "PEERS", {**PEERS, "broken": Peer(fails), "absent": Peer(fails, ("no_such_package",))}
    )
    arguments = ("bench", model, *SHORT, "--recipe", "best", "--peers", "broken,absent")
    code, out, err = run(capsys, *arguments)
    assert code == 0, err
    assert "FAILED: broken (RuntimeError: no kernel)" in out
    assert "left out: absent (pip install no_such_package)" in out and "is `best` itself" in out
    (task,) = seen
    judged = task.kwargs["sample"]
    assert len(task.calibration) == 4 * 4  # 4 steps of 8 images, 2 at a time
    assert not any(torch.equal(call["sample"], judged) for call in task.calibration)
    code, _, err = run(capsys, *arguments, "--steps", "3")
    assert (
        code == 2 and err.startswith("octavo: --steps: is of whole images")
    ) or "--steps: is of whole" in err


def test_what_cannot_be_compared_is_refused(
    model: Path, coarse: Path, make_pipeline: Any, tmp_path: Path
) -> None:
    make_pipeline(seed=1).save_pretrained(tmp_path / "other")
    other = octavo.load(tmp_path / "other")
    torch.nn.init.normal_(find_denoiser(other)[1].conv_norm_out.weight)
    other.save_pretrained(tmp_path / "other")
    for arguments, told in (
        ((model, model, None), "in full precision itself"),
        ((coarse, None, "best"), "is quantized already"),
        ((coarse, coarse, None), "is quantized itself"),
        ((coarse, tmp_path / "other", None), "is another model"),
        ((model, None, "better"), "recipe: 'better' is not one of"),
    ):
        with pytest.raises(OctavoError, match=told):
            compared(*(None if part is None else str(part) for part in arguments), lambda _: {})  # type: ignore[arg-type,misc]
    with pytest.raises(OctavoError, match=r"--pair-limit: .* is quantized already"):
        compared(str(coarse), None, None, lambda _: {}, pair_limit=True)


def test_a_large_network_is_balanced_as_best_is_and_rounded_to_nearest(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """About as fast as `best`: nearly as many layers have multiplications in front, or float activations there."""
    monkeypatch.setattr("octavo.cli.bench_models.AFFORDABLE", 10)
    large = compared(str(model), None, None, lambda _: {})
    assert large.recipe == "best without gptq and float activations"
    best = compared(str(model), None, "best", lambda _: {})
    count, of_best = (
        sum(
            layer.input_multiplier is not None or layer.input_spec.is_float
            for name, layer in quantized_layers(both.quantized.unet)
            if "time" not in name
        )
        for both in (large, best)
    )
    assert of_best > 5 and abs(count - of_best) <= 0.2 * of_best
