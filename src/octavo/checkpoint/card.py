"""The model card: what the folder is, how it was made, and how to load it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from octavo.checkpoint.config import OctavoConfig

CARD = """---
library_name: diffusers
tags:
- octavo
- quantized
- int8
---

# {title}

A diffusers `{pipeline}` whose `{component}` was quantized by Octavo
with PTQ4DM (arXiv 2211.15736): weights in {weights} bits per {granularity}, activations in {activations} bits
per tensor{floats}, no training.

```python
import octavo  # registers the quantization method with diffusers
from diffusers import {pipeline}

pipeline = {pipeline}.from_pretrained("{folder}")
pipeline = octavo.accelerate(pipeline{inputs})  # real int8 on the CPU, by OpenVINO
```

Without `import octavo`, diffusers answers "Unknown quantization type".

| | |
|---|---|
{figures}

## Recipe

```json
{recipe}
```

## Calibration

```json
{calibration}
```
"""


def model_card(
    pipeline_class: str,
    component: str,
    folder: str,
    config: OctavoConfig,
    figures: dict[str, Any],
    needed: Sequence[str] = (),
) -> str:
    """The card's Markdown. `figures`: label -> text, one row each; `needed`: the inputs of every call of the pipeline.

    A prompt and a class are there to be replaced; a picture has the name of a variable.
    """
    examples = {"prompt": '"a photo of a cat"', "class_labels": "0"}
    inputs = ", ".join(f'"{name}": {examples.get(name, name)}' for name in needed)
    rows = "\n".join(f"| {label} | {value} |" for label, value in figures.items())
    return CARD.format(
        title=f"{folder}: {pipeline_class} in {config.recipe.get('weights', 8)} bits",
        pipeline=pipeline_class,
        component=component,
        weights=config.recipe.get("weights"),
        granularity=_granularity(config),
        floats=_floats(config),
        activations=config.recipe.get("activations"),
        folder=folder,
        inputs=f", inputs={{{inputs}}}" if inputs else "",
        figures=rows,
        recipe=json.dumps(config.recipe, indent=2),
        calibration=json.dumps(config.calibration, indent=2),
    )


def _floats(config: OctavoConfig) -> str:
    """In how many layers activations stay float, in brackets."""
    count = sum(rule.activations.is_float for rule in config.layers.values())
    return f" (float in {count} of these layers)" if count else ""


def _granularity(config: OctavoConfig) -> str:
    """What shares a scale in the weights, by the layers that there are: wide ones have no groups."""
    grouped = [rule.weights.granularity == "per_group" for rule in config.layers.values()]
    return (
        "group"
        if all(grouped)
        else "group (wider layers: per output channel)"
        if any(grouped)
        else "output channel"
    )
