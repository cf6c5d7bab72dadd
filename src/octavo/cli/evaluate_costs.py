"""What the two models of `octavo evaluate` cost: measured in turn, and side by side as text."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from octavo.diffusion import first_call, probe
from octavo.errors import OctavoError
from octavo.evaluation.cost import Cost, latency, static_cost
from octavo.evaluation.peak_memory import MemoryJob, peak_memory
from octavo.runtimes import executor_of

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from octavo.cli.evaluate_models import ModelsJob
    from octavo.diffusion.reuse import ReusePlan


def measured_costs(
    job: ModelsJob,
    plain: list[DiffusionPipeline],
    running: list[DiffusionPipeline],
    threads: int,
    plan: ReusePlan | None,
) -> tuple[Cost, Cost]:
    """Costs of the model, which may reuse features by `plan`, and of the reference."""
    call = first_call(plain[1], batch_size=job.batch_size, inputs=job.inputs)
    share = None
    if plan is not None:
        run = probe(plain[0], num_inference_steps=job.steps or plan.num_steps, inputs=job.inputs)
        share = plan.share_of(run.timesteps)
    rows = latency(running[0], running[1], call, plan=plan, share=share)
    inputs = {name: value for name, value in job.inputs.items() if name != "eta"}  # of --scheduler, maybe
    memory_jobs = [
        MemoryJob(name, runtime, precision_of(pipeline) or "f32", threads, job.batch_size, inputs)
        for name, runtime, pipeline in zip((job.model, job.reference), job.runtimes, running, strict=True)
    ]
    if plan is not None:
        memory_jobs[0] = replace(
            memory_jobs[0],
            reuse=str(job.reuse),
            steps=job.steps or plan.num_steps,
            scheduler=job.scheduler,
            trajectory=None if job.trajectory is None else str(job.trajectory),
        )
    model, reference = (
        replace(static_cost(pipeline, job.inputs, of, share), latency=row)
        for pipeline, row, of in zip(plain, rows, (plan, None), strict=True)
    )
    try:
        of_model, of_reference = peak_memory(memory_jobs)
    except OctavoError:  # not on this system, or not with these inputs; the rest still stands
        return model, reference
    return _with_memory(model, of_model), _with_memory(reference, of_reference)


def _with_memory(cost: Cost, memory: tuple[int, int]) -> Cost:
    return replace(cost, peak_memory_bytes=memory[0], libraries_memory_bytes=memory[1])


def precision_of(pipeline: DiffusionPipeline) -> str | None:
    executor = executor_of(pipeline)
    return next((graph.precision for graph in executor.graphs.values()), None) if executor else None


def cost_table(model: Cost, reference: Cost, batch_size: int, reuses: bool = False) -> str:
    """Two costs side by side, as aligned text for a terminal; `reuses`: the model's are means over a reuse plan."""
    mean = "these and the time: the model's mean over its run" if reuses else ""

    def line(name: str, of_model: str, of_reference: str, note: str = "") -> str:
        return f"{name:<28}{of_reference:>16}{of_model:>16}  {note}".rstrip()

    lines = [
        line("", of_model="model", of_reference="reference"),
        line("size of the denoiser, MB", f"{model.bytes / 1e6:.2f}", f"{reference.bytes / 1e6:.2f}"),
        line("MACs of one evaluation, G", f"{model.macs / 1e9:.4g}", f"{reference.macs / 1e9:.4g}", mean),
        line("BOPs of one evaluation, G", f"{model.bops / 1e9:.4g}", f"{reference.bops / 1e9:.4g}"),
    ]
    if model.latency and reference.latency:
        spread = "{ratio:.2f}x ({ratio_low:.2f}-{ratio_high:.2f})".format_map(model.latency)
        lines.append(
            line(
                f"one evaluation, batch {batch_size}, ms",
                f"{model.latency['ms']:.2f}",
                f"{reference.latency['ms']:.2f}",
                spread,
            )
        )
    if model.peak_memory_bytes and reference.peak_memory_bytes:
        alone = [(cost.libraries_memory_bytes or 0) / 1e6 for cost in (reference, model)]
        note = f"a fresh process each; libraries alone {alone[0]:.0f} and {alone[1]:.0f}"
        peaks = [f"{(cost.peak_memory_bytes or 0) / 1e6:.0f}" for cost in (model, reference)]
        lines.append(line("peak memory, MB", peaks[0], peaks[1], note))
    return "\n".join(lines)
