"""FID's InceptionV3 against torch-fidelity's, by golden numbers (see make_inception_golden.py)."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from octavo.errors import OctavoError
from octavo.evaluation.features import load_features
from octavo.evaluation.inception import FIDInception, InceptionFeatures, resize_like_tensorflow
from octavo.files import read_json

HERE = Path(__file__).parent


def maker() -> ModuleType:
    spec = importlib.util.spec_from_file_location("maker", HERE / "make_inception_golden.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As torch-fidelity's converted checkpoint holds them: without the batch norms' counters."""
    path = tmp_path_factory.mktemp("inception") / "inception.safetensors"
    state = maker().fill(FIDInception())
    save_file({name: value for name, value in state.items() if value.ndim}, path)
    return path


def test_agrees_with_torch_fidelity(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OCTAVO_INCEPTION", str(weights))
    images = maker().images().permute(0, 2, 3, 1).numpy()
    features = load_features("inception")(images)
    assert features.logits is not None and features.spatial is not None
    golden = read_json(HERE / "inception_golden.json")
    found = maker().summary(features.pooled, features.logits, features.spatial)
    assert (found["pooled"]["size"], found["logits"]["size"], found["spatial"]["size"]) == (2048, 1008, 2023)
    for name, figures in found.items():
        assert figures["size"] == golden[name]["size"]
        assert figures["norm"] == pytest.approx(golden[name]["norm"], rel=1e-4)
        scale = golden[name]["norm"] / golden[name]["size"] ** 0.5
        np.testing.assert_allclose(figures["first"], golden[name]["first"], rtol=1e-3, atol=1e-3 * scale)


def test_resizing_by_whole_factors() -> None:
    """Without half-pixel centres, each factor-th new pixel is an old one; an equal size changes nothing."""
    images = torch.rand(1, 2, 6, 9, generator=torch.Generator().manual_seed(0))
    assert torch.equal(resize_like_tensorflow(images[..., :6], 6), images[..., :6])
    assert torch.allclose(resize_like_tensorflow(images, 18)[..., ::3, ::2], images)
    assert torch.equal(resize_like_tensorflow(images[..., :6], 3), images[..., :6][..., ::2, ::2])
    half_pixels = F.interpolate(images, size=18, mode="bilinear", align_corners=False)
    assert not torch.allclose(resize_like_tensorflow(images, 18), half_pixels, atol=1e-2)


def test_absent_weights_are_one_line_that_says_how_to_get_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OCTAVO_INCEPTION", raising=False)
    monkeypatch.setenv("OCTAVO_CACHE", str(tmp_path))
    with pytest.raises(OctavoError, match=r"docs/evaluation\.md.*OCTAVO_INCEPTION") as caught:
        load_features("inception")
    assert str(tmp_path / "inception.safetensors") in str(caught.value) and "\n" not in str(caught.value)


def test_other_weights_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "text.safetensors").write_text("no weights")
    save_file({"fc.weight": torch.zeros(3)}, tmp_path / "other.safetensors")
    for name in ("text.safetensors", "other.safetensors"):
        with pytest.raises(OctavoError, match="not FID's Inception weights") as caught:
            InceptionFeatures(tmp_path / name)
        assert name in str(caught.value) and len(str(caught.value)) < 400
