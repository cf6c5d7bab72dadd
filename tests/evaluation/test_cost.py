from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import octavo
from octavo.diffusion import find_denoiser, first_call
from octavo.errors import OctavoError
from octavo.evaluation.comparison import Comparison
from octavo.evaluation.cost import ELSEWHERE, Cost, latency, layer_costs, outer_costs, static_cost
from octavo.evaluation.intervals import Estimate
from octavo.evaluation.peak_memory import MemoryJob, peak_memory
from octavo.evaluation.speed import Timing
from octavo.evaluation.verdict import verdict
from octavo.quantization import quantized_layers


def macs_by_torch(pipeline, inputs=None) -> int:  # type: ignore[no-untyped-def]
    """By torch's own counter, which needs attention as plain products to see it."""
    _, denoiser = find_denoiser(pipeline)
    args, kwargs = first_call(pipeline, inputs=inputs)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        denoiser(*args, **kwargs)
    return counter.get_total_flops() // 2


def test_macs_are_those_that_torch_counts(pipeline, quantized) -> None:  # type: ignore[no-untyped-def]
    expected = macs_by_torch(pipeline)
    for counted in (pipeline, quantized):
        assert sum(row.macs for row in layer_costs(counted)) == expected
    assert all(not module._forward_hooks for module in pipeline.unet.modules())


def test_guidance_in_one_batch_counts_twice(dit) -> None:  # type: ignore[no-untyped-def]
    guided = sum(row.macs for row in layer_costs(dit, {"class_labels": [1], "guidance_scale": 4.0}))
    alone = sum(row.macs for row in layer_costs(dit, {"class_labels": [1], "guidance_scale": 1.0}))
    assert guided == 2 * alone == macs_by_torch(dit, {"class_labels": [1], "guidance_scale": 4.0})


def test_one_layer_by_hand(pipeline) -> None:  # type: ignore[no-untyped-def]
    by_name = {row.layer: row for row in layer_costs(pipeline)}
    assert by_name["conv_in"].macs == 8 * 8 * 32 * 3 * 3 * 3
    assert by_name["conv_in"].bops == 32 * 32 * by_name["conv_in"].macs
    heads, tokens, width = 8, 4 * 4, 64 // 8
    attentions = 1 + 1  # down, mid
    assert by_name[ELSEWHERE].macs == attentions * 2 * heads * tokens * tokens * width


def test_bops_weigh_by_the_bits(pipeline) -> None:  # type: ignore[no-untyped-def]
    recipe = octavo.PTQ4DM(weights=4, activations=6, samples=2, steps=2, metric="minmax")
    low = octavo.quantize(pipeline, recipe, progress=False)
    names = {name for name, _ in quantized_layers(low.unet)}
    expected = sum(row.macs * (4 * 6 if row.layer in names else 32 * 32) for row in layer_costs(pipeline))
    cost, before = static_cost(low), static_cost(pipeline)
    assert cost.bops == expected and cost.macs == before.macs and before.bops == 1024 * before.macs
    assert before.bytes == 4 * sum(parameter.numel() for parameter in pipeline.unet.parameters())
    assert cost.bytes < 0.35 * before.bytes
    assert json.loads(json.dumps(cost.as_json()))["bops"] == expected


def test_latency_is_of_both_in_turn(pipeline, quantized) -> None:  # type: ignore[no-untyped-def]
    fast = octavo.accelerate(quantized, precision="f32", batch_size=2)
    ours, theirs = latency(fast, pipeline, first_call(pipeline, batch_size=2), rounds=3)
    assert ours["engine"] == "model" and theirs["engine"] == "reference"
    assert theirs["ratio"] == 1.0 and float(ours["ms"]) > 0


PLAN = octavo.ReusePlan((801.0, 601.0, 401.0, 201.0, 1.0), (1, 1, 0, 1, 0), depth=1)


def test_a_reuse_plan_costs_the_mean_of_its_steps(pipeline, quantized) -> None:  # type: ignore[no-untyped-def]
    _, kwargs = first_call(pipeline)
    reused = octavo.with_reuse(pipeline, PLAN).unet
    steps = [{**kwargs, "timestep": torch.tensor(step)} for step in PLAN.timesteps]
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        for step in steps:
            reused(**step)
    assert reused.forward.evaluations == {"whole": 3, "outer": 2}
    mean = counter.get_total_flops() / 2 / PLAN.num_steps
    for counted in (pipeline, quantized):
        assert static_cost(counted, plan=PLAN).macs == round(mean)
    whole, outer = static_cost(quantized), outer_costs(quantized, PLAN)
    names = {row.layer for row in outer}
    assert "conv_in" in names and not any(name.startswith("mid_block") for name in names)
    assert static_cost(quantized, plan=PLAN).bops == round(
        0.6 * whole.bops + 0.4 * sum(row.bops for row in outer)
    )


def test_latency_with_reuse_is_the_mean_of_the_plans_steps(  # type: ignore[no-untyped-def]
    pipeline, quantized, monkeypatch: pytest.MonkeyPatch
) -> None:
    reused = octavo.with_reuse(quantized, PLAN)
    latency(reused, pipeline, first_call(pipeline), rounds=3, plan=PLAN)
    assert reused.unet.forward.evaluations == {"whole": 4, "outer": 4}  # three rounds and one to warm up

    def by_hand(engines, **_):  # type: ignore[no-untyped-def]
        return {name: Timing([seconds]) for name, seconds in zip(engines, (0.4, 0.2, 0.1), strict=True)}

    monkeypatch.setattr("octavo.evaluation.cost.take_turns", by_hand)
    ours, theirs = latency(reused, pipeline, first_call(pipeline), plan=PLAN)
    assert (ours["ms"], theirs["ms"], ours["ratio"]) == (160.0, 400.0, 2.5)
    ours, _ = latency(reused, pipeline, first_call(pipeline), plan=PLAN, share=0.25)  # of a run's evaluations
    assert ours["ms"] == 125.0


def test_memory_is_of_fresh_processes(saved: Path) -> None:
    ballast = bytearray(900_000_000)  # in this process, so it must not be seen in those
    ballast[::4096] = b"x" * len(ballast[::4096])
    (found,) = peak_memory([MemoryJob(str(saved))])
    peak, libraries = found
    assert 50e6 < libraries < peak < 800e6


def test_a_memory_job_that_fails_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("octavo.evaluation.peak_memory.sys.executable", "/bin/false")
    with pytest.raises(OctavoError, match="tiny: its memory could not be measured: exit code 1"):
        peak_memory([MemoryJob("tiny")])


def comparison(p_same: float) -> Comparison:
    figure = Estimate(0.5, 0.4, 0.6, "by hand")
    psnr = Estimate(40.0, 39.0, 41.0, "by hand")
    return Comparison("digits", 100, True, figure, figure, figure, figure, psnr=psnr, p_same=p_same)


def test_the_verdict_says_what_was_found() -> None:
    row = {"ratio": 2.5, "ratio_low": 2.4, "ratio_high": 2.6}
    costs = Cost(10, 640, 100, latency=row), Cost(10, 10240, 400)
    said = verdict(comparison(0.3), *costs)
    for part in ("4.00x smaller", "16.0x fewer bit operations", "2.50x faster", "40.00 (39.00 to 41.00) dB"):
        assert part in said
    assert "no difference found (p = 0.3" in said and "\n" not in said
    assert "they differ (p = 0.01" in verdict(comparison(0.01))
    slow = Cost(10, 640, 100, latency={"ratio": 0.5, "ratio_low": 0.4, "ratio_high": 0.8})
    assert "2.00x slower (quartiles 1.25 to 2.50)" in verdict(comparison(0.3), slow, costs[1])
