"""Put a runtime under a pipeline's denoiser, and ask what really ran."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import nn

from octavo.calibration.components import part_prefix, quantized_parts
from octavo.checkpoint.adapters import EXECUTOR
from octavo.diffusion import check_rows_alone, find_denoiser, first_call, with_denoiser
from octavo.diffusion.reuse import ReusePlan
from octavo.errors import OctavoError, check_choice, check_whole
from octavo.quantization.attention_calls import product_name
from octavo.runtimes.audit import AuditRow, audited
from octavo.runtimes.cuda.executor import TorchCudaExecutor
from octavo.runtimes.edits import refuse_edits
from octavo.runtimes.network import evaluated_by, is_by_its_class
from octavo.runtimes.onnx_executor import ONNXExecutor
from octavo.runtimes.openvino import OnFallback, OpenVINOExecutor, Precision
from octavo.runtimes.parts import with_executed_parts
from octavo.runtimes.reuse.execute import ReusingExecutor, check_plan, refuse_reusing
from octavo.runtimes.time_table import tells_fractions, whole_timesteps

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

RUNTIMES = ("openvino", "onnx", "torch-cuda")
HAS_NO_REUSE = "the runtime {} does not reuse features"
Executor = OpenVINOExecutor | ONNXExecutor | TorchCudaExecutor


def accelerate(
    pipeline: DiffusionPipeline,
    runtime: str = "openvino",
    *,
    precision: Precision = "auto",
    threads: int | None = None,
    batch_size: int = 1,
    inputs: Mapping[str, Any] | None = None,
    on_fallback: OnFallback = "refuse",
    reuse: ReusePlan | None = None,
) -> DiffusionPipeline:
    """The same pipeline with its denoiser executed by `runtime`; `pipeline` itself stays as it was.

    So is what else of it is quantized (the VAE's decoder); what of it is not runs in torch, as before.

    It stays a drop-in: a pipeline of the same class, whose denoiser is of the same class and answers `.config`,
    `.dtype`, `.device` and `save_pretrained` as before. A full-precision pipeline may be accelerated too, and one
    in bfloat16 or float16: its weights are computed with as float32, its outputs are of its own dtype.

    The engine keeps the network as it is now. Later edits of the new pipeline's denoiser (its dtype, its layers,
    its hooks) are not executed; those by diffusers' own methods (FreeU, caches, adapters and their scales, attention
    processors) raise `OctavoError`, and so does the next new input shape once weights, which are shared with
    `pipeline`, were written to in place.

    runtime      "openvino"; "onnx": ONNX Runtime, of the extra `octavo[onnx]`; "torch-cuda": torch on an NVIDIA GPU,
                 with Triton kernels (docs/cuda.md). The pipeline may then be on the CPU or the GPU.
    precision    of what stays float: "f32", "bf16", or "auto": bf16 where it is measured to be at least 5 % faster
                 for `batch_size` images, remembered in Octavo's cache; the same for every later shape. A CPU
                 without bf16 computes in f32, and a warning says so. ONNX Runtime has f32 alone.
    threads      CPU threads; None leaves it to the engine (all cores, or those of a `limited_threads` block). A GPU has
                 none to limit.
    batch_size   the graph for this many images is compiled and audited now; others at their first call. A batch runs
                 in as many equal parts as divide it and the threads, side by side: even sizes are faster. (ONNX
                 Runtime has one graph for all numbers of images.)
    inputs       what the pipeline's call needs besides (a prompt, class labels), where it needs any.
    on_fallback  "refuse" raises if a layer with integer activations would run in float; "warn" logs it and goes on.

    reuse        a plan by which deep features are kept between steps (`octavo reuse`); two graphs are compiled then.

    Raises `OctavoError` for an unknown argument, for a float fallback, if the engine is missing, for a pipeline that is
    accelerated or reuses features already, or for a plan of another model.
    """
    check_choice("runtime", runtime, RUNTIMES)
    check_choice("precision", precision, ("auto", "f32", "bf16"))
    check_choice("on_fallback", on_fallback, ("refuse", "warn"))
    check_whole("batch_size", batch_size, 1)
    if threads is not None:
        check_whole("threads", threads, 1)
    if runtime == "onnx" and precision == "bf16":
        raise OctavoError("precision: ONNX Runtime computes what stays float in f32; leave bf16 out")
    if runtime != "openvino" and reuse is not None:
        raise OctavoError(f"reuse: {HAS_NO_REUSE.format(runtime)}; leave out one of the two")
    check_rows_alone(pipeline)
    component, denoiser = find_denoiser(pipeline)
    if executor_of(pipeline) is not None:
        raise OctavoError(f"pipeline: its {component} is accelerated already; accelerate the original")
    refuse_reusing(
        component, denoiser, "accelerate the original, and give it the plan: accelerate(reuse=plan)"
    )
    device: Any = denoiser.device
    if device.type != "cpu" and not (runtime == "torch-cuda" and device.type == "cuda"):
        mend = (
            "load it again, without offloading"
            if device.type == "meta"
            else 'move it there: pipeline.to("cpu")'
        )
        raise OctavoError(f"pipeline: its {component} is on {device}; {runtime} runs it on the CPU: {mend}")
    called_on = pipeline._execution_device
    if called_on.type != "cpu" and runtime != "torch-cuda":
        raise OctavoError(
            f"pipeline: offloads from {called_on}, and {runtime} runs its {component} on the CPU: call "
            "pipeline.remove_all_hooks() first"
        )
    args, kwargs = first_call(pipeline, batch_size=batch_size, inputs=inputs)
    timesteps = whole_timesteps(kwargs, int(getattr(pipeline.scheduler.config, "num_train_timesteps", 0)))
    settings: dict[str, Any] = {"threads": threads, "on_fallback": on_fallback}
    of_openvino = {
        **settings,
        "precision": precision,
        "timesteps": 0 if tells_fractions(pipeline.scheduler) else timesteps,
    }
    executor: Executor
    if runtime == "onnx":
        executor = ONNXExecutor(denoiser, **settings)
    elif runtime == "torch-cuda":
        executor = TorchCudaExecutor(denoiser, precision, **settings)
    elif reuse is None:
        executor = OpenVINOExecutor(denoiser, **of_openvino)
    else:
        check_plan(denoiser, reuse)
        executor = ReusingExecutor(denoiser, **of_openvino, plan=reuse)
    executor.prepare(*args, **kwargs)
    fast = with_denoiser(pipeline, component, executed_by(executor, denoiser))

    def execute(part: nn.Module, call: dict[str, Any]) -> nn.Module:
        of_part: Executor
        if runtime == "onnx":
            of_part = ONNXExecutor(part, **settings)
        elif runtime == "torch-cuda":
            of_part = TorchCudaExecutor(part, precision, **settings)
        else:
            of_part = OpenVINOExecutor(part, **{**of_openvino, "timesteps": 0})
        of_part.prepare(**call)
        return executed_by(of_part, part)

    fast = with_executed_parts(fast, execute, batch_size=batch_size, inputs=inputs)
    if isinstance(executor, ReusingExecutor):
        executor.reuser.bind(fast)
    return fast


def executed_by(executor: Executor, denoiser: nn.Module) -> nn.Module:
    """A copy of `denoiser` (same class and configuration, shared tensors) whose `forward` is the executor.

    The copy has no hooks of its own: those of the original are part of the graph. Casting it or setting its
    attributes changes neither the original nor what the executor computes.
    """
    other = evaluated_by(
        denoiser, executor.__call__
    )  # a method: what wraps the forward copies an object's attributes
    other.__dict__[EXECUTOR] = executor
    refuse_edits(other)
    return other


def executor_of(pipeline: DiffusionPipeline) -> Executor | None:
    """The executor under the pipeline's denoiser; None where torch evaluates it."""
    return _executor_in(find_denoiser(pipeline)[1])


def executors_of(pipeline: DiffusionPipeline) -> dict[str, Executor]:
    """All executors of the pipeline, by what their layers' names begin with: "" (the denoiser), "vae.decoder."."""
    found = {prefix: _executor_in(network) for prefix, network in _networks(pipeline)}
    return {prefix: executor for prefix, executor in found.items() if executor is not None}


def _executor_in(network: nn.Module) -> Executor | None:
    """The network's executor. Raises `OctavoError` where something has put its class's own `forward` back."""
    executor = network.__dict__.get(EXECUTOR)
    if not isinstance(executor, Executor):
        return None
    if is_by_its_class(network):
        raise OctavoError(
            f"{type(network).__name__}: computes by its own forward again, and no longer by {executor.runtime}; "
            "accelerate the original again"
        )
    return executor


def _networks(pipeline: DiffusionPipeline) -> Iterator[tuple[str, nn.Module]]:
    yield "", find_denoiser(pipeline)[1]
    for component, part in quantized_parts(pipeline):
        yield f"{component}.{part_prefix(component)}", part


def audit(pipeline: DiffusionPipeline) -> list[AuditRow]:
    """Every layer, and product of attention, that is to run in integers, with the kernel and precision that it ran in.

    Layers whose activations stay float are left out: nobody asked for integers there.
    Names are those within the denoiser; of another component's they begin with its own ("vae.decoder.conv_in").
    For a pipeline that is not accelerated, that is torch's float simulation, and no row is `ok`. A layer that ran in
    different precisions in several graphs (one for each input shape) is reported by its worst.
    """
    rows: list[AuditRow] = []
    for prefix, network in _networks(pipeline):
        executor = _executor_in(network)
        own = (
            [AuditRow(product_name(name), "torch simulation", "f32") for name in audited(network)]
            if executor is None
            else _worst(row for graph in executor.graphs.copy().values() for row in graph.audit)
        )
        rows += [replace(row, layer=f"{prefix}{row.layer}") for row in own]
    return rows


def _worst(rows: Iterable[AuditRow]) -> list[AuditRow]:
    worst: dict[str, AuditRow] = {}
    for row in rows:
        if row.layer not in worst or not row.ok:
            worst[row.layer] = row
    return list(worst.values())
