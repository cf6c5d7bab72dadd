from __future__ import annotations

from typing import Any

import torch

from octavo.diffusion import first_call
from octavo.evaluation.peers.calibration import calibration_calls
from octavo.evaluation.peers.task import Task


def test_peers_calibrate_on_other_calls_than_the_judged_one(pipeline: Any) -> None:
    _, judged = first_call(pipeline, batch_size=2)
    calls = calibration_calls(pipeline, images=3, batch_size=2, steps=3)
    assert len(calls) == 2 * 3
    for call in calls:
        assert call["sample"].shape == judged["sample"].shape and not torch.equal(
            call["sample"], judged["sample"]
        )
        assert Task(pipeline.unet, call, ()).call.names == Task(pipeline.unet, judged, ()).call.names
    assert len({int(call["timestep"]) for call in calls}) == 3
    assert not torch.equal(calls[0]["sample"], calls[3]["sample"])
    assert not pipeline.unet._forward_pre_hooks
