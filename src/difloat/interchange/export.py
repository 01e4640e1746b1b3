"""Export of a difloat checkpoint to a file of another program."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
import torch
from safetensors import safe_open
from torch import Tensor

from difloat.cache_entries import whole_file
from difloat.checkpoint.layout import CONFIG, INPUT_BUNDLE, StoredTensor, read_json, write_json
from difloat.checkpoint.save_load import components, read_plan
from difloat.checkpoint.verify import read_layers
from difloat.interchange.layers import NEUTRAL_INPUT_SCALE, encode, obstacle
from difloat.interchange.schemes import Scheme, check_dialect
from difloat.plan.plan import LayerPlan, Plan

INPUT_SCALES = "input_scales"  # of imported files, kept in the options of the plan
_WEIGHTS = "diffusion_pytorch_model.safetensors"


def export_checkpoint(
    directory: str | os.PathLike[str],
    out: str | os.PathLike[str],
    to: str,
    *,
    component: str | None = None,
    input_scales: Mapping[str, float] | None = None,
) -> Path:
    """Write the quantized model of a checkpoint as a file that other programs read. Every value stays what it is.

    >>> import difloat
    >>> model = torch.nn.Sequential(torch.nn.Linear(32, 64))
    >>> options = {"scale_format": "e8m0", "weight_granularity": "group", "group_size": 32, "keep_8bit": ()}
    >>> _ = difloat.quantize(model, "rtn", "w4a16", progress=False, **options)
    >>> file = export_checkpoint(difloat.save(model, "model"), "exported.safetensors", "mxfp4")
    >>> sorted(safetensors.torch.load_file(file))
    ['0.bias', '0.weight', '0.weight_scale']

    Tensors that are not quantized are copied as they are stored, and names are those of the diffusers model.

    Args:
        directory: A difloat checkpoint, of a pipeline or a model.
        out: A new file that ends in ``.safetensors``, or a new directory for it and the model's `config.json`.
        to: One of `schemes.DIALECTS`.
        component: Of the pipeline; None if only one is quantized.
        input_scales: For NVFP4, what the reader divides its own 4-bit inputs by, by layer; others get a neutral one.

    Returns:
        The weights' file.

    Raises:
        ValueError: if a layer cannot be written without loss, or is not there.
        FileExistsError: if `out` is taken.
    """
    schemes = check_dialect(to)
    model_directory = _component(Path(directory), component)
    plan, stored = read_plan(model_directory)
    target = Path(out)
    if target.exists() and (target.is_file() or any(target.iterdir())):
        raise FileExistsError(f"output must be new, got {str(out)!r}, which exists; choose another name")
    given = {**plan.options.get(INPUT_SCALES, {}), **(input_scales or {})}
    if unknown := sorted(given.keys() - plan.layers.keys()):
        raise ValueError(f"input_scales must name quantized layers, got {unknown[0]!r}; leave it out")
    tensors, layouts = _encoded(plan, stored, schemes, to, given)
    metadata = {"format": "pt"}
    if to == "comfy":
        layers = {name: {"format": scheme.comfy_format} for name, scheme in layouts.items()}
        metadata["_quantization_metadata"] = json.dumps({"format_version": "1.0", "layers": layers})
        tensors |= {f"{name}.comfy_quant": _as_bytes(entry) for name, entry in layers.items()}
    file = target if target.suffix == ".safetensors" else target / _WEIGHTS
    file.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(file) as partial:
        safetensors.torch.save_file(tensors, partial, metadata=metadata)
    if file != target:
        config = read_json(model_directory / CONFIG)
        write_json(target / CONFIG, {k: v for k, v in config.items() if k != "quantization_config"})
    return file


def _component(directory: Path, component: str | None) -> Path:
    found = components(directory)
    if component is None and len(found) == 1:
        return next(iter(found.values()))
    if component not in found:
        names = ", ".join(name or "the model itself" for name in found)
        raise ValueError(f"component must be one of {names}, got {component!r}; name one with --component")
    return found[component]


def _encoded(
    plan: Plan,
    stored: Mapping[str, StoredTensor],
    schemes: tuple[Scheme, ...],
    to: str,
    input_scales: Mapping[str, float],
) -> tuple[dict[str, Tensor], dict[str, Scheme]]:
    """All tensors of the file, and the layout of every quantized layer by name."""
    if plan.attention:
        name = next(iter(plan.attention))
        raise ValueError(
            f"{to} files must not quantize inside attention, but {name!r} does; quantize with --set attention=false"
        )
    tensors: dict[str, Tensor] = {}
    layouts: dict[str, Scheme] = {}
    for name, layer in read_layers(plan, stored):
        layouts[name] = _layout(name, layer, schemes, to)
        scale = float(input_scales.get(name, NEUTRAL_INPUT_SCALE))
        encoded = encode(layer, layouts[name], scale)
        tensors |= {f"{name}.{key}": tensor.contiguous() for key, tensor in encoded.items()}
    own = {INPUT_BUNDLE} | {f"{name}.{key}" for name, layer in plan.layers.items() for key in layer.tensors}
    for path in sorted({entry.file for entry in stored.values()}):
        with safe_open(path, framework="pt") as opened:
            tensors |= {name: opened.get_tensor(name) for name in opened.keys() if name not in own}
    return tensors, layouts


def _layout(name: str, layer: LayerPlan, schemes: tuple[Scheme, ...], to: str) -> Scheme:
    """The first layout that holds the layer without loss.

    Raises:
        ValueError: if there is none; says why the one of the same width cannot.
    """
    reasons: dict[int, str] = {}
    for scheme in schemes:
        reason = obstacle(layer, scheme)
        if not reason:
            return scheme
        reasons.setdefault(scheme.element.bits, reason)
    width = layer.parts[0].weight.format.bits
    reason = reasons.get(width, next(iter(reasons.values())))
    raise ValueError(f"{to} files must hold every layer without loss, but {name!r} {reason}")


def _as_bytes(entry: object) -> Tensor:
    return torch.frombuffer(bytearray(json.dumps(entry).encode()), dtype=torch.uint8)
