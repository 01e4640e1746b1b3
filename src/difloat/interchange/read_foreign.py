"""Reading of a foreign file: its tensors, and which of its layers are quantized in which layout."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from difloat.checkpoint.layout import CheckpointError, weight_files
from difloat.interchange.schemes import COMFY, FP8_ROWS, MXFP4, NVFP4, Scheme

METADATA = "_quantization_metadata"
SUFFIXES = ("weight", "weight_scale", "weight_scale_2", "input_scale", "pre_quant_scale", "comfy_quant")
PACKED = "weight_packed"  # the name of packed weights in compressed-tensors
_TURNED = " rotated"  # behind the name of a layout, where inputs are
_BY_COMFY_NAME = {scheme.comfy_format + _TURNED * bool(scheme.rotated): scheme for scheme in COMFY}


@dataclass(frozen=True)
class Foreign:
    """A foreign file or its shards, read whole: the tensors by name, and the metadata of the headers."""

    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, str]

    def layer(self, name: str) -> dict[str, Tensor]:
        """The tensors of a quantized layer by their names, without the layer's."""
        found = {key: self.tensors[f"{name}.{key}"] for key in SUFFIXES if f"{name}.{key}" in self.tensors}
        if "weight" not in found and f"{name}.{PACKED}" in self.tensors:
            found["weight"] = self.tensors[f"{name}.{PACKED}"]
        return found

    def quantized(self) -> list[str]:
        """The names of layers that have scales or marks, in the order of the file."""
        ends = (".weight_scale", ".weight_scale_2", ".comfy_quant")
        named = [name[: -len(end)] for name in self.tensors for end in ends if name.endswith(end)]
        return list(dict.fromkeys([*named, *self.comfy_formats()]))

    def comfy_formats(self) -> dict[str, str]:
        """The name of the layout of every layer in ComfyUI's marks, which is another one where inputs are rotated.

        Raises:
            ValueError: as from `comfy_marks`.
        """
        return {name: entry["format"] + _turned(entry) for name, entry in self.comfy_marks().items()}

    def comfy_marks(self) -> dict[str, dict[str, Any]]:
        """ComfyUI's note of every layer.

        Raises:
            ValueError: if a mark is no JSON object with a format.
        """
        found: dict[str, Any] = {}
        if METADATA in self.metadata:
            found |= _json(self.metadata[METADATA], METADATA).get("layers", {})
        for name, tensor in self.tensors.items():
            if name.endswith(".comfy_quant"):
                found[name.removesuffix(".comfy_quant")] = _json(bytes(tensor.flatten().tolist()), name)
        for name, entry in found.items():
            if not isinstance(entry, dict) or not isinstance(entry.get("format"), str):
                raise ValueError(f"mark of layer {name!r} must hold a format, got {entry!r:.80}")
        return found


def _turned(entry: dict[str, Any]) -> str:
    """What stands behind the name of the layout: blocks that no layout here has are named as well."""
    if not entry.get("convrot"):
        return ""
    block = entry.get("convrot_groupsize", 256)
    return _TURNED if block == 256 else f"{_TURNED} in blocks of {block!r:.20}"


def _json(text: str | bytes, name: str) -> dict[str, Any]:
    try:
        data = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{name} must be JSON, got {text[:60]!r} ({error}); download it again") from error
    if not isinstance(data, dict):
        raise ValueError(f"{name} must be a JSON object, got {text[:60]!r}; download it again")
    return data


def read(path: str | os.PathLike[str]) -> Foreign:
    """Read a safetensors file, or a directory with one or its shards.

    Raises:
        FileNotFoundError: if there is no such file.
        CheckpointError: if a file is truncated or damaged.
    """
    source = Path(path)
    if source.is_dir():
        files = weight_files(source)[0]
    elif source.is_file():
        files = [source]
    else:
        raise FileNotFoundError(
            f"path must be a file or a directory, got {str(path)!r}, which does not exist"
        )
    tensors: dict[str, Tensor] = {}
    metadata: dict[str, str] = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as opened:
                metadata |= opened.metadata() or {}
                tensors |= {name: opened.get_tensor(name) for name in opened.keys()}
        except SafetensorError as error:
            raise CheckpointError(
                f"{file} must be a whole safetensors file, but {error!s:.200}; download it again"
            ) from error
    return Foreign(tensors, metadata)


def scheme_of(foreign: Foreign, name: str) -> Scheme | None:
    """The layout of a layer by its marks, dtypes and tensors, or None if no known layout looks like that."""
    marked = foreign.comfy_formats().get(name)
    if marked is not None:
        return _BY_COMFY_NAME.get(marked)
    tensors = foreign.layer(name)
    weight, scale = tensors.get("weight"), tensors.get("weight_scale")
    if weight is None:
        return None
    if weight.dtype == torch.float8_e4m3fn:
        return FP8_ROWS
    if weight.dtype != torch.uint8:
        return None
    has_global = "weight_scale_2" in tensors or (scale is not None and scale.dtype == torch.float8_e4m3fn)
    return NVFP4 if has_global else MXFP4
