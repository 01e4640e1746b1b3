"""What an export writes: the quantized layers of a model, its other tensors and its config, read from a checkpoint."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from difloat.checkpoint import source_names
from difloat.checkpoint.layout import CONFIG, INPUT_BUNDLE, read_json
from difloat.checkpoint.save_load import components, read_plan
from difloat.checkpoint.verify import read_layers
from difloat.plan.plan import LayerPlan


@dataclass(frozen=True)
class Contents:
    """A model by the names of its tensors.

    Attributes:
        layers: Quantized layers, by module name.
        others: All other tensors, by full name, as they are stored.
        config: The model's config, without what says how it is quantized.
        options: The plan's options.
        source_names: What `checkpoint.source_names` keeps, or None.
    """

    layers: Mapping[str, LayerPlan] = field(repr=False)
    others: Mapping[str, Tensor] = field(repr=False)
    config: Mapping[str, Any]
    options: Mapping[str, Any]
    source_names: Mapping[str, Any] | None = field(default=None, repr=False)


def model_directory(directory: str | os.PathLike[str], component: str | None) -> Path:
    """Where the quantized model lies. ValueError unless it is the only one or named."""
    found = components(directory)
    if component is None and len(found) == 1:
        return next(iter(found.values()))
    if component not in found:
        names = ", ".join(name or "the model itself" for name in found)
        raise ValueError(f"component must be one of {names}, got {component!r}; name one with --component")
    return found[component]


def read_contents(directory: Path, to: str) -> Contents:
    """The model in a directory that `model_directory` found.

    Raises:
        ValueError: if it quantizes inside attention, which no file of the kind `to` says.
    """
    plan, stored = read_plan(directory)
    if plan.attention:
        name = next(iter(plan.attention))
        raise ValueError(
            f"{to} files must not quantize inside attention, but {name!r} does; quantize with --set attention=false"
        )
    own = {INPUT_BUNDLE} | {f"{name}.{key}" for name, layer in plan.layers.items() for key in layer.tensors}
    others: dict[str, Tensor] = {}
    for path in sorted({entry.file for entry in stored.values()}):
        with safe_open(path, framework="pt") as opened:
            others |= {name: opened.get_tensor(name) for name in opened.keys() if name not in own}
    config = {k: v for k, v in read_json(directory / CONFIG).items() if k != "quantization_config"}
    return Contents(
        dict(read_layers(plan, stored)), others, config, plan.options, source_names.read(directory)
    )
