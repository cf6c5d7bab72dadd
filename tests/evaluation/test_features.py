from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import openvino
import pytest
import torch
from openvino.frontend.pytorch.ts_decoder import TorchScriptPythonDecoder
from torch import nn

from octavo.errors import OctavoError
from octavo.evaluation.digits import load_digit_classifier
from octavo.evaluation.features import Features, extract, load_features, real_statistics
from octavo.evaluation.graph_features import GraphFeatures
from octavo.evaluation.target import Target
from octavo.runtimes.convert import from_trace


@pytest.fixture
def digits_images() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (7, 16, 16, 1), dtype=np.uint8)


def test_digits_are_the_classifiers_own_features(digits_images) -> None:
    features = extract(load_features("digits"), digits_images, batch_size=3)
    tensor = torch.from_numpy(digits_images).permute(0, 3, 1, 2).float() / 127.5 - 1
    pooled, logits = load_digit_classifier()(tensor)
    torch.testing.assert_close(features.pooled, pooled, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(features.logits, logits, rtol=1e-4, atol=1e-4)
    assert features.spatial is not None and features.spatial.shape == (7, 112)
    assert len(features) == 7 and len(features[:3]) == 3
    assert all(part.dtype == torch.float32 for part in (features.pooled, features.logits, features.spatial))


def test_digits_of_other_sizes_and_in_colour(digits_images) -> None:
    extractor = load_features("digits")
    plain = extract(extractor, digits_images)
    large = np.repeat(np.repeat(digits_images, 2, axis=1), 2, axis=2)
    for images in (large, np.repeat(digits_images, 3, axis=-1)):
        torch.testing.assert_close(extract(extractor, images).pooled, plain.pooled, rtol=1e-3, atol=1e-3)


def test_real_statistics_come_with_digits_only() -> None:
    statistics = real_statistics("digits")
    assert statistics is not None and statistics.count == 1437
    assert real_statistics("inception") is None and real_statistics("net.xml") is None


@pytest.mark.parametrize("spec", ["resnet", "", "net.pt", "weights.safetensors"])
def test_unknown_names_are_one_line(spec: str) -> None:
    with pytest.raises(OctavoError, match="is not digits, inception"):
        load_features(spec)


@pytest.mark.parametrize(
    "images",
    [
        np.zeros((4, 16, 16, 1), dtype=np.float32),
        np.zeros((4, 16, 16), dtype=np.uint8),
        np.zeros((4, 16, 16, 4), dtype=np.uint8),
        np.zeros((0, 16, 16, 1), dtype=np.uint8),
    ],
)
def test_other_arrays_are_refused(images: np.ndarray) -> None:
    with pytest.raises(OctavoError, match="expected uint8"):
        extract(load_features("digits"), images)
    with pytest.raises(OctavoError, match="batch_size"):
        extract(load_features("digits"), np.zeros((4, 16, 16, 1), dtype=np.uint8), batch_size=0)


class Network(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(channels, 4, 3, stride=2)
        self.head = nn.Linear(4, 6)

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        inner = self.conv(images)
        pooled = inner.mean((2, 3))
        return inner, self.head(pooled), pooled


def write_graph(
    path: Path, names: tuple[str | None, ...], shape: tuple[int, ...] = (-1, 3, 8, 8), channels: int = 3
) -> Network:
    network = Network(channels).eval()
    example = torch.zeros(2, channels, *(8 if size == -1 else size for size in shape[2:]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # OpenVINO traces by a deprecated function of torch
        model = from_trace(TorchScriptPythonDecoder(network, example_input=example))
    model.reshape(openvino.PartialShape(list(shape)))
    for output, name in zip(model.outputs, names, strict=True):
        output.set_names({name} if name else set())
    openvino.save_model(model, path, compress_to_fp16=False)
    return network


@pytest.mark.parametrize("shape", [(-1, 3, 8, 8), (5, 3, 8, 8), (-1, 3, -1, -1)])
def test_a_graphs_outputs_are_told_by_name(tmp_path: Path, shape: tuple[int, ...]) -> None:
    network = write_graph(tmp_path / "net.xml", ("spatial", "logits", "features"), shape)
    images = np.random.default_rng(0).integers(0, 256, (7, 8, 8, 3), dtype=np.uint8)
    features = extract(load_features(str(tmp_path / "net.xml")), images, batch_size=4)
    with torch.no_grad():
        inner, logits, pooled = network(torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255)
    torch.testing.assert_close(features.pooled, pooled, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(features.logits, logits, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(features.spatial, inner.flatten(1), rtol=1e-4, atol=1e-5)


def test_a_graph_without_names_gives_its_first_flat_output(tmp_path: Path) -> None:
    network = write_graph(tmp_path / "net.xml", (None, None, None))
    large = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 1), dtype=np.uint8)
    features = GraphFeatures(tmp_path / "net.xml")(large)
    small = large.reshape(2, 8, 2, 8, 2).mean((2, 4)) / 255
    with torch.no_grad():
        logits = network(torch.from_numpy(small).float()[:, None].expand(-1, 3, -1, -1))[1]
    torch.testing.assert_close(features.pooled, logits, rtol=1e-4, atol=1e-5)
    assert features.logits is None and features.spatial is None


def test_onnx_is_read(tmp_path: Path) -> None:
    """A graph of one node, Flatten, written byte by byte: y = flatten(x)."""

    def field(number: int, value: bytes | int) -> bytes:
        if isinstance(value, int):
            return bytes([number << 3, value])
        return bytes([number << 3 | 2, len(value)]) + value

    def info(name: bytes, sizes: tuple[bytes, ...]) -> bytes:
        dims = b"".join(field(1, field(2, size) if size.isalpha() else field(1, int(size))) for size in sizes)
        return field(1, name) + field(2, field(1, field(1, 1) + field(2, dims)))

    node = field(1, b"x") + field(2, b"features") + field(4, b"Flatten")
    graph = field(1, node) + field(2, b"g")
    graph += field(11, info(b"x", (b"N", b"1", b"2", b"2"))) + field(12, info(b"features", (b"N", b"4")))
    (tmp_path / "net.onnx").write_bytes(field(1, 8) + field(7, graph) + field(8, field(2, 13)))
    images = np.arange(12, dtype=np.uint8).reshape(3, 2, 2, 1)
    features = extract(load_features(str(tmp_path / "net.onnx")), images)
    torch.testing.assert_close(features.pooled, torch.arange(12.0).view(3, 4) / 255)


def test_graphs_of_another_form_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(OctavoError, match="does not exist"):
        load_features(str(tmp_path / "absent.xml"))
    (tmp_path / "text.xml").write_text("<net>")
    (tmp_path / "text.onnx").write_text("no network")
    write_graph(tmp_path / "five.xml", (None, None, None), (-1, 5, 8, 8), channels=5)
    write_graph(tmp_path / "taken.xml", (None, "logits", "spatial"))
    for name, cause in (
        ("text.xml", "is not a network"),
        ("text.onnx", "is not a network"),
        ("five.xml", "takes 5 channels"),
        ("taken.xml", "no output named features"),
    ):
        with pytest.raises(OctavoError, match=cause) as caught:
            load_features(str(tmp_path / name))
        assert name in str(caught.value)


def test_features_may_lack_parts() -> None:
    features = Features(torch.zeros(5, 3))
    assert features[1:3].logits is None and len(features[1:3]) == 2


def test_a_graph_is_told_by_its_contents(tmp_path: Path) -> None:
    """Distances are kept under it: those of another network at the same path are none of its."""
    images = np.zeros((2, 8, 8, 3), dtype=np.uint8)
    write_graph(tmp_path / "net.xml", ("spatial", "logits", "features"))
    first = Target.of(str(tmp_path / "net.xml"), shape=images.shape[1:])
    assert Target.of(str(tmp_path / "net.xml"), shape=images.shape[1:]).name == first.name
    with (tmp_path / "net.bin").open("r+b") as weights:
        weights.seek(8)
        weights.write(b"\x01")
    assert Target.of(str(tmp_path / "net.xml"), shape=images.shape[1:]).name != first.name
