"""Which timesteps a sampler visits: trajectories as values, spacings, costs, searches, schedulers."""

from __future__ import annotations

from octavo.diffusion.trajectories.dynamic_programming import Paths as Paths
from octavo.diffusion.trajectories.dynamic_programming import cheapest_paths as cheapest_paths
from octavo.diffusion.trajectories.dynamic_programming import path_cost as path_cost
from octavo.diffusion.trajectories.schedule import NoiseSchedule as NoiseSchedule
from octavo.diffusion.trajectories.schedule import noise_schedule as noise_schedule
from octavo.diffusion.trajectories.spacings import SPACINGS as SPACINGS
from octavo.diffusion.trajectories.spacings import evenly as evenly
from octavo.diffusion.trajectories.spacings import spaced as spaced
from octavo.diffusion.trajectories.trajectory import Trajectory as Trajectory
from octavo.diffusion.trajectories.use import steps_of as steps_of
from octavo.diffusion.trajectories.use import with_trajectory as with_trajectory
