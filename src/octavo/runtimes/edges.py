"""The float layers that read the image and write the output stay in f32 where the rest of the remainder is bf16.

bf16 holds 8 bits of a number: written in it, the noisy image and the predicted noise carry an error as large as that of
all quantized layers together, and nothing behind averages it out. The two layers cost next to nothing in f32
(docs/log.md, 2026-11-24).
"""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import openvino

MULTIPLICATIONS = ("Convolution", "GroupConvolution", "MatMul")
_QUANTIZER = "FakeQuantize"


def float_edges(model: openvino.Model, quantized: Collection[str]) -> list[str]:
    """Names of the nodes of the float layers at the edges of a graph; none if none of its layers is quantized.

    First: the multiplications that the noisy image, the graph's first input, reaches through no other one. Last: those
    that reach an output through no other one. Where a quantizer lies between, that edge is rounded anyway. `quantized`:
    names of the quantized layers, which run in integers.
    """
    if not quantized:
        return []
    firsts = _nearest([model.inputs[0].get_node()], _readers)
    lasts = _nearest([port.get_node() for port in model.outputs], _sources)
    names = {node.get_friendly_name() for node in (*firsts, *lasts)}
    return sorted(name for name in names if layer_of(name) not in quantized)


def layer_of(node: str) -> str:
    """The layer that a node is named after (`octavo.runtimes.convert`).

    >>> layer_of("__module.denoiser.conv_in/aten::_convolution/Convolution")
    'conv_in'
    """
    return node.split("/")[0].removeprefix("__module.denoiser.")


def save_with_f32_layers(model: openvino.Model, layers: Iterable[str], path: Path) -> None:
    """Save `model` as the IR `path` (.xml, .bin) in which `layers` are marked to be computed in f32.

    The mark is the IR's own `precise` attribute (`ov::DisableFP16Compression`), which the CPU plugin takes to mean that
    the inference precision is not enforced on this layer. Python can set it nowhere but in the file.
    """
    import openvino

    openvino.save_model(model, path, compress_to_fp16=False)
    marked = set(layers)
    if not marked:
        return
    tree = ET.parse(path)
    for layer in tree.getroot().iterfind("layers/layer"):
        if layer.get("name") in marked:
            information = layer.find("rt_info")
            if information is None:
                ports = next(i for i, child in enumerate(layer) if child.tag in ("input", "output"))
                information = ET.Element("rt_info")
                layer.insert(ports, information)
            ET.SubElement(information, "attribute", {"name": "precise", "version": "0"})
    tree.write(path, encoding="utf-8", xml_declaration=True)


def _nearest(start: Iterable[Any], neighbours: Callable[[Any], Iterator[Any]]) -> Iterator[Any]:
    """The multiplications that `start` reaches through neither another one nor a quantizer."""
    waiting, seen = list(start), set()
    while waiting:
        for node in neighbours(waiting.pop()):
            name, kind = node.get_friendly_name(), node.get_type_name()
            if name in seen:
                continue
            seen.add(name)
            if kind in MULTIPLICATIONS:
                yield node
            elif kind != _QUANTIZER:
                waiting.append(node)


def _readers(node: Any) -> Iterator[Any]:
    return (port.get_node() for output in node.outputs() for port in output.get_target_inputs())


def _sources(node: Any) -> Iterator[Any]:
    return (port.get_source_output().get_node() for port in node.inputs())
