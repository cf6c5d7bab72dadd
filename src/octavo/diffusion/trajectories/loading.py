"""Diffusers told of the schedulers that visit trajectories, so that plain `from_pretrained` loads them."""

from __future__ import annotations

import functools
from typing import Any

LIBRARY = "octavo"
"""What `model_index.json` names as their library: the package itself, whichever module they are in."""
KEPT = "octavo_keeps_trajectory"


def register_schedulers() -> None:
    """Let pipelines find the schedulers in `octavo`, and a DDIMPipeline keep one that visits a trajectory; idempotent.

    A DDIMPipeline makes its scheduler anew from its settings, as a plain DDIM: without a word the trajectory would be
    lost. Every other scheduler goes its way as before.
    """
    from diffusers import DDIMPipeline
    from diffusers.pipelines.pipeline_loading_utils import LOADABLE_CLASSES

    LOADABLE_CLASSES[LIBRARY] = {"SchedulerMixin": ["save_pretrained", "from_pretrained"]}
    if hasattr(DDIMPipeline.__init__, KEPT):
        return
    original = DDIMPipeline.__init__

    @functools.wraps(original)
    def __init__(self: Any, unet: Any, scheduler: Any) -> None:
        original(self, unet=unet, scheduler=scheduler)
        if type(scheduler).__name__ == "DDIMTrajectoryScheduler":
            self.register_modules(scheduler=scheduler)

    setattr(__init__, KEPT, True)
    DDIMPipeline.__init__ = __init__
