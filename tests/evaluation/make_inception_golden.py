"""Golden features of FID's InceptionV3 with made-up weights, as torch-fidelity computes them.

    pip install --no-deps --target DIR torch-fidelity==0.4.0
    python tests/evaluation/make_inception_golden.py DIR

writes inception_golden.json. DIR is apart from the environment because torchmetrics cannot be imported beside a
torch-fidelity without torchvision; for the same reason the package's own `__init__` is passed by.
"""

from __future__ import annotations

import sys
import tempfile
import types
from pathlib import Path

import torch
from torch import Tensor, nn

from octavo.files import write_json

GOLDEN = Path(__file__).parent / "inception_golden.json"
COLUMNS = 8


def fill(network: nn.Module) -> dict[str, Tensor]:
    """Give every weight a seeded value of a size that keeps features moderate; returns the state."""
    generator = torch.Generator().manual_seed(0)
    state = network.state_dict()
    for name, value in sorted(state.items()):
        if not value.dtype.is_floating_point:
            continue
        if name.endswith(("running_var", "bn.weight")):
            value.copy_(torch.rand(value.shape, generator=generator) + 0.5)
        elif value.ndim == 1:
            value.copy_(torch.randn(value.shape, generator=generator) * 0.1)
        else:
            value.copy_(torch.randn(value.shape, generator=generator) * (2 / value[0].numel()) ** 0.5)
    return state


def images() -> Tensor:
    """uint8 NCHW, smaller than the network's input in one direction and larger in the other."""
    return torch.randint(
        0, 256, (1, 3, 40, 320), dtype=torch.uint8, generator=torch.Generator().manual_seed(1)
    )


def summary(pooled: Tensor, logits: Tensor, spatial: Tensor) -> dict[str, object]:
    named = {"pooled": pooled, "logits": logits, "spatial": spatial}
    return {
        name: {"size": value.shape[1], "norm": value.norm().item(), "first": value[0, :COLUMNS].tolist()}
        for name, value in named.items()
    }


def main() -> None:
    folder = Path(sys.argv[1]) / "torch_fidelity"
    package = types.ModuleType("torch_fidelity")
    package.__path__ = [str(folder)]
    sys.modules["torch_fidelity"] = package
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    from octavo.evaluation.inception import FIDInception

    with tempfile.NamedTemporaryFile(suffix=".pth") as file:
        torch.save(fill(FIDInception()), file.name)
        network = FeatureExtractorInceptionV3("golden", ["2048", "logits_unbiased"], file.name)
    inner: list[Tensor] = []
    network.Mixed_6d.branch1x1.register_forward_hook(lambda module, args, output: inner.append(output))
    pooled, logits = network(images())
    record = summary(pooled, logits, inner[0][:, :7].flatten(1))
    write_json(GOLDEN, {"command": __doc__.splitlines()[2:4], "torch_fidelity": "0.4.0", **record})


if __name__ == "__main__":
    main()
