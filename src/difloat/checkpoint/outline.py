"""What a directory holds, read from configs and the headers of its files: nothing of the weights is loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import nn

from difloat.checkpoint import empty_layers
from difloat.checkpoint.layout import CONFIG, CheckpointError, read_headers, read_json
from difloat.checkpoint.remote_code import INDEX as PIPELINE_INDEX
from difloat.checkpoint.save_load import read_plan
from difloat.pipelines import DENOISER_NAMES
from difloat.plan.layer_bits import layer_bits


@dataclass(frozen=True)
class Outline:
    """A model without its values.

    Attributes:
        model: On the meta device, with packed layers where the files have them.
        stored_bytes: Bytes that its tensors take in the files.
    """

    model: nn.Module
    stored_bytes: int


def outline(directory: Path) -> Outline:
    """The denoiser of a pipeline's directory, or the model of a component's, as its files describe it.

    Takes seconds and the memory of the libraries, whatever the size of the files.

    Raises:
        FileNotFoundError: if the directory, its config or the weights are missing.
        CheckpointError: if a config or a header is damaged, or the class is none of diffusers or transformers.
    """
    own = directory if not (directory / PIPELINE_INDEX).is_file() else directory / denoiser_name(directory)
    config = read_json(own / CONFIG)
    model = _empty(config, own)
    if config.get("quantization_config") is None:
        stored = read_headers(own)
    else:
        plan, stored = read_plan(own)
        empty_layers.allocate(model, plan)
    return Outline(model, sum(tensor.nbytes for tensor in stored.values()))


def widths_in(directory: Path) -> Mapping[str, Mapping[str, int]]:
    """The weight bits of the layers of a checkpoint's denoisers by component, those of the first one under the name "".

    Raises:
        FileNotFoundError: if there is no checkpoint.
        CheckpointError: if it is damaged, or no checkpoint of difloat.
        ValueError: as from `layer_bits`.
    """
    if not (directory / PIPELINE_INDEX).is_file():
        return {"": layer_bits(read_plan(directory)[0])}
    first = denoiser_name(directory)
    others = [name for name in DENOISER_NAMES if name != first and _quantized(directory / name)]
    return {
        "" if name == first else name: layer_bits(read_plan(directory / name)[0]) for name in (first, *others)
    }


def _quantized(directory: Path) -> bool:
    return (directory / CONFIG).is_file() and "quantization_config" in read_json(directory / CONFIG)


def denoiser_name(directory: Path) -> str:
    """The name of the denoiser among the components of a pipeline's directory. It is a CheckpointError if none is one."""
    entries = read_json(directory / PIPELINE_INDEX)
    there = [name for name in DENOISER_NAMES if isinstance(entries.get(name), Sequence) and entries[name][0]]
    if not there:
        raise CheckpointError(
            f"pipeline must have a denoiser named {', '.join(DENOISER_NAMES)}, got {directory} without one; "
            "name the directory of the model itself"
        )
    return there[0]


def _empty(config: dict[str, Any], directory: Path) -> nn.Module:
    """The model that a config builds, on the meta device."""
    names = config.get("architectures") or [config.get("_class_name")]
    library = "transformers" if "architectures" in config else "diffusers"
    model_class = getattr(import_module(library), str(names[0]), None)
    if not isinstance(model_class, type) or not issubclass(model_class, nn.Module):
        raise CheckpointError(
            f"class of the model must be one of {library}, got {names[0]!r:.80} in {directory}; update {library}"
        )
    known: Any = model_class
    with torch.device("meta"):
        if library == "transformers":
            model: nn.Module = known(known.config_class.from_pretrained(directory))
        else:
            model = known.from_config({k: v for k, v in config.items() if k != "quantization_config"})
    return model
