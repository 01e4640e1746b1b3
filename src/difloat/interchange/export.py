"""Export of a difloat checkpoint to a file of another program."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from difloat import checkpoint
from difloat.api import prompts_for
from difloat.cache_entries import whole_file
from difloat.checkpoint.layout import CONFIG, write_json
from difloat.checkpoint.remote_code import INDEX as PIPELINE_INDEX
from difloat.checkpoint.save_load import read_plan
from difloat.interchange import comfy, comfy_tables, gguf_files, openvino_ir, vllm
from difloat.interchange.contents import Contents, model_directory, read_contents
from difloat.interchange.layers import NEUTRAL_INPUT_SCALE, encode, obstacle
from difloat.interchange.rename import renamed
from difloat.interchange.schemes import DIALECTS, Scheme
from difloat.numbers.formats import Format
from difloat.pipelines import denoisers_of
from difloat.plan.encode import dequantize
from difloat.plan.plan import LayerPlan

INPUT_SCALES = "input_scales"  # of imported files, kept in the options of the plan
TARGETS = (*DIALECTS, "gguf", "openvino", "vllm")
NAMES = ("auto", "source", "diffusers")
_MADE_FOR = {"comfy": "comfy", "nvfp4": "diffusers", "fp8": "diffusers"}  # `quantize --for` of files
_UNDER_SOURCE_NAMES = ("comfy", "gguf")
_ENDINGS = {"gguf": gguf_files.SUFFIX, "openvino": openvino_ir.SUFFIX}  # of files that are no safetensors
_WEIGHTS = "diffusion_pytorch_model"


def export_checkpoint(
    directory: str | os.PathLike[str],
    out: str | os.PathLike[str],
    to: str,
    *,
    component: str | None = None,
    input_scales: Mapping[str, float] | None = None,
    names: str = "auto",
) -> Path:
    """Write the quantized model of a checkpoint as a file that other programs read. Every value stays what it is.

    Tensors that are not quantized are copied as they are stored.

    >>> import difloat
    >>> model = torch.nn.Sequential(torch.nn.Linear(32, 64))
    >>> _ = difloat.quantize(model, "rtn", "w8a16", weight_format="e4m3fn", progress=False)
    >>> export_checkpoint(difloat.save(model, "model"), "exported.safetensors", "fp8").name
    'exported.safetensors'

    Args:
        directory: A difloat checkpoint, of a pipeline or a model.
        out: A new file that ends in ``.safetensors`` (``.gguf``), or a new directory for it and the model's `config.json`.
        to: One of `TARGETS`.
        component: The component of the pipeline, or None if only one is quantized.
        input_scales: The divisors of the reader's own 4-bit inputs by layer, for NVFP4. Other layers get a neutral one.
        names: "source" for the names of the single file that the model came from, or "diffusers" for those of its model.
            "auto" takes the first for programs that know no others (ComfyUI, GGUF) where there was such a file.

    Raises:
        ValueError: if a layer cannot be written without loss, or is not there.
        FileExistsError: if `out` is taken.
        ImportError: if the package that writes such files is missing.
    """
    if to not in TARGETS:
        hint = "; what --for diffusers makes is written with nvfp4" * (to == "diffusers")
        raise ValueError(f"format must be one of {', '.join(TARGETS)}, got {to!r}{hint}")
    if names not in NAMES:
        raise ValueError(f"names must be one of {', '.join(NAMES)}, got {names!r}")
    source, target = model_directory(Path(directory), component), Path(out)
    if target.exists() and (target.is_file() or any(target.iterdir())):
        raise FileExistsError(f"output must be new, got {str(out)!r}, which exists; choose another name")
    ending = _ENDINGS.get(to, ".safetensors")
    if target.suffix in (".safetensors", *_ENDINGS.values()) and target.suffix != ending:
        raise ValueError(
            f"output must end in {ending} or be a directory for {to} files, got {str(out)!r}; choose another name"
        )
    contents = _named(read_contents(source, to), to, names)
    file = target if target.suffix == ending else target / f"{_WEIGHTS}{ending}"
    config = contents.config
    if to == "openvino":
        _write_openvino(Path(directory), source, contents, file)
    elif to == "gguf":
        gguf_files.write(contents, file)
    elif to == "vllm":
        config = _write_vllm(contents, file, target)
    else:
        _write_safetensors(contents, file, to, input_scales or {})
    if file != target:
        write_json(target / CONFIG, dict(config))
    return file


def remarks_of(directory: str | os.PathLike[str], to: str, component: str | None = None) -> list[str]:
    """What a reader does otherwise than the checkpoint, as sentences: inputs that it rounds, layers that it holds in float.

    >>> import difloat
    >>> model = torch.nn.Sequential(torch.nn.Linear(32, 64))
    >>> _ = difloat.quantize(model, "rtn", "w8a16", weight_format="int8", progress=False)
    >>> remarks_of(difloat.save(model, "model"), "comfy")
    ['0: ComfyUI rounds the inputs to 8 bits per token, which the checkpoint does not']
    """
    if to not in ("comfy", "vllm"):
        return []
    plan, stored = read_plan(model_directory(Path(directory), component))
    return comfy.remarks(plan) if to == "comfy" else vllm.remarks(plan, stored)


def _write_openvino(root: Path, source: Path, contents: Contents, file: Path) -> None:
    if not (root / PIPELINE_INDEX).is_file():
        raise ValueError(
            f"checkpoint must be of a pipeline to be traced for openvino, got one model in {str(root)!r}; quantize the pipeline"
        )
    openvino_ir.package()
    pipeline = checkpoint.load(root)
    if source.name not in denoisers_of(pipeline):
        raise ValueError(
            f"component must be a denoiser for openvino, got {source.name!r}; name one of {', '.join(denoisers_of(pipeline))}"
        )
    call = openvino_ir.example_call(pipeline, source.name, prompts_for(pipeline, None))
    with TemporaryDirectory() as folder:
        made = Path(folder) / file.name
        openvino_ir.write(getattr(pipeline, source.name), contents.layers, call, made)
        file.parent.mkdir(parents=True, exist_ok=True)
        for part in (made.with_suffix(".bin"), made):
            shutil.move(part, file.with_suffix(part.suffix))


def _write_vllm(contents: Contents, file: Path, target: Path) -> Mapping[str, Any]:
    """Write the tensors, and give the config that belongs to them."""
    if file == target:
        raise ValueError(
            f"output must be a directory for vllm files, whose config.json says how to read them, got {str(target)!r}"
        )
    tensors, rank = vllm.encode_all(contents)
    _save(tensors, file, {"format": "pt"})
    return vllm.config_of(contents, rank)


def _save(tensors: Mapping[str, Tensor], file: Path, metadata: dict[str, str]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(file) as partial:
        safetensors.torch.save_file(dict(tensors), partial, metadata=metadata)


def _named(contents: Contents, to: str, names: str) -> Contents:
    kept = contents.source_names
    if names == "source" and kept is None:
        raise ValueError(
            "names must be diffusers for a model that came under them or in a way that is not known, got 'source'; leave it out"
        )
    if kept is None or names == "diffusers" or (names == "auto" and to not in _UNDER_SOURCE_NAMES):
        return contents
    return renamed(contents, kept)


def _write_safetensors(contents: Contents, file: Path, to: str, input_scales: Mapping[str, float]) -> None:
    own = {k: v for k, v in contents.options.get(INPUT_SCALES, {}).items() if k in contents.layers}
    if unknown := sorted(input_scales.keys() - contents.layers.keys()):
        raise ValueError(f"input_scales must name quantized layers, got {unknown[0]!r}; leave it out")
    given = {**own, **input_scales}
    tensors: dict[str, Tensor] = {}
    marks: dict[str, Mapping[str, Any]] = {}
    for name, layer in contents.layers.items():
        if to == "comfy" and comfy.decoded(layer):
            tensors[f"{name}.weight"] = dequantize(layer)
            continue
        if to == "comfy" and layer.side is not None:
            encoded, marks[name] = comfy.encode_with_branch(name, layer)
        elif to == "comfy" and comfy_tables.asked(layer):
            encoded, marks[name] = comfy_tables.encode(name, layer, comfy.dtype_of(contents))
        else:
            scheme = _layout(name, layer, DIALECTS[to], to)
            encoded = encode(layer, scheme, float(given.get(name, NEUTRAL_INPUT_SCALE)))
            marks[name] = comfy.mark(scheme, contents)
        tensors |= {f"{name}.{key}": tensor.contiguous() for key, tensor in encoded.items()}
    tensors |= contents.others
    metadata = {"format": "pt"}
    if to == "comfy":
        metadata["_quantization_metadata"] = json.dumps({"format_version": "1.0", "layers": marks})
        tensors |= {f"{name}.comfy_quant": _as_bytes(entry) for name, entry in marks.items()}
    _save(tensors, file, metadata)


def _layout(name: str, layer: LayerPlan, schemes: tuple[Scheme, ...], to: str) -> Scheme:
    """The first layout that holds the layer without loss.

    Raises:
        ValueError: if there is none; says why the one of the same format cannot, or of the same width.
    """
    reasons: dict[Format | int, str] = {}
    for scheme in schemes:
        reason = obstacle(layer, scheme)
        if not reason:
            return scheme
        reasons.setdefault(scheme.element, reason)
        reasons.setdefault(scheme.element.bits, reason)
    own = layer.parts[0].weight.format
    reason = reasons.get(own) or reasons.get(own.bits) or next(iter(reasons.values()))
    fitting = f" or --for {_MADE_FOR[to]}" if to in _MADE_FOR and "; quantize with --" in reason else ""
    raise ValueError(f"{to} files must hold every layer without loss, but {name!r} {reason}{fitting}")


def _as_bytes(entry: object) -> Tensor:
    return torch.frombuffer(bytearray(json.dumps(entry).encode()), dtype=torch.uint8)
