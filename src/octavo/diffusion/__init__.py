"""Where and when to look at a diffusion model: timesteps, seeded runs, capture of network inputs."""

from __future__ import annotations

from octavo.diffusion.call_inputs import inputs_of_images as inputs_of_images
from octavo.diffusion.capture import Probe as Probe
from octavo.diffusion.capture import capture_pairs as capture_pairs
from octavo.diffusion.capture import first_call as first_call
from octavo.diffusion.capture import probe as probe
from octavo.diffusion.capture import sample_shape as sample_shape
from octavo.diffusion.denoiser import call_arguments as call_arguments
from octavo.diffusion.denoiser import check_rows_alone as check_rows_alone
from octavo.diffusion.denoiser import find_denoiser as find_denoiser
from octavo.diffusion.denoiser import first_output as first_output
from octavo.diffusion.exchange import with_denoiser as with_denoiser
from octavo.diffusion.generators import generators as generators
from octavo.diffusion.pairs import CalibrationPair as CalibrationPair
from octavo.diffusion.pairs import collate as collate
from octavo.diffusion.pairs import fits_with as fits_with
from octavo.diffusion.pairs import flatten as flatten
from octavo.diffusion.pairs import unflatten as unflatten
from octavo.diffusion.part_calls import first_part_call as first_part_call
from octavo.diffusion.part_calls import part_calls as part_calls
from octavo.diffusion.run import call_pipeline as call_pipeline
from octavo.diffusion.timesteps import DISTRIBUTIONS as DISTRIBUTIONS
from octavo.diffusion.timesteps import NDTC as NDTC
from octavo.diffusion.timesteps import AsPublished as AsPublished
from octavo.diffusion.timesteps import Distribution as Distribution
from octavo.diffusion.timesteps import Draws as Draws
from octavo.diffusion.timesteps import Single as Single
from octavo.diffusion.timesteps import SkewNormal as SkewNormal
from octavo.diffusion.timesteps import Uniform as Uniform
from octavo.diffusion.timesteps import distribution as distribution
from octavo.diffusion.timesteps import draw as draw
from octavo.diffusion.timesteps import draw_labelled as draw_labelled
