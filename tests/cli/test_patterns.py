from __future__ import annotations

import pytest

from octavo.cli.patterns import check_patterns
from octavo.errors import OctavoError


def test_attention_is_known_by_its_modules_name(pipeline) -> None:  # type: ignore[no-untyped-def]
    """Where its products are quantized too; else the name is taken for a typing mistake."""
    patterns = {"--exclude": ["mid_block.attentions.0"]}
    check_patterns("model", pipeline, patterns, modules=True, further=())
    with pytest.raises(OctavoError, match="matches none"):
        check_patterns("model", pipeline, patterns, modules=False, further=())
    with pytest.raises(OctavoError, match="matches none"):
        check_patterns("model", pipeline, {"--exclude": ["mid_blok.*"]}, modules=True, further=())
