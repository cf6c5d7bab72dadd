"""A denoiser as a file that engines run without Octavo: OpenVINO's IR or ONNX, with what a sampler needs."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from octavo.calibration.components import quantized_parts
from octavo.diffusion import find_denoiser, first_call
from octavo.diffusion.trajectories import steps_of
from octavo.errors import OctavoError, check_choice
from octavo.files import atomic_path, write_json
from octavo.fingerprint import versions
from octavo.places import check_place
from octavo.quantization import (
    QuantLayer,
    integer_layers,
    layer_counts,
    quantized_layers,
    quantized_products,
)
from octavo.runtimes.accelerate import executor_of
from octavo.runtimes.audit import AuditRow, audit_compiled, audited, require_integers
from octavo.runtimes.calls import Call, take_apart, tensors_of
from octavo.runtimes.core import openvino_core
from octavo.runtimes.network import float32_copy
from octavo.runtimes.onnx_patterns import DIALECTS, Dialect
from octavo.runtimes.reuse.execute import refuse_reusing
from octavo.runtimes.sampling import sampling_settings
from octavo.runtimes.saturation import adds_in_16_bits, layers_to_split, may_saturate

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

Format = Literal["openvino", "onnx"]
FORMATS = ("openvino", "onnx")
NETWORK = {"openvino": "denoiser.xml", "onnx": "denoiser.onnx"}
ENGINE = {"openvino": "OpenVINO", "onnx": "ONNX Runtime"}
DESCRIPTION = "export.json"
SCHEDULER, OWN_SCHEDULER = "scheduler", "octavo-scheduler"
"""The second for a scheduler that is Octavo's own: diffusers would load it from the first, and leave half of it out."""
STEPS = 20
SETTINGS = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0}
"""For OpenVINO: what stays float in f32, and only what was calibrated quantized."""
FARTHEST = 0.2
"""Relative L2 distance of one evaluation to the simulation beyond which the file is wrong: flips are below."""


@dataclass(frozen=True)
class Export:
    """What was written: its network's file, one evaluation's relative L2 distance to the simulation, and the audit.

    `audit`: by `engine`, on this machine's CPU. `notes`: what the file's user should know, a line each.
    """

    path: Path
    distance: float
    audit: list[AuditRow]
    notes: list[str]
    engine: str


def export(
    pipeline: DiffusionPipeline,
    folder: str | os.PathLike[str],
    format: Format = "openvino",
    *,
    batch_size: int | None = None,
    dialect: Dialect = "portable",
    steps: int | None = None,
    inputs: Mapping[str, Any] | None = None,
) -> Export:
    """Write the denoiser of `pipeline` to `folder` so that it runs in int8 without Octavo and without torch.

    The folder, which is replaced, holds the network (`denoiser.xml` with its `.bin`, or `denoiser.onnx`), the
    scheduler's settings as diffusers saves them (`scheduler/`; `octavo-scheduler/` for one that diffusers lacks), and
    `export.json`: every input and output by name, type and shape, the noise schedule, the timesteps to visit, how many
    layers are quantized, have float activations, and were audited, and what it was made by. docs/export.md has scripts
    that run it.

    batch_size  images that a call denoises; None leaves their number free. OpenVINO's int8 products of attention need a
                fixed one. A pipeline that guides itself evaluates twice as many rows.
    dialect     for ONNX: "portable" (TensorRT, OpenVINO) or "onnxruntime" (`octavo.runtimes.onnx_patterns`).
    steps       sampler steps whose timesteps `export.json` lists; None: those of the pipeline's trajectory, or 20.
    inputs      what the pipeline's call needs besides (a prompt, class labels), where it needs any.

    What was written is evaluated once, beside the simulation. Raises `OctavoError` for an unknown argument, a network
    that cannot be exported, one that OpenVINO would not run in int8, and one that computes something else.
    """
    check_choice("format", format, FORMATS)
    check_choice("dialect", dialect, DIALECTS)
    check_place(folder)
    if Path(folder).is_file():
        raise OctavoError(f"{folder}: is a file; choose another name")
    component, network = find_denoiser(pipeline)
    if executor_of(pipeline) is not None:
        raise OctavoError(f"pipeline: its {component} is accelerated; export the original")
    refuse_reusing(component, network, "export the original: a file holds no plan")
    device: Any = network.device
    if device.type == "meta":
        raise OctavoError(f"pipeline: its {component} is offloaded; load it again, without offloading")
    own_steps = steps_of(pipeline, steps or STEPS)
    if steps not in (None, own_steps):
        raise OctavoError(f"steps: {steps}, but the pipeline's trajectory has {own_steps}; leave it out")
    sampling = sampling_settings(pipeline.scheduler, own_steps)
    denoiser = float32_copy(network)
    if format == "openvino" and batch_size is None and any(True for _ in quantized_products(denoiser)):
        raise OctavoError(
            "batch_size: attention's products are quantized, and OpenVINO computes them wrongly for a free number of "
            "images on CPUs without VNNI; give --batch-size"
        )
    args, kwargs = first_call(pipeline, batch_size=batch_size or 2, inputs=inputs)
    call = take_apart(type(denoiser).forward.__get__(denoiser), args, kwargs)
    static = batch_size is not None
    with atomic_path(folder) as unfinished:
        unfinished.mkdir()
        path = unfinished / NETWORK[format]
        how: dict[str, Any]
        if format == "openvino":
            outputs, rows, settings = _openvino(denoiser, call, path, static)
            how = {"settings": settings}
        else:
            outputs, rows = _onnx(denoiser, call, path, static, dialect)
            how = {"dialect": dialect}
        distance = _distance(outputs, _simulated(denoiser, call))
        if not distance < FARTHEST:
            raise OctavoError(
                f"{NETWORK[format]}: is {distance:.2f} (relative L2) from the simulation; this engine and this network "
                "do not go together: try the other format, and report it"
            )
        notes = _notes(denoiser, format, dialect, static, pipeline.scheduler)
        notes += [f"the {name}, quantized too, is not in this file" for name, _ in quantized_parts(pipeline)]
        own = _is_ours(pipeline.scheduler)
        pipeline.scheduler.save_pretrained(unfinished / (OWN_SCHEDULER if own else SCHEDULER))
        description = {
            "format": format,
            "network": path.name,
            **how,
            "component": component,
            "class": type(network).__name__,
            "inputs": _ports(call.names, call.tensors, call.shapes if static else call.row_dynamic_shapes()),
            "outputs": _ports(
                output_names(len(outputs)),
                outputs,
                [(output.shape[0] if static else -1, *output.shape[1:]) for output in outputs],
            ),
            **sampling,
            **layer_counts(denoiser),
            "audited": len(rows),
            "distance_to_simulation": distance,
            "notes": notes,
            "made_by": versions(
                "octavo", "torch", "diffusers", *(("onnx",) if format == "onnx" else ("openvino",))
            ),
        }
        write_json(unfinished / DESCRIPTION, description)
    return Export(Path(folder) / NETWORK[format], distance, rows, notes, ENGINE[format])


def _openvino(
    denoiser: nn.Module, call: Call, path: Path, static: bool
) -> tuple[list[torch.Tensor], list[AuditRow], dict[str, Any]]:
    import openvino

    from octavo.runtimes.convert import FixedRows
    from octavo.runtimes.edges import save_with_f32_layers
    from octavo.runtimes.integer_graph import nodes_in_f32, to_integer_graph
    from octavo.runtimes.pieces import kernels_in_pieces
    from octavo.runtimes.square_attention import has_square_attention

    layers = audited(denoiser)
    split = layers_to_split(integer_layers(denoiser))
    try:
        model = to_integer_graph(denoiser, call, split)
    except FixedRows:
        if not static:
            raise
        model = to_integer_graph(denoiser, call, split, call.rows)
    if static:
        shapes = zip(model.inputs, call.shapes, strict=True)
        model.reshape({port: openvino.PartialShape(list(shape)) for port, shape in shapes})
    for port, name in zip(model.outputs, output_names(len(model.outputs)), strict=True):
        port.get_tensor().set_names({name})
    save_with_f32_layers(model, nodes_in_f32(model, denoiser), path)
    settings = {**SETTINGS, **({"SNIPPETS_MODE": "DISABLE"} if has_square_attention(model) else {})}
    compiled = openvino_core().compile_model(path, "CPU", settings)
    rows = audit_compiled(compiled, layers, split, kernels_in_pieces(model, denoiser))
    require_integers(rows)
    results = compiled([tensor.numpy() for tensor in call.tensors]).to_tuple()
    return [torch.tensor(result) for result in results], rows, settings


def _onnx(
    denoiser: nn.Module, call: Call, path: Path, static: bool, dialect: Dialect
) -> tuple[list[torch.Tensor], list[AuditRow]]:
    from octavo.runtimes.onnx_convert import require_onnx, save_onnx, to_onnx
    from octavo.runtimes.onnx_session import check_graph, infer, session

    require_onnx()
    save_onnx(to_onnx(denoiser, call, dialect, dynamic_rows=not static), path)
    check_graph(path)
    with tempfile.TemporaryDirectory() as temporary:
        loaded, rows = session(path, Path(temporary), audited(denoiser))
        return [torch.from_numpy(array) for array in infer(loaded, call)], rows


def _simulated(denoiser: nn.Module, call: Call) -> list[torch.Tensor]:
    with torch.inference_mode():
        return list(tensors_of(denoiser(**call.kwargs(call.tensors), return_dict=False)))


def _distance(outputs: list[torch.Tensor], simulated: list[torch.Tensor]) -> float:
    a, b = (torch.cat([tensor.flatten().double() for tensor in tensors]) for tensors in (outputs, simulated))
    return float((a - b).norm() / b.norm())


def output_names(count: int) -> list[str]:
    """`output`, `output_1`, ...

    >>> output_names(2)
    ['output', 'output_1']
    """
    return [f"output_{k}" if k else "output" for k in range(count)]


def _ports(names: Sequence[str], tensors: Sequence[torch.Tensor], shapes: Any) -> list[dict[str, Any]]:
    """Name, type and shape of each; -1 in `shapes` is the number of rows."""
    return [
        {
            "name": name,
            "type": str(tensor.dtype).removeprefix("torch."),
            "shape": ["rows" if size == -1 else size for size in shape],
        }
        for name, tensor, shape in zip(names, tensors, shapes, strict=True)
    ]


def _is_ours(scheduler: Any) -> bool:
    return type(scheduler).__module__.startswith("octavo.")


def _notes(denoiser: nn.Module, format: Format, dialect: Dialect, static: bool, scheduler: Any) -> list[str]:
    layers: list[QuantLayer] = [layer for _, layer in quantized_layers(denoiser)]
    notes = []
    if _is_ours(scheduler):
        notes.append(
            f"{type(scheduler).__name__} is Octavo's own scheduler: {OWN_SCHEDULER}/ is for who has Octavo (diffusers "
            f"loads it after `import octavo`), timesteps and the rest in {DESCRIPTION} for who has not"
        )
    if format == "onnx" and dialect == "portable" and not all(layer.input_spec.symmetric for layer in layers):
        notes.append(
            "activations are uint8 with zero points, which TensorRT does not take: for it, quantize with --symmetric"
        )
    if format == "onnx" and any(int(layer.weight_int8.min()) < -127 for layer in layers):
        notes.append("weights reach -128, which TensorRT does not take")
    if (
        format == "onnx"
        and dialect == "portable"
        and not static
        and any(True for _ in quantized_products(denoiser))
    ):
        notes.append(
            "attention's products are quantized: in OpenVINO wrong for a free number of images on CPUs without VNNI; "
            "for these give --batch-size"
        )
    may_overflow = any(may_saturate(layer, by_neighbours=True) for _, layer in integer_layers(denoiser))
    if format == "onnx" and dialect == "portable" and may_overflow:
        notes.append(
            "8-bit weights: in OpenVINO exact on CPUs with VNNI or AMX; for others --format openvino on such a CPU, or "
            "quantize with --pair-limit or --weights 7"
        )
    if format == "onnx" and dialect == "onnxruntime":
        notes.append(
            'on CPUs without VNNI set the session option session.x64quantprecision to "1": exact sums'
        )
    if format == "openvino" and may_overflow:
        notes.append(
            "8-bit weights: exact on CPUs that are, as this one, "
            + ("without VNNI" if adds_in_16_bits() else "with VNNI or AMX")
            + "; for others export there, or quantize with --pair-limit or --weights 7"
        )
    return notes
