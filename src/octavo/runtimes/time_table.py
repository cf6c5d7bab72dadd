"""What a graph computes from the timestep alone, read from a table: one Gather in place of the embedding's layers.

The timesteps that a network is told are few: 0, 1, ..., T - 1. What depends on nothing else (the sinusoids, the MLP,
and in networks without class labels or other conditions in the embedding the projection of every block) takes as many
values, and is computed once, in f32, when the graph is converted:

    table[t, ...] = f(t)    float32 [T, ...],      f(timestep) -> Gather(table, timestep index)

The table belongs to the graph and not to the checkpoint: it can be made of the layers that the checkpoint holds, it
takes T numbers for each output where the layers take their K weights (T = 1000, K = 256 to 1280), and a timestep that
is not in it, a fractional one say, needs the layers. Found in the graph by following the data, not by names. Layers
with integer activations are left alone: they were asked for, and the audit wants to see them run. Those whose weights
alone are integers are read from the table as float ones are.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from octavo.runtimes.calls import TIMESTEP, Call

if TYPE_CHECKING:
    import openvino

INDEX = "timestep_index"
"""The graph's last input, int32 [rows]: an integer stays exact where what is float becomes bf16."""
COUNTS = (10, 25)
"""Steps by which a scheduler is asked: evenly spaced ones between 0 and 999 are all whole with 10, not with 25."""
ROWS = 50
"""Timesteps that are evaluated at once."""
SOME_ROWS = 47
"""A number of rows that no other size is likely to have."""
MOST_BYTES = 512 * 2**20
"""A larger table is not made; the graph then computes."""
LAYERS = {"MatMul", "Convolution", "GroupConvolution"}
QUANTIZER = "FakeQuantize"


def whole_timesteps(first_call: Mapping[str, Any], timesteps: int) -> int:
    """How many whole timesteps a network may be told: `timesteps`, or 0 where its times are from 0 to 1 (FLUX).

    `first_call`: its keyword arguments at the noisy end, where such a time is 1: whole, and the only one, so that its
    table would be read at one step, and a second graph compiled for all others.

    >>> whole_timesteps({"timestep": torch.tensor(999)}, 1000), whole_timesteps({"timestep": torch.ones(2)}, 1000)
    (1000, 0)
    """
    told = first_call.get(TIMESTEP)
    return 0 if told is not None and float(torch.as_tensor(told).max()) <= 1 else timesteps


def tells_fractions(scheduler: Any, counts: Iterable[int] = COUNTS) -> bool:
    """Whether timesteps between whole ones are among those of a run: then no table, which would serve the others alone.

    Two graphs would be compiled, and the second within the run. A scheduler that needs more than a count of steps to
    tell (dynamic shifting) is taken to have none.

    >>> from diffusers import DDIMScheduler
    >>> tells_fractions(DDIMScheduler())
    False
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # diffusers' own, which the run gives anyway
        return any(_fractions(copy.deepcopy(scheduler), count) for count in counts)


def _fractions(scheduler: Any, count: int) -> bool:
    try:
        scheduler.set_timesteps(count)
        timesteps = torch.as_tensor(scheduler.timesteps, dtype=torch.float64)
    except Exception:  # whatever it asks for besides; or it is bound to another count
        return False
    return bool((timesteps != timesteps.round()).any())


def with_index(call: Call, timesteps: int) -> Call:
    """The call with one more tensor, INDEX, if it names whole timesteps below `timesteps`; else the call itself.

    >>> call = Call({}, (torch.zeros(2, 1), torch.tensor([7.0, 0.0])), ("sample", "timestep"), 2)
    >>> with_index(call, 1000).tensors[-1], with_index(call, 5) is call
    (tensor([7, 0], dtype=torch.int32), True)
    """
    if TIMESTEP not in call.names:
        return call
    timestep = call.tensors[call.names.index(TIMESTEP)]
    index = timestep.to(torch.int32)
    if bool((index != timestep).any()) or bool(((index < 0) | (index >= timesteps)).any()):
        return call
    return replace(call, tensors=(*call.tensors, index), names=(*call.names, INDEX))


def without_index(call: Call) -> Call:
    """The call as it was before `with_index`."""
    if INDEX not in call.names:
        return call
    return replace(call, tensors=call.tensors[:-1], names=call.names[:-1])


def tabulate(core: openvino.Core, model: openvino.Model, timesteps: int) -> list[str]:
    """Let `model` read what depends on the timestep alone from tables, and give it the input INDEX. Mutates `model`.

    `model`: a converted graph with a dynamic number of rows. Returns the names of the nodes that a table took the place
    of; where there are none, or the tables were too large, the model stays as it was, without INDEX.
    """
    import openvino
    from openvino import opset13 as ops

    index = ops.parameter(openvino.PartialShape([-1]), openvino.Type.i32, INDEX)
    index.output(0).get_tensor().set_names({INDEX})
    replaced: list[str] = []
    twin = model.clone()
    outputs = [node.output(k) for node, k in _frontier(twin)]
    shapes = [output.get_partial_shape() for output in outputs]
    if all(shape.rank.is_static and len(shape) and shape[0].is_dynamic for shape in shapes):
        tables = _evaluated(core, twin, outputs, timesteps) if outputs else []
        for (node, k), table in zip(list(_frontier(model)) if tables else [], tables, strict=True):
            gather = ops.gather(ops.constant(table), index, ops.constant(0, openvino.Type.i64))
            gather.set_friendly_name(f"{node.get_friendly_name()}/table")
            for reader in node.output(k).get_target_inputs():
                reader.replace_source_output(gather.output(0))
            replaced.append(node.get_friendly_name())
    if replaced:
        model.add_parameters([index])
        model.validate_nodes_and_infer_types()
    return replaced


def reads_index(model: openvino.Model) -> bool:
    """Whether `tabulate` gave the model a table."""
    return any(INDEX in port.get_names() for port in model.inputs)


def has_tables(model: openvino.Model) -> bool:
    """Whether there is anything in `model`, which has none yet, that `tabulate` would make a table of."""
    return any(True for _ in _frontier(model))


@dataclass(frozen=True)
class _Source:
    """What a node was computed from. `has_layer`: a multiplication of a layer lies between the timestep and it."""

    timestep: bool = False
    other: bool = False
    has_layer: bool = False
    is_quantized: bool = False

    @property
    def fits(self) -> bool:
        """Whether the node is a function of the timestep alone, in float."""
        return self.timestep and not self.other and not self.is_quantized


def timestep_nodes(model: openvino.Model) -> list[str]:
    """Names of the nodes that compute, in float, from the timestep alone: its sinusoids, the group that it is in.

    They are wanted in f32: bf16 holds 8 bits of a timestep, in which 990 is 992, and 999 is 1000. Mutates `model`: the
    engine turns an Unsqueeze into a Reshape by itself, which loses its mark; here it is one from the start.
    """
    from openvino import opset13 as ops

    for node in _from_timestep(model):
        if node.get_type_name() == "Unsqueeze" and _is_column(node):
            reshape = ops.reshape(node.input_value(0), ops.constant([-1, 1], np.int64), special_zero=False)
            name = node.get_friendly_name()
            node.set_friendly_name(f"{name}/replaced")
            reshape.set_friendly_name(name)
            for reader in node.output(0).get_target_inputs():
                reader.replace_source_output(reshape.output(0))
    model.validate_nodes_and_infer_types()
    return [node.get_friendly_name() for node in _from_timestep(model)]


def _is_column(node: Any) -> bool:
    """[rows] => [rows, 1]."""
    shape = node.output(0).get_partial_shape()
    return shape.rank.is_static and len(shape) == 2 and shape[1].is_static and shape[1].get_length() == 1


def _from_timestep(model: openvino.Model) -> list[Any]:
    sources = _sources(model)
    kinds = {"Parameter", "Constant", "Result"}
    return [
        node
        for node in model.get_ordered_ops()
        if node.get_type_name() not in kinds and sources[node.get_friendly_name()].fits
    ]


def _frontier(model: openvino.Model) -> Iterator[tuple[Any, int]]:
    """(node, index of its output) of what is computed by layers from the timestep alone and read by anything else.

    Of each row one value for itself: what repeats rows (an image's frames, each a row of a video's network) is no
    part of a table.
    """
    sources = _sources(model, _of_rows(model))
    for node in model.get_ordered_ops():
        source = sources[node.get_friendly_name()]
        if not (source.fits and source.has_layer):
            continue
        for k, output in enumerate(node.outputs()):
            readers = [port.get_node() for port in output.get_target_inputs()]
            if any(
                not sources[reader.get_friendly_name()].fits
                for reader in readers
                if reader.get_type_name() != "ShapeOf"
            ):
                yield node, k


def _of_rows(model: openvino.Model) -> set[str]:
    """Names of the nodes whose outputs have as many rows as the inputs, or none at all."""
    twin = model.clone()
    twin.reshape({port: _with_rows(port.get_partial_shape(), SOME_ROWS) for port in twin.inputs})
    return {
        node.get_friendly_name()
        for node in twin.get_ordered_ops()
        if all(_rows(output.get_partial_shape()) in (None, SOME_ROWS) for output in node.outputs())
    }


def _rows(shape: Any) -> int | None:
    if shape.rank.is_dynamic or len(shape) == 0 or shape[0].is_dynamic:
        return None
    rows: int = shape[0].get_length()
    return rows


def _sources(model: openvino.Model, of_rows: set[str] | None = None) -> dict[str, _Source]:
    """Node -> what it was computed from; `of_rows`: all others count as computed from something else too."""
    sources: dict[str, _Source] = {}
    for node in model.get_ordered_ops():
        name = node.get_friendly_name()
        sources[name] = _source_of(node, sources)
        if of_rows is not None and name not in of_rows and sources[name].timestep:
            sources[name] = replace(sources[name], other=True)
    return sources


def _source_of(node: Any, sources: dict[str, _Source]) -> _Source:
    kind = node.get_type_name()
    if kind == "Parameter":
        is_timestep = TIMESTEP in node.output(0).get_names()
        return _Source(timestep=is_timestep, other=not is_timestep)
    if kind == "ShapeOf":  # how many rows there are, not what is in them
        return _Source()
    inputs = [sources[port.get_source_output().get_node().get_friendly_name()] for port in node.inputs()]
    timestep = any(source.timestep for source in inputs)
    return _Source(
        timestep,
        any(source.other for source in inputs),
        any(source.has_layer for source in inputs) or (timestep and kind in LAYERS),
        any(source.is_quantized for source in inputs) or (timestep and kind == QUANTIZER),
    )


def _evaluated(
    core: openvino.Core, twin: openvino.Model, outputs: list[Any], timesteps: int
) -> list[NDArray[Any]]:
    """One array [timesteps, ...] for each of `outputs`; none at all if they would take more than `MOST_BYTES`."""
    import openvino

    rows = min(ROWS, timesteps)
    part = openvino.Model(outputs, twin.get_parameters())
    part.reshape({port: _with_rows(port.get_partial_shape(), rows) for port in part.inputs})
    sizes = [int(np.prod(list(port.get_partial_shape().to_shape())[1:])) for port in part.outputs]
    if 4 * timesteps * sum(sizes) > MOST_BYTES:
        return []
    compiled = core.compile_model(part, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    inputs = [
        np.zeros(list(port.get_partial_shape().to_shape()), port.get_element_type().to_dtype())
        for port in part.inputs
    ]
    at = next(i for i, port in enumerate(part.inputs) if TIMESTEP in port.get_names())
    tables = [
        np.empty((timesteps, *port.get_partial_shape().to_shape()[1:]), np.float32) for port in part.outputs
    ]
    for first in range(0, timesteps, rows):
        last = min(first + rows, timesteps)
        inputs[at] = np.minimum(np.arange(first, first + rows), timesteps - 1).astype(np.float32)
        for table, values in zip(tables, compiled(inputs).to_tuple(), strict=True):
            table[first:last] = values[: last - first]
    return tables


def _with_rows(shape: Any, rows: int) -> Any:
    shape[0] = rows if shape[0].is_dynamic else shape[0]
    return shape
