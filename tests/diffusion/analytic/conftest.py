"""The exact denoiser of normal data, and schedulers whose every answer about it is known."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from diffusers import DDIMScheduler, DDPMPipeline
from numpy.typing import NDArray

from tests.diffusion.trajectories.conftest import NormalDenoiser

DEVIATION = 0.5
