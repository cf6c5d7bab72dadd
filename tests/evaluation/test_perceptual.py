from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from octavo.errors import OctavoError
from octavo.evaluation.perceptual import LPIPS, lpips


@pytest.fixture(scope="module")
def network() -> LPIPS:
    torch.manual_seed(0)
    network = LPIPS()
    for weight in network.lin:
        weight.data.uniform_(0, 1)
    return network


def images(size: int = 40, channels: int = 3) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    reference = rng.random((3, size, size, channels)).astype(np.float32)
    return np.clip(reference + rng.normal(0, 0.1, reference.shape), 0, 1).astype(np.float32), reference


def test_agrees_with_torchmetrics(network: LPIPS, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their network with our weights; its body comes from torchvision, which is not needed to have the layers."""
    from torchmetrics.functional.image import lpips as theirs_module

    layers = torch.nn.Sequential(*network.net, torch.nn.MaxPool2d(3, 2))
    monkeypatch.setattr(theirs_module, "_get_tv_model_features", lambda *args, **options: layers)
    theirs = theirs_module._LPIPS(pretrained=False, pnet_rand=True, net="alex")
    for k, weight in enumerate(network.lin):
        theirs.lins[k].model[-1].weight.data = weight.view(1, -1, 1, 1)
    ours, reference = images()
    tensors = [torch.from_numpy(array).permute(0, 3, 1, 2) for array in (ours, reference)]
    with torch.no_grad():
        expected = theirs(*tensors, normalize=True).flatten().numpy()
    save_file(network.state_dict(), tmp_path / "lpips.safetensors")
    found = lpips(ours, reference, tmp_path / "lpips.safetensors")
    assert not isinstance(found, str)
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    equal = lpips(reference, reference, tmp_path / "lpips.safetensors")
    assert not isinstance(equal, str) and np.abs(equal).max() == 0
    grey = lpips(ours[..., :1], reference[..., :1], tmp_path / "lpips.safetensors")
    assert not isinstance(grey, str) and grey.shape == (3,)


def test_says_why_there_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OCTAVO_LPIPS", str(tmp_path / "absent.safetensors"))
    assert "absent.safetensors" in str(lpips(*images()))
    assert "fewer than 32 pixels" in str(lpips(*images(16)))
    (tmp_path / "absent.safetensors").write_text("no weights")
    with pytest.raises(OctavoError, match="not LPIPS weights"):
        lpips(*images())
    with pytest.raises(OctavoError, match="shape"):
        lpips(images()[0][:1], images()[1])
