"""ComfyUI's W4A8: 16 levels with a scale per 16 inputs, decoded to int8 numbers of a row, inputs rotated in blocks of 256.

The reader (`AsymW4A8Int8Layout` of comfy-kitchen) makes of code c in a group the number ``round(codebook[c] * s_rel)``, within
-127 to 127, and multiplies it by the row's ``s_channel``. Rounding changes nothing where levels and ``s_rel`` are whole, as
``scale_format="whole"`` makes them. A file of other origin is read as the int8 numbers that ComfyUI itself multiplies.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from difloat.numbers import formats, packing
from difloat.plan.plan import LayerPlan
from difloat.plan.specs import Part, QuantSpec, Rotation

FORMAT = "asym_w4a8_int8"
BLOCK, LEVELS, LARGEST = 256, 16, 127
_ROTATION = Rotation(BLOCK, regular=True)
_GROUP = 16
_INPUTS = QuantSpec(formats.parse("int8"), "token", online=True)
_ADVICE = "quantize with --for comfy --bits w4a8"
KEYS = ("weight", "weight_s_rel", "weight_s_channel", "weight_codebook")


def asked(layer: LayerPlan) -> bool:
    """Whether a layer can only be meant for this layout: it is rotated and has a table."""
    return layer.rotation is not None and bool(layer.parts[0].weight.format.levels)


def obstacle(layer: LayerPlan) -> str:
    """Why the layout cannot hold a layer of `asked` without loss, as the end of "layer L ...", or "" if it can."""
    part = layer.parts[0]
    if layer.rotation != _ROTATION:
        return f"is not rotated by the regular matrix in blocks of {BLOCK}; {_ADVICE}"
    if layer.schedules or layer.bands or layer.side is not None:
        return "has several weights, rows of several widths or a branch; quantize with another recipe, such as rtn"
    if part.activation not in (None, _INPUTS):
        return "quantizes its input otherwise than to int8 per token; quantize with --bits w4a8"
    if part.weight.format.bits != 4 or (part.weight.group_size or 1) % _GROUP:
        return f"has no table of {LEVELS} levels in groups of {_GROUP} input channels; {_ADVICE}"
    if layer.shape[1] % (part.weight.group_size or 1) or _split(layer) is None:
        return f"has scales that are no whole multiples of one number per row; {_ADVICE}"
    return ""


def _split(layer: LayerPlan) -> tuple[Tensor, Tensor] | None:
    """The scales as whole numbers [o, groups] times one number of the row [o], exactly, or None if they are not."""
    scales = layer.tensors["weight_scale"].reshape(layer.shape[0], -1)
    largest = max(abs(level) for level in layer.parts[0].weight.format.levels)
    units = scales[:, 0].clone()
    done = torch.zeros(len(scales), dtype=torch.bool)
    smallest = scales.amin(1)
    for factor in range(1, LARGEST // largest + 1):
        unit = smallest / factor
        whole = (scales / unit[:, None]).round()
        kept = whole.to(torch.float8_e4m3fn).float()
        # Products of levels with such units must be exact, or the order of multiplication would matter.
        good = (kept * unit[:, None] == scales).all(1) & (whole.amax(1) * largest <= LARGEST) & _short(unit)
        units = torch.where(good & ~done, unit, units)
        done |= good
    return ((scales / units[:, None]).round(), units) if bool(done.all()) else None


def _short(unit: Tensor) -> Tensor:
    """Whether a number has at most 16 significant bits, so that its products with int8 numbers are exact."""
    mantissa, _ = torch.frexp(unit)
    return (mantissa * 2**16).frac() == 0


def encode(name: str, layer: LayerPlan, dtype: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The stored tensors of a layer by their names behind the layer's, and its mark.

    Raises:
        ValueError: if the layout does not hold it exactly.
    """
    if reason := obstacle(layer):
        raise ValueError(f"comfy files must hold every layer without loss, but {name!r} {reason}")
    found, spec = _split(layer), layer.parts[0].weight
    assert found is not None
    levels = [float(level) for level in spec.format.levels]
    tensors = {
        "weight": packing.pack(layer.codes()[0], 4).view(torch.int8),
        "weight_s_rel": found[0].to(torch.float8_e4m3fn),
        "weight_s_channel": found[1],
        "weight_codebook": torch.tensor(levels + levels[-1:] * (LEVELS - len(levels))),
    }
    mark = {"format": FORMAT, "orig_dtype": dtype, "group_size": spec.group_size, "convrot_groupsize": BLOCK}
    return tensors, mark


def decode(name: str, tensors: Mapping[str, Tensor], mark: Mapping[str, Any]) -> LayerPlan:
    """The layer as the int8 numbers and row scales that ComfyUI multiplies, with its rotation.

    Args:
        name: The name of the layer.
        tensors: The tensors of the file.
        mark: ComfyUI's note of the layer.

    Raises:
        ValueError: if `check` finds something wrong.
    """
    for problem in check(name, tensors, mark):
        raise ValueError(f"layer {name!r}: {problem}")
    codes, relative, unit, table = [tensors[f"{name}.{key}"] for key in KEYS]
    (rows, groups), columns = relative.shape, 2 * codes.shape[1]
    levels = table.float()[packing.unpack(codes.view(torch.uint8), 4, columns).int()]
    grouped = levels.reshape(rows, groups, -1) * relative.float()[:, :, None]
    numbers = grouped.round().clamp(-LARGEST, LARGEST).to(torch.int8).reshape(rows, columns)
    spec = QuantSpec(formats.parse("int8"), "channel")
    stored = {"weight": numbers.view(torch.uint8), "weight_scale": unit.float().clone()}
    return LayerPlan("linear", (rows, columns), (Part(columns, spec),), rotation=_ROTATION, tensors=stored)


def check(name: str, tensors: Mapping[str, Tensor], mark: Mapping[str, Any]) -> Iterator[str]:
    """What is wrong with a layer of this layout, `tensors` being those of the file. Nothing else is read of it if this is."""
    missing = [key for key in KEYS if f"{name}.{key}" not in tensors]
    if missing or f"{name}.weight_correction" in tensors:
        what = f"no {missing[0]}" if missing else "a correction, which makes it asymmetric"
        yield f"layer must have levels and scales and nothing else in {FORMAT}, got {what}; get a file with them"
        return
    codes, relative, unit, table = [tensors[f"{name}.{key}"] for key in KEYS]
    size, block = mark.get("group_size", _GROUP), mark.get("convrot_groupsize", BLOCK)
    if block != BLOCK or not isinstance(size, int) or size < 4:
        yield f"blocks of a rotation must be of {BLOCK} and groups of 4 or more, got {block!r} and {size!r}"
        return
    if codes.dtype != torch.int8 or codes.dim() != 2 or not codes.shape[1] or 2 * codes.shape[1] % BLOCK:
        yield f"weight must be int8 [o, i / 2] with i a multiple of {BLOCK}, got {codes.dtype} {list(codes.shape)}"
        return
    shapes = {
        "weight_s_rel": (relative, (codes.shape[0], 2 * codes.shape[1] // size)),
        "weight_s_channel": (unit, (codes.shape[0],)),
        "weight_codebook": (table, (LEVELS,)),
    }
    for key, (tensor, shape) in shapes.items():
        if tuple(tensor.shape) != shape or not tensor.is_floating_point():
            yield f"{key} must be floating point {list(shape)}, got {tensor.dtype} {list(tensor.shape)}"
        elif not bool(tensor.float().isfinite().all()) or (
            key == "weight_s_channel" and not bool((tensor > 0).all())
        ):
            yield f"{key} must be finite (of rows positive), got NaN, infinity or another sign"
