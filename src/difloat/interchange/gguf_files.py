"""GGUF files: writing a model as ComfyUI-GGUF, stable-diffusion.cpp and diffusers read it, and reading any as float weights.

Layers become blocks (`gguf_blocks`). Of all other tensors, those of one axis are float32, and the rest is float16 where
that holds every value and float32 where it does not. A convolution that is quantized lies flat, with its shape in the
metadata, as ComfyUI-GGUF reads it; diffusers reads no quantized convolution.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from difloat.cache_entries import whole_file
from difloat.checkpoint.layout import CheckpointError
from difloat.interchange import gguf_blocks
from difloat.interchange.contents import Contents
from difloat.plan.file_offers import gguf_dtype

SUFFIX = ".gguf"
_SHAPE = "comfy.gguf.orig_shape."  # ComfyUI-GGUF's key of the shape of a tensor that lies flat
_ARCHITECTURES = {  # names of ComfyUI-GGUF, which refuses others
    "FluxTransformer2DModel": "flux",
    "SD3Transformer2DModel": "sd3",
    "AuraFlowTransformer2DModel": "aura",
    "HiDreamImageTransformer2DModel": "hidream",
    "CosmosTransformer3DModel": "cosmos",
    "LTXVideoTransformer3DModel": "ltxv",
    "HunyuanVideoTransformer3DModel": "hyvid",
    "WanTransformer3DModel": "wan",
    "Lumina2Transformer2DModel": "lumina2",
    "ZImageTransformer2DModel": "lumina2",
    "QwenImageTransformer2DModel": "qwen_image",
    "PixArtTransformer2DModel": "pixart",
}


COMFY_ARCHITECTURES = frozenset({*_ARCHITECTURES.values(), "sd1", "sdxl"} - {"pixart"})


def write(contents: Contents, file: Path) -> None:
    """Write a model as a new GGUF file.

    Raises:
        ValueError: if a layer is not held exactly by any block.
        ImportError: if the package gguf is missing.
    """
    gguf = _package()
    for name, layer in contents.layers.items():
        if reason := gguf_blocks.obstacle(layer):
            raise ValueError(f"gguf files must hold every layer without loss, but {name!r} {reason}")
    writer = gguf.GGUFWriter(None, architecture_of(contents.config))
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    for name, layer in contents.layers.items():
        block, blocks = gguf_blocks.encode(layer)
        kind = gguf.GGMLQuantizationType[block.name]
        writer.add_tensor(f"{name}.weight", blocks.numpy(), raw_dtype=kind)
        if layer.kind != "linear":
            writer.add_array(f"{_SHAPE}{name}.weight", list(layer.shape))
    for name, tensor in contents.others.items():
        writer.add_tensor(name, _float(name, tensor).numpy())
    file.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(file) as partial:
        writer.write_header_to_file(Path(partial))
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def read(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], Counter[str]]:
    """The float32 weights of a GGUF file in the shapes of the model, and how many values each type of tensor holds.

    Raises:
        CheckpointError: if it is no whole GGUF file, or holds a type that the package gguf does not decode.
        ImportError: if the package gguf is missing.
    """
    gguf = _package()
    counts: Counter[str] = Counter()
    tensors: dict[str, Tensor] = {}
    try:
        reader = gguf.GGUFReader(path)
        for tensor in reader.tensors:
            with np.errstate(invalid="ignore"):  # infinite scales, which `validate` speaks of
                values = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy())
            shape = _original_shape(reader, tensor.name) or [int(size) for size in reversed(tensor.shape)]
            tensors[tensor.name] = values.reshape(shape)
            counts[tensor.tensor_type.name] += values.numel()
    except (ValueError, IndexError, KeyError, NotImplementedError) as error:
        raise CheckpointError(
            f"{path} must be a whole GGUF file of float tensors, but {error!s:.200}; download it again"
        ) from error
    return tensors, counts


def architecture_in(path: str | os.PathLike[str]) -> str:
    """What `general.architecture` of a file says; "" if nothing."""
    field = _package().GGUFReader(path).get_field("general.architecture")
    return "" if field is None else str(field.contents())


def architecture_of(config: Mapping[str, Any]) -> str:
    """What `general.architecture` calls a model: ComfyUI-GGUF's name of its family, else the name of its class."""
    name = str(config.get("_class_name", "module"))
    if name == "UNet2DConditionModel":
        return "sdxl" if config.get("addition_embed_type") == "text_time" else "sd1"
    return _ARCHITECTURES.get(name, name.lower())


def _original_shape(reader: Any, name: str) -> list[int] | None:
    field = reader.get_field(f"{_SHAPE}{name}")
    return None if field is None else [int(field.parts[at][0]) for at in field.data]


def _float(name: str, tensor: Tensor) -> Tensor:
    """The tensor as GGUF stores it, with the same values."""
    if not tensor.is_floating_point():
        raise ValueError(
            f"tensors of a gguf file must be floating point, but {name!r} is {tensor.dtype}; export to another format"
        )
    exact = tensor.float()
    if tensor.dtype == torch.float64 and not torch.equal(exact.double(), tensor):
        raise ValueError(
            f"tensors of a gguf file must fit float32, but {name!r} does not; save it in float32"
        )
    return exact.to(gguf_dtype(tensor))


def _package() -> ModuleType:
    try:
        import gguf
    except ImportError as error:
        raise ImportError(
            "the package gguf must be installed for GGUF files, but is not; pip install gguf"
        ) from error
    package: ModuleType = gguf
    return package
