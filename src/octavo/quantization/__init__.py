"""What a number becomes: specs, affine maths, metrics, range search, observers, rounding, layers."""

from octavo.quantization.affine import dequantize as dequantize
from octavo.quantization.affine import fake_quantize as fake_quantize
from octavo.quantization.affine import qparams_from_range as qparams_from_range
from octavo.quantization.affine import quantize as quantize
from octavo.quantization.fake_quantizer import FakeQuantizer as FakeQuantizer
from octavo.quantization.layers import QuantConv1d as QuantConv1d
from octavo.quantization.layers import QuantConv2d as QuantConv2d
from octavo.quantization.layers import QuantLayer as QuantLayer
from octavo.quantization.layers import QuantLinear as QuantLinear
from octavo.quantization.metrics import METRICS as METRICS
from octavo.quantization.observers import HistogramObserver as HistogramObserver
from octavo.quantization.output_correction import OutputCorrection as OutputCorrection
from octavo.quantization.ranges import search_histogram as search_histogram
from octavo.quantization.ranges import search_values as search_values
from octavo.quantization.rounding import ROUNDINGS as ROUNDINGS
from octavo.quantization.rounding import round_nearest as round_nearest
from octavo.quantization.specs import QParams as QParams
from octavo.quantization.specs import QuantSpec as QuantSpec
from octavo.quantization.swap import empty_layer as empty_layer
from octavo.quantization.swap import quantize_layer as quantize_layer
from octavo.quantization.swap import quantized_layers as quantized_layers
from octavo.quantization.swap import replace as replace
from octavo.quantization.swap import walk as walk
from octavo.quantization.to_float import dequantized as dequantized
