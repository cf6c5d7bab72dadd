"""Any network as a feature extractor: OpenVINO IR or ONNX, graphs that hold data only and run no code of their own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from octavo.errors import OctavoError
from octavo.evaluation.features import Features, contents_of
from octavo.evaluation.images import to_network
from octavo.runtimes.core import openvino_core


class GraphFeatures:
    """A network file as a feature extractor: uint8 NHWC => `Features`, in float32 on the CPU.

    The network takes one input, N x C x H x W float32 in [0, 1]; images are made grey or coloured and resized
    to its C, H and W where those are fixed (`octavo.evaluation.images.to_network`). Its outputs are told by name:
    `features` [N, D], `logits` [N, C], `spatial` [N, ...]; without a `features` the first unnamed 2-D output is
    taken. Raises `OctavoError` for a file that is absent, damaged or of another form.
    """

    def __init__(self, path: Path) -> None:
        import openvino

        self.name = str(path)
        if not path.is_file():
            raise OctavoError(
                f"{path}: does not exist; give the path of an OpenVINO .xml or an .onnx network"
            )
        core = openvino_core()
        try:
            self.contents = contents_of(path)
            model = core.read_model(path)
            self._size = self._input_size(model)
            # Any batch: extraction's last one is smaller.
            shape = [-1 if size is None else size for size in (None, *self._size)]
            model.reshape(openvino.PartialShape(shape))
            self._outputs = self._find_outputs(model)
            self._compiled = core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        except (OSError, RuntimeError) as error:
            raise OctavoError(f"{path}: is not a network that OpenVINO reads ({str(error)[:200]})") from error

    def __call__(self, images: NDArray[np.uint8]) -> Features:
        _, height, width, channels = images.shape
        sizes = [fixed or own for fixed, own in zip(self._size, (channels, height, width), strict=True)]
        results = self._compiled([to_network(images, *sizes).numpy()])

        def output(name: str) -> Tensor | None:
            if name not in self._outputs:
                return None
            return torch.from_numpy(np.array(results[self._outputs[name]], dtype=np.float32)).flatten(1)

        pooled = output("features")
        if pooled is None or len(pooled) != len(images):
            raise OctavoError(f"{self.name}: does not give one row of features an image")
        return Features(pooled, output("logits"), output("spatial"))

    def _input_size(self, model: Any) -> tuple[int | None, int | None, int | None]:
        if len(model.inputs) != 1:
            raise OctavoError(
                f"{self.name}: has {len(model.inputs)} inputs; make a network with one, of images"
            )
        source = model.inputs[0]
        shape = source.get_partial_shape()
        if (
            shape.rank.is_dynamic
            or shape.rank.get_length() != 4
            or source.get_element_type().to_string() != "f32"
        ):
            raise OctavoError(f"{self.name}: its input must be N x C x H x W float32, is {source}")
        channels, height, width = (None if size.is_dynamic else size.get_length() for size in list(shape)[1:])
        if channels not in (None, 1, 3):
            raise OctavoError(f"{self.name}: takes {channels} channels; images have 1 or 3")
        return channels, height, width

    def _find_outputs(self, model: Any) -> dict[str, int]:
        """Which output is which, by name; the features else by shape."""
        found = {}
        for k, output in enumerate(model.outputs):
            for name in ("features", "logits", "spatial"):
                if name in output.get_names():
                    found[name] = k
        if "features" not in found:
            for k, output in enumerate(model.outputs):
                rank = output.get_partial_shape().rank
                if k not in found.values() and rank.is_static and rank.get_length() == 2:
                    found["features"] = k
                    break
            else:
                raise OctavoError(f"{self.name}: has no output named features, nor another with N x D values")
        return found
