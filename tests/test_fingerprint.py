from __future__ import annotations

import importlib.metadata
from collections.abc import Callable

import pytest
import torch
from diffusers import DDIMPipeline

from octavo.diffusion import with_denoiser
from octavo.errors import OctavoError
from octavo.fingerprint import fingerprint, pipeline_fingerprint, versions


def test_versions_are_those_installed() -> None:
    found = versions("torch", "no-such-package")
    assert found == {"torch": importlib.metadata.version("torch"), "no-such-package": "none"}


def test_a_network_is_told_by_its_tensors(make_pipeline: Callable[..., DDIMPipeline]) -> None:
    network = make_pipeline().unet
    before = fingerprint(network)
    assert fingerprint(make_pipeline().unet) == before != fingerprint(make_pipeline(seed=1).unet)
    assert fingerprint(network, "more") != before
    with torch.no_grad():
        network.conv_in.bias[0] += 1
    assert fingerprint(network) != before


def test_a_pipelines_run_is_told_by_all_that_decides_it(make_pipeline: Callable[..., DDIMPipeline]) -> None:
    pipeline, other = make_pipeline(), make_pipeline(seed=1)
    other_clipping = with_denoiser(pipeline, "unet", pipeline.unet)
    other_clipping.scheduler.register_to_config(clip_sample_range=2.0)
    names = [
        pipeline_fingerprint(pipeline, [1], {}),
        pipeline_fingerprint(pipeline, [2], {}),
        pipeline_fingerprint(pipeline, [1], {"eta": 1.0}),
        pipeline_fingerprint(other_clipping, [1], {}),
        pipeline_fingerprint(other, [1], {}),
    ]
    assert len(set(names)) == len(names)
    assert pipeline_fingerprint(make_pipeline(), [1], None) == names[0]
    assert pipeline_fingerprint(pipeline, [1], {}, {"unet": other.unet}) == names[-1]
    with pytest.raises(OctavoError, match=r"inputs\.callback"):
        pipeline_fingerprint(pipeline, [1], {"callback": print})
