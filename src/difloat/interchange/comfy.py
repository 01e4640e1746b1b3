"""What is special about ComfyUI's files: int4 with a low-rank branch, marks, and convolutions, which it holds in float only."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from difloat.interchange import comfy_tables
from difloat.interchange.contents import Contents
from difloat.interchange.schemes import Scheme
from difloat.numbers import formats, packing
from difloat.plan.plan import LayerPlan, Plan
from difloat.plan.specs import QuantSpec

BRANCH_FORMAT = "svdquant_w4a4"
_GROUP = 64  # input channels per scale, of weights and inputs
_INT4, _INT8 = formats.parse("int4"), formats.parse("int8")
_ADVICE = "quantize with --recipe svdquant --bits w4a16"
_SHOWN = 3  # names in a remark


def decoded(layer: LayerPlan) -> bool:
    """Whether a layer is written as its float32 weight: a convolution of which nothing but the weight is quantized."""
    plain = not (layer.schedule or layer.smoothed or layer.side is not None)
    return layer.kind != "linear" and plain and all(part.activation is None for part in layer.parts)


def mark(scheme: Scheme, contents: Contents) -> dict[str, Any]:
    """ComfyUI's note of a layer's layout."""
    if not scheme.element.integer:
        return {"format": scheme.comfy_format}
    entry = {"format": scheme.comfy_format, "orig_dtype": dtype_of(contents), "per_row": True}
    return entry | ({"convrot": True, "convrot_groupsize": scheme.rotated} if scheme.rotated else {})


def dtype_of(contents: Contents) -> str:
    """The dtype that ComfyUI computes in: the one that most tensors in float have."""
    floats = Counter(str(t.dtype) for t in contents.others.values() if t.is_floating_point())
    return floats.most_common(1)[0][0] if floats else str(torch.bfloat16)


def obstacle_with_branch(layer: LayerPlan) -> str:
    """Why ComfyUI's int4 with a branch cannot hold a layer that has one, as the end of "layer L ..."; "" if it can."""
    assert layer.side is not None
    turned = layer.rotation is not None
    if layer.kind != "linear" or layer.schedules or turned or layer.bands or len(layer.parts) != 1:
        return f"is no linear layer with one weight, one branch and no rotation; {_ADVICE}"
    if layer.smoothed and not _dividing(layer.tensors["input_factor"]):
        return "has factors of input channels that are no powers of two; quantize with recipe svdquant"
    part = layer.parts[0]
    if part.weight.format != _INT4 or part.weight.zero_point:
        return f"is on the grid of {part.weight.format.name}, not int4 without zero points; {_ADVICE}"
    size = part.weight.group_size or layer.shape[1]
    if layer.shape[1] % _GROUP or size % _GROUP:
        return (
            f"has {layer.shape[1]} input channels in groups of {size}, not in groups of {_GROUP}; {_ADVICE}"
        )
    if part.activation not in (None, QuantSpec(_INT4, "group", _GROUP, online=True)):
        return "quantizes its input otherwise than to int4 in groups of 64; quantize weights only, like --bits w4a16"
    scales = layer.tensors["weight_scale"]
    if not torch.equal(scales.half().float(), scales):
        return "has scales that are no float16 numbers; quantize with --set scale_format=float16"
    return ""


def encode_with_branch(name: str, layer: LayerPlan) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The stored tensors of a layer with a branch, by their names behind the layer's, and its mark.

    Raises:
        ValueError: if the layout does not hold it exactly.
    """
    if reason := obstacle_with_branch(layer):
        raise ValueError(f"comfy files must hold every layer without loss, but {name!r} {reason}")
    (rows, columns), spec = layer.shape, layer.parts[0].weight
    scales = layer.tensors["weight_scale"]
    per_row = scales.expand(rows)[:, None] if len(scales) == 1 else scales.reshape(rows, -1)
    starts = torch.arange(0, columns, _GROUP) // (spec.group_size or columns)
    tensors = {
        "weight": packing.pack(layer.codes()[0], 4).view(torch.int8),
        "weight_scale": per_row[:, starts].t().half(),
        "weight_proj_down": layer.tensors["side_down"].t().half(),
        "weight_proj_up": layer.tensors["side_up"].half(),
        "weight_smooth_factor": torch.ones(columns, dtype=torch.float16),
    }
    if layer.smoothed:
        tensors["weight_smooth_factor"] = layer.tensors["input_factor"].reciprocal().half()
    return tensors, {"format": BRANCH_FORMAT}


def _dividing(factors: Tensor) -> bool:
    """Whether float16 holds the reciprocals of factors, and division by them is multiplication by the factors, bit for bit."""
    divisors = factors.reciprocal()
    return bool((divisors.frexp().mantissa == 0.5).all() and torch.equal(divisors.half().float(), divisors))


def check_branch(name: str, tensors: Mapping[str, Tensor]) -> Iterator[str]:
    """What is wrong with the tensors of a layer in int4 with a branch, `tensors` being those of the file."""
    weight = tensors[f"{name}.weight"]
    rows, columns = weight.shape[0], weight.shape[-1] * 2
    down = tensors.get(f"{name}.weight_proj_down")
    rank = -1 if down is None else int(down.shape[-1])
    wanted = {
        "weight_scale": (columns // _GROUP, rows),
        "weight_proj_down": (columns, rank),
        "weight_proj_up": (rows, rank),
        "weight_smooth_factor": (columns,),
    }
    if weight.dtype != torch.int8 or weight.dim() != 2:
        yield f"weight must be int8 with two axes in {BRANCH_FORMAT}, got {weight.dtype} {list(weight.shape)}"
    for key, shape in wanted.items():
        tensor = tensors.get(f"{name}.{key}")
        if tensor is None or tuple(tensor.shape) != shape:
            got = "nothing" if tensor is None else str(list(tensor.shape))
            yield f"{key} must have the shape {list(shape)} in {BRANCH_FORMAT}, got {got}"
        elif not bool(tensor.float().isfinite().all()):
            yield f"{key} must be finite, got NaN or infinity"


def remarks(plan: Plan) -> list[str]:
    """Layers in float, and the inputs that ComfyUI rounds though the checkpoint does not."""
    found = []
    if convolutions := [name for name, layer in plan.layers.items() if decoded(layer)]:
        found.append(f"{_named(convolutions)} as float32: ComfyUI holds no quantized convolutions")
    linear = {name: layer for name, layer in plan.layers.items() if layer.kind == "linear"}
    open_ = {n: layer for n, layer in linear.items() if layer.parts[0].activation is None}
    branches = [name for name, layer in open_.items() if layer.side is not None]
    integers = [
        name
        for name, layer in open_.items()
        if layer.side is None and (layer.parts[0].weight.format == _INT8 or comfy_tables.asked(layer))
    ]
    for names, what in ((integers, "8 bits per token"), (branches, f"4 bits per {_GROUP} channels")):
        if names:
            found.append(
                f"{_named(names)}: ComfyUI rounds the inputs to {what}, which the checkpoint does not"
            )
    return found


def _named(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
