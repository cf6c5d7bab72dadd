"""Optimal variances of the reverse process, from one number a timestep measured on the network (Analytic-DPM)."""

from __future__ import annotations

from octavo.diffusion.analytic.estimate import cost_of_gamma as cost_of_gamma
from octavo.diffusion.analytic.estimate import estimate_gamma as estimate_gamma
from octavo.diffusion.analytic.gamma import Gamma as Gamma
from octavo.diffusion.analytic.schedule import analytic_trajectory as analytic_trajectory
from octavo.diffusion.analytic.scheduler import AnalyticScheduler as AnalyticScheduler
from octavo.diffusion.analytic.use import check_no_gamma as check_no_gamma
from octavo.diffusion.analytic.use import with_analytic_variance as with_analytic_variance
from octavo.diffusion.analytic.variance import optimal_variances as optimal_variances
from octavo.diffusion.analytic.variance import trajectory_variances as trajectory_variances
