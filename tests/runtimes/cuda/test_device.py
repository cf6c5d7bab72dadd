from __future__ import annotations

import sys
from collections.abc import Callable

import pytest
import torch
from diffusers import DDIMPipeline

import octavo
from octavo.errors import OctavoError
from octavo.runtimes.cuda.device import compute_device

CPU = torch.device("cpu")


@pytest.fixture
def not_interpreted(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    pytest.importorskip("triton", reason="triton is not installed (pip install octavo[cuda])")
    from octavo.runtimes.cuda import launch

    monkeypatch.setattr(launch, "interpreted", lambda: False)
    return monkeypatch


def test_without_triton_one_line_says_what_to_install(
    make_pipeline: Callable[..., DDIMPipeline], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(
        OctavoError,
        match=r"^triton cannot be imported \(.*\): pip install -e '.\[cuda\]' in Octavo's checkout$",
    ):
        octavo.accelerate(make_pipeline(), runtime="torch-cuda")


def test_without_a_gpu_one_line_says_what_it_needs(not_interpreted: pytest.MonkeyPatch) -> None:
    not_interpreted.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(
        OctavoError, match=r"needs an NVIDIA GPU of compute capability 8\.0 .* torch sees none"
    ):
        compute_device(CPU)


def test_the_gpu_that_holds_the_network_or_the_current_one(not_interpreted: pytest.MonkeyPatch) -> None:
    """Of what torch says of its GPUs; none is asked."""
    capabilities = {0: (9, 0), 1: (7, 5)}
    not_interpreted.setattr(torch.cuda, "is_available", lambda: True)
    not_interpreted.setattr(torch.cuda, "current_device", lambda: 0)
    not_interpreted.setattr(torch.cuda, "get_device_capability", lambda device: capabilities[device.index])
    assert compute_device(CPU) == torch.device("cuda", 0)
    with pytest.raises(OctavoError, match=r"and cuda:1 has 7\.5; take another GPU"):
        compute_device(torch.device("cuda", 1))
    capabilities[1] = (8, 6)
    assert compute_device(torch.device("cuda", 1)) == torch.device("cuda", 1)


def test_the_interpreter_computes_on_the_cpu() -> None:
    pytest.importorskip("triton", reason="triton is not installed (pip install octavo[cuda])")
    from octavo.runtimes.cuda import launch

    if not launch.interpreted():
        pytest.skip("TRITON_INTERPRET=0: kernels run on the GPU")
    assert compute_device(CPU) == CPU
