from __future__ import annotations

import importlib.metadata
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMPipeline, FlowMatchEulerDiscreteScheduler

import octavo
from octavo.diffusion import with_denoiser
from octavo.errors import OctavoError
from octavo.fingerprint import fingerprint, model_identity, pipeline_fingerprint, same_model, versions
from octavo.quantization import quantized_layers


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


class Own(DDIMPipeline):
    """Has a setting of its own, as Stable Diffusion XL (`force_zeros_for_empty_prompt`)."""

    def __init__(self, unet: Any, scheduler: Any, zeros: bool = True) -> None:
        super().__init__(unet, scheduler)
        self.register_to_config(zeros=zeros)


def test_a_pipelines_run_is_told_by_all_that_decides_it(make_pipeline: Callable[..., DDIMPipeline]) -> None:
    pipeline, other = make_pipeline(), make_pipeline(seed=1)
    other_clipping = with_denoiser(pipeline, "unet", pipeline.unet)
    other_clipping.scheduler.register_to_config(clip_sample_range=2.0)
    settings = [Own(pipeline.unet, pipeline.scheduler, zeros) for zeros in (True, False)]
    shifted = with_denoiser(pipeline, "unet", pipeline.unet)
    shifted.scheduler = FlowMatchEulerDiscreteScheduler()
    names = [
        *(pipeline_fingerprint(other, [1], {}) for other in settings),
        pipeline_fingerprint(shifted, [1], {}),
        pipeline_fingerprint(pipeline, [1], {}),
        pipeline_fingerprint(pipeline, [2], {}),
        pipeline_fingerprint(pipeline, [1], {"eta": 1.0}),
        pipeline_fingerprint(other_clipping, [1], {}),
        pipeline_fingerprint(other, [1], {}),
    ]
    assert len(set(names)) == len(names)
    shifted.scheduler.set_shift(3.0)
    assert pipeline_fingerprint(shifted, [1], {}) not in names
    assert pipeline_fingerprint(make_pipeline(), [1], None) == names[3]
    assert pipeline_fingerprint(pipeline, [1], {}, {"unet": other.unet}) == names[-1]
    with pytest.raises(OctavoError, match=r"inputs\.callback"):
        pipeline_fingerprint(pipeline, [1], {"callback": print})


@pytest.mark.parametrize("settings", [{"weights": 2}, {"weights": 4, "group_size": 16}, {"balance": True}])
def test_a_model_is_the_same_in_few_bits_too_and_another_is_another(
    settings: dict[str, Any], make_pipeline: Callable[..., DDIMPipeline]
) -> None:
    pipeline, recipe = make_pipeline(), octavo.PTQ4DM(samples=4, steps=2, **settings)
    quantized = octavo.quantize(pipeline, recipe, batch_size=4, progress=False)
    identity, of_other = model_identity(pipeline.unet), model_identity(make_pipeline(seed=1).unet)
    assert same_model(model_identity(quantized.unet), identity)
    assert not same_model(model_identity(quantized.unet), of_other)
    assert cosine(model_identity(quantized.unet), identity) > 0.7
    assert abs(cosine(of_other, identity)) < 0.4
    for _, layer in quantized_layers(quantized.unet):
        assert torch.equal(layer.weight_row(1), layer.weight[1])


def cosine(a: str, b: str) -> float:
    x, y = (np.array([int(digit, 16) - 7.5 for digit in name.split(".")[1]]) for name in (a, b))
    return float(x @ y / np.linalg.norm(x) / np.linalg.norm(y))


def test_identities_that_are_none_are_no_models() -> None:
    network = torch.nn.Sequential(torch.nn.SiLU())
    assert "." not in model_identity(network) and same_model(model_identity(network), model_identity(network))
    for other in ("a.0f0g", "a.0f0f0", "b.0f0f"):
        assert not same_model("a.0f0f", other)
