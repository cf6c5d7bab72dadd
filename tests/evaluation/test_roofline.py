"""The peak is measured by an int8 kernel, or it is none."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from octavo.evaluation.machine import machine
from octavo.evaluation.roofline import WEIGHTS, _convolution, _product, int8_peak, share_of_peak


def test_the_kernel_reads_integers_and_is_right() -> None:
    compiled, activations = _product(64, 1)
    kinds = {
        node.get_rt_info()["layerType"]: node.get_rt_info()["runtimePrecision"]
        for node in compiled.get_runtime_model().get_ordered_ops()
    }
    assert kinds.get("FullyConnected", kinds.get("MatMul")) in ("u8", "i8"), kinds
    weights = np.random.default_rng(0).integers(-WEIGHTS, WEIGHTS + 1, (64, 64)).astype(np.int64)
    exact = activations.astype(np.int64) @ weights.T * 0.0002
    assert np.allclose(compiled([activations])[0], exact, rtol=1e-4, atol=0.05)


def test_the_convolution_reads_integers_and_is_right() -> None:
    compiled, activations = _convolution(64, 8, 1)
    kinds = [
        node.get_rt_info()["runtimePrecision"].astype(str)
        for node in compiled.get_runtime_model().get_ordered_ops()
        if node.get_rt_info()["layerType"].astype(str) == "Convolution"
    ]
    assert kinds in (["u8"], ["i8"])
    weights = np.random.default_rng(0).integers(-WEIGHTS, WEIGHTS + 1, (64, 64, 3, 3))
    exact = torch.nn.functional.conv2d(
        torch.from_numpy(activations).double(), torch.from_numpy(weights).double(), padding=1
    )
    assert np.allclose(compiled([activations])[0], exact.numpy() * 0.01, rtol=1e-4, atol=0.05)


def test_a_peak_is_a_rate() -> None:
    assert int8_peak(1, rounds=2, sizes=(256,)) > 1e9
    assert share_of_peak(10**6, [0.5, 2.0, 1.0], 4e6) == pytest.approx(0.25)


def test_the_machine_is_told_in_json() -> None:
    told = machine()
    assert (
        told["threads"] >= 1 and told["versions"]["torch"] != "none" and isinstance(told["cpu_flags"], list)
    )
