"""The one place where diffusion and quantization meet: run, observe, choose ranges, quantize."""

from __future__ import annotations

from octavo.calibration.collect import PairStore as PairStore
from octavo.calibration.collect import collect_pairs as collect_pairs
from octavo.calibration.observations import observe as observe
from octavo.calibration.operations import OUTPUT_CORRECTION as OUTPUT_CORRECTION
from octavo.calibration.operations import attach_operations as attach_operations
from octavo.calibration.operations import attach_timestep_groups as attach_timestep_groups
from octavo.calibration.operations import output_correction_of as output_correction_of
from octavo.calibration.quantize import Calibrated as Calibrated
from octavo.calibration.quantize import calibrate as calibrate
from octavo.calibration.quantize import quantize_observed as quantize_observed
from octavo.calibration.quantized_denoiser import quantize_denoiser as quantize_denoiser
from octavo.calibration.quantized_denoiser import round_weights as round_weights
from octavo.calibration.recipe import PTQ4DM as PTQ4DM
from octavo.calibration.recipes import RECIPES as RECIPES
from octavo.calibration.recipes import named_recipe as named_recipe
from octavo.calibration.rules import LayerRule as LayerRule
from octavo.calibration.rules import layer_rules as layer_rules
from octavo.calibration.rules import rules_of as rules_of
from octavo.calibration.tracing import trace as trace
