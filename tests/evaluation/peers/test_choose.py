"""Peers: by name, built where they can be, named where not; all compute the same network."""

from __future__ import annotations

import importlib.util
import warnings
from typing import Any

import pytest
import torch

from octavo.diffusion import first_call
from octavo.errors import OctavoError
from octavo.evaluation.peers import PEERS, Peer, Task, build, choose, chosen
from octavo.evaluation.peers.architectures import ARCHITECTURES, BarePipeline, architecture
from octavo.evaluation.peers.calibration import calibration_calls
from octavo.evaluation.peers.task import threads_of


@pytest.fixture(scope="module")
def task(pipeline: Any) -> Task:
    _, kwargs = first_call(pipeline, batch_size=2)
    return Task(pipeline.unet, kwargs, [kwargs] * 2, threads=1)


def _tensor(output: Any) -> torch.Tensor:
    while not hasattr(output, "dtype"):
        output = output[0]
    return torch.as_tensor(output).float()


def test_peers_compute_the_network(task: Task) -> None:
    """Each within what its precision allows, so that what is timed is the work."""
    with torch.inference_mode():
        exact = task.denoiser(**task.kwargs).sample
        built = build(("torch eager fp32", "torch eager bf16", "torch autocast bf16", "openvino fp32"), task)
        assert len(built.engines) == 4 and not built.missing and not built.failed
        for name, run in built.engines.items():
            error = float((_tensor(run()) - exact).norm() / exact.norm())
            assert error < (1e-4 if "fp32" in name else 0.05), name
            assert ("fp32" in name) == (error < 1e-4), name


def test_what_is_missing_or_fails_is_named(task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(task: Task) -> Any:
        raise RuntimeError("no kernel\nand more")

    peers = {**PEERS, "broken": Peer(fails), "absent": Peer(fails, ("no_such_package",))}
    monkeypatch.setattr(choose, "PEERS", peers)
    told: list[str] = []
    built = build(("torch eager fp32", "broken", "absent"), task, told.append)
    assert list(built.engines) == ["torch eager fp32"] and told == ["torch eager fp32", "broken"]
    assert built.failed == {"broken": "RuntimeError: no kernel"}
    assert built.missing == {"absent": "pip install no_such_package"}


def test_a_peer_for_which_memory_is_short_is_left_out(task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choose, "available", lambda: 1000)
    built = build(("torch eager fp32", "torch eager bf16"), task)
    assert list(built.engines) == ["torch eager fp32"] and list(built.missing) == ["torch eager bf16"]
    assert "GiB are available; name fewer peers" in built.missing["torch eager bf16"]
    monkeypatch.setattr(choose, "available", lambda: None)
    assert not build(("torch eager fp32", "torch eager bf16"), task).missing


def test_f32_is_not_timed_under_the_name_of_bf16(task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choose, "has_bf16", lambda core: False)
    names = [name for name in PEERS if "bf16" in name and not name.startswith("torch")]
    assert len(names) == 4
    built = build(names, task)
    assert not built.engines and not built.failed
    assert built.missing == dict.fromkeys(names, "this CPU has no bf16; OpenVINO would compute in f32")


@pytest.mark.parametrize(
    ("name", "farthest"),
    [
        ("openvino bf16", 0.05),
        ("nncf int8 mixed, f32", 0.3),
        ("nncf int8 transformer, f32", 0.3),
        ("onnxruntime fp32", 1e-4),
        ("onnxruntime int8", 0.3),
    ],
)
def test_peers_that_are_installed_work(pipeline: Any, name: str, farthest: float) -> None:
    """A peer that raises is left out of the table by `bench`, so that nobody else would notice."""
    for package in PEERS[name].needs:
        pytest.importorskip(package)
    _, kwargs = first_call(pipeline, batch_size=2)
    calls = calibration_calls(pipeline, images=2, batch_size=2, steps=2)
    with torch.inference_mode(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # theirs
        exact = pipeline.unet(**kwargs).sample
        engine = PEERS[name].build(Task(pipeline.unet, kwargs, calls, threads=1))
        error = float((_tensor(engine()) - exact).norm() / exact.norm())
    assert error < farthest and threads_of(engine) == 1


def test_names() -> None:
    assert chosen("all") == tuple(PEERS) and chosen(None)[0] == "torch eager fp32"
    assert chosen("nncf int8 mixed") == ("torch eager fp32", "nncf int8 mixed, f32", "nncf int8 mixed, bf16")
    for wrong in ("tensorrt", "openvino,", ""):
        with pytest.raises(OctavoError, match="--peers: "):
            chosen(wrong)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("ddpm-cifar10", 35.7e6), ("dit-s-2", 39.8e6), ("sd15", 859.5e6), ("sdxl", 2567.5e6)],
)
def test_architectures_have_their_size(name: str, parameters: float) -> None:
    with torch.device("meta"):
        network = ARCHITECTURES[name]()
    assert sum(p.numel() for p in network.parameters()) == pytest.approx(parameters, rel=0.02)


def test_a_bare_pipeline_samples_by_its_seeds(monkeypatch: pytest.MonkeyPatch) -> None:
    from diffusers import DDIMScheduler, DiTTransformer2DModel

    from octavo.evaluation.generate import generate

    before = torch.get_rng_state()
    small = DiTTransformer2DModel(
        num_attention_heads=1,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=1,
        sample_size=4,
    )
    monkeypatch.setitem(ARCHITECTURES, "small", lambda: small)  # type: ignore[arg-type]
    torch.set_rng_state(before)
    pipeline = architecture("small")
    assert isinstance(pipeline, BarePipeline) and isinstance(pipeline.scheduler, DDIMScheduler)
    assert torch.equal(torch.get_rng_state(), before)
    images = generate(pipeline, 2, steps=2, progress=False)
    again = generate(pipeline, 2, steps=2, batch_size=1, progress=False)
    assert images.shape == (2, 4, 4, 4) and abs(images - again).max() < 1e-5
    with pytest.raises(OctavoError, match="one of ddpm-cifar10"):
        architecture("unknown")


def test_needs_are_packages_of_the_extra() -> None:
    """What is installed with `octavo[bench]` is found under the name that is asked for."""
    needed = {package for peer in PEERS.values() for package in peer.needs}
    assert needed == {"torchao", "nncf", "onnx", "onnxruntime"}
    assert importlib.util.find_spec("openvino") is not None
