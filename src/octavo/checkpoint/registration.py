"""Registration with diffusers: after `import octavo`, plain `from_pretrained` loads quantized models.

Diffusers has no entry points; a third-party method is added to its two tables by name, once, on import.
"""

from __future__ import annotations


def register() -> None:
    """Add Octavo's config and quantizer to diffusers' tables; idempotent."""
    from diffusers.quantizers import auto

    from octavo.checkpoint.config import OctavoConfig, QuantMethod
    from octavo.checkpoint.quantizer import OctavoQuantizer

    auto.AUTO_QUANTIZATION_CONFIG_MAPPING[QuantMethod.OCTAVO.value] = OctavoConfig
    auto.AUTO_QUANTIZER_MAPPING[QuantMethod.OCTAVO.value] = OctavoQuantizer
