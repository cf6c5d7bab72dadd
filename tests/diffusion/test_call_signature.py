"""What a pipeline's call reads from its keywords, by its own source."""

from __future__ import annotations

from typing import Any

import pytest
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline

from octavo.diffusion.call_signature import further_names


class Reads:
    def __call__(self, prompt: str, **kwargs: Any) -> Any:
        if "c" in kwargs and "d" not in kwargs:
            return kwargs["e"]
        return kwargs.pop("a", None), kwargs.get("b"), {"kwargs": prompt}


class HandsOn:
    def __call__(self, **kwargs: Any) -> Any:
        return kwargs.pop("a", None), dict(**kwargs)


class Computes:
    def __call__(self, **kwargs: Any) -> Any:
        return [kwargs[name] for name in ("a", "b")]


class Drops:
    def __call__(self, **kwargs: Any) -> Any:
        return None


class Inherits(Reads):
    pass


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        (Reads, {"a", "b", "c", "d", "e"}),
        (Inherits, {"a", "b", "c", "d", "e"}),
        (Drops, set()),
        (HandsOn, None),
        (Computes, None),
        (StableDiffusionPipeline, {"callback", "callback_steps"}),
        (StableDiffusionXLPipeline, {"callback", "callback_steps"}),
    ],
)
def test_names_are_those_that_the_source_reads(kind: type, names: set[str] | None) -> None:
    """None where any name may be meant: keywords that are handed on, or read by a name that is computed."""
    assert further_names(kind) == names


def test_without_source_any_name_may_be_meant() -> None:
    space: dict[str, Any] = {}
    exec("class Typed:\n    def __call__(self, **kwargs):\n        return kwargs['a']", space)
    assert further_names(space["Typed"]) is None
