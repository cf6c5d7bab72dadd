"""Every command that runs a pipeline, with the inputs of a conditional one; and what it refuses before it works."""

from __future__ import annotations

import functools
import inspect
from pathlib import Path
from typing import Any

import diffusers
import pytest
from command_line import run
from diffusers.models.embeddings import Timesteps
from tiny_families import PICTURES, build

from octavo.cli.app import app
from octavo.cli.inputs import OPTIONS
from octavo.quantization import ranges
from octavo.study import tune_networks, workbench

SMALL = {
    "trajectory": "MODEL --steps 2 --candidates 3 --num-images 3 --batch-size 3 --runtime torch --out OUT/t.json",
    "analytic": "MODEL --candidates 2 --num-images 8 --batch-size 8 --runtime torch --out OUT/analytic",
    "reuse": "MODEL --steps 2 --num-images 3 --runtime torch --out OUT/reuse.json",
    "tune": "MODEL --target quality=1 --metric psnr --recipes ptq4dm --solvers ddim --spacings trailing --steps 2 "
    "--num-images 8 --reference-steps 2 --samples 3 --calibration-steps 2 --batch-size 8 --out OUT/tune",
    "sensitivity": "MODEL --recipe ptq4dm --samples 3 --calibration-steps 2 --num-images 3 --steps 2 --batch-size 3 "
    "--out OUT/sensitivity",
    "report": "INT8 --reference MODEL --runtime torch --num-images 3 --steps 2 --batch-size 3 --out OUT/report.html",
    "study": "MODEL --quick --no-low-bits --seeds 1 --num-images 8 --steps 2 --samples 3 --batch-size 8 --table T2 "
    "--features digits --out OUT/study",
    "bench": "INT8 --batch-size 3 --rounds 3 --steps 1",
    "evaluate": "INT8 --reference MODEL --runtime torch --num-images 8 --batch-size 8 --steps 2 --features digits "
    "--no-cost --threads 1",
    "export": "INT8 --format openvino --batch-size 3 --out OUT/exported",
}
"""A small run of each: MODEL in full precision, INT8, OUT a folder."""


@pytest.fixture(scope="module")
def models(tmp_path_factory: Any) -> dict[str, Path]:
    """Folders of full-precision pipelines, by family; "dit-int8" is quantized."""
    folders: dict[str, Path] = {}
    for family in ("dit", "sd", "img2img", "sd3", "ltx", "flux"):
        folders[family] = tmp_path_factory.mktemp(family) / family
        pipeline, inputs = build(family)
        if family == "dit":
            import octavo

            pipeline, inputs = _deeper_dit(), inputs
            folders["dit-int8"] = folders[family].parent / "int8"
            recipe = octavo.PTQ4DM(samples=3, steps=2, metric="minmax")
            octavo.quantize(pipeline, recipe, inputs=inputs, progress=False).save_pretrained(
                folders["dit-int8"]
            )
        pipeline.save_pretrained(folders[family])
    return folders


def _deeper_dit() -> Any:
    """Three blocks, so that one of them can be left out."""
    pipeline, _ = build("dit")
    config = {**pipeline.transformer.config, "num_layers": 3}
    pipeline.transformer = type(pipeline.transformer).from_config(config).eval()
    return pipeline


@pytest.fixture
def in_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a command has no --runtime: nothing is compiled. Ranges are searched coarsely."""
    monkeypatch.setattr(ranges, "CANDIDATES", 5)
    monkeypatch.setattr(workbench, "execute", lambda pipeline, *rest: (pipeline, "simulation (torch)"))
    monkeypatch.setattr(tune_networks, "accelerate", lambda pipeline, *rest, **settings: pipeline)


def seen(monkeypatch: pytest.MonkeyPatch, kind: Any, name: str) -> set[Any]:
    """What the pipeline's calls are given under `name`, filled while they are made."""
    found: set[Any] = set()
    call = kind.__call__

    @functools.wraps(call)
    def watched(self: Any, *args: Any, **kwargs: Any) -> Any:
        found.update(kwargs[name])
        return call(self, *args, **kwargs)

    monkeypatch.setattr(kind, "__call__", watched)
    return found


def arguments(command: str, model: Path, int8: Path, out: Path) -> list[str]:
    words = SMALL[command].replace("MODEL", str(model)).replace("INT8", str(int8)).replace("OUT", str(out))
    return [command, *words.split()]


@pytest.mark.parametrize("command", SMALL)
def test_the_pipeline_is_called_with_what_was_given(
    command: str,
    models: dict[str, Path],
    in_torch: None,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: Any,
) -> None:
    labels = seen(monkeypatch, diffusers.DiTPipeline, "class_labels")
    given = arguments(command, models["dit"], models["dit-int8"], tmp_path)
    code, out, err = run(capsys, *given, "--class-labels", "1,5,7")
    assert code == 0, err
    assert labels == {1, 5, 7}
    if "next: " in out:
        assert "--class-labels 1,5,7" in out.partition("next: ")[2]


def test_prompts_come_from_a_file(
    models: dict[str, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any
) -> None:
    prompts = seen(monkeypatch, diffusers.StableDiffusionPipeline, "prompt")
    (tmp_path / "prompts.txt").write_text("a red cat\ntwo dogs\na hat\n")
    given = arguments("trajectory", models["sd"], models["sd"], tmp_path)
    code, out, err = run(capsys, *given, "--prompts", tmp_path / "prompts.txt", "--input", "guidance_scale=3")
    assert code == 0, err
    assert prompts == {"a red cat", "two dogs", "a hat"}
    assert f"--prompts {tmp_path / 'prompts.txt'} --input guidance_scale=3" in out


def test_sensitivity_of_a_network_that_is_told_a_thousandth_of_the_timestep(
    models: dict[str, Path], in_torch: None, tmp_path: Path, capsys: Any
) -> None:
    (tmp_path / "prompts.txt").write_text("a red cat\n")
    given = arguments("sensitivity", models["flux"], models["flux"], tmp_path)
    sizes = ("--input", "height=16", "--input", "width=16", "--input", "max_sequence_length=8")
    code, out, err = run(capsys, *given, "--prompts", tmp_path / "prompts.txt", *sizes, "--num-images", "2")
    assert code == 0, err
    assert "rank correlation" in out


def commands_of_models() -> list[Any]:
    found = []
    for registered in app.registered_commands:
        callback: Any = registered.callback
        if "model" in inspect.signature(callback).parameters:
            found.append(pytest.param(callback, id=str(registered.name)))
    return found


@pytest.mark.parametrize("command", commands_of_models())
def test_every_command_that_runs_a_model_takes_the_same_options(command: Any) -> None:
    taken = inspect.signature(command).parameters
    assert {name: taken[name].annotation for name in OPTIONS} == OPTIONS


@pytest.mark.parametrize("command", SMALL)
def test_what_a_pipeline_needs_is_asked_for_by_its_option(
    command: str, models: dict[str, Path], in_torch: None, tmp_path: Path, capsys: Any
) -> None:
    given = arguments(command, models["dit"], models["dit-int8"], tmp_path)
    code, _, err = run(capsys, *given)
    assert code == 2
    assert "octavo: inputs: DiTPipeline needs class_labels (--class-labels)" in err
    code, _, err = run(capsys, *given, "--class-labels", "1", "--prompt", "a cat")
    assert code == 2
    assert "octavo: inputs: DiTPipeline takes no prompt" in err


REFUSED = {
    "img2img": {
        "trajectory": "StableDiffusionImg2ImgPipeline leaves out 2 of 10 steps",
        "analytic": "StableDiffusionImg2ImgPipeline leaves out 2 of 10 steps",
        "tune": "leave dp out of the spacings",
    },
    "sd3": {
        "trajectory": "scheduler: FlowMatchEulerDiscreteScheduler has no alpha-bars",
        "analytic": "scheduler: FlowMatchEulerDiscreteScheduler has no alpha-bars",
        "tune": "scheduler: FlowMatchEulerDiscreteScheduler has no alpha-bars",
        "study": "scheduler: ",
        "reuse": "SD3Transformer2DModel: is neither a U-Net",
    },
    "ltx": dict.fromkeys(
        ("tune", "sensitivity", "report", "study", "evaluate"), "pipeline: LTXPipeline makes videos"
    ),
}


@pytest.mark.parametrize(("family", "command"), [(f, c) for f, refused in REFUSED.items() for c in refused])
def test_what_cannot_work_is_refused_before_anything_is_computed(
    family: str,
    command: str,
    models: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: Any,
) -> None:
    def never(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("the network was evaluated")

    monkeypatch.setattr(Timesteps, "forward", never)  # what every denoiser begins with
    PICTURES[0].save(tmp_path / "one.png")
    inputs: list[object] = ["--prompt", "a cat"]
    if family == "img2img":
        inputs += ["--image", tmp_path / "one.png", "--input", "strength=0.8"]
    given = arguments(command, models[family], models[family], tmp_path)
    if command == "tune":
        given[given.index("trailing")] = "dp"
    code, _, err = run(capsys, *given, *inputs)
    assert code == 2
    assert REFUSED[family][command] in err and len(err.splitlines()) == 1, err
