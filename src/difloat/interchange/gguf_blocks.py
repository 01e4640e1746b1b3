"""Layers in GGUF's blocks of 32 weights, bit for bit: which block holds a layer, its bytes, and what refuses.

A block is a float16 `d`, of Q4_1 a float16 `m` behind it, and 32 codes. A weight is ``d * level + m``. Of two codes in a byte
the low one belongs to the first half of the block (ggml's `block_q4_0`, `block_q4_1`, `block_q8_0`, `block_iq4_nl`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from difloat.interchange.layers import obstacle_of_inputs, obstacle_of_rotation, obstacle_of_structure
from difloat.numbers import packing, tables
from difloat.numbers.formats import Format
from difloat.numbers.integer_grids import grid_of
from difloat.plan.plan import LayerPlan
from difloat.plan.specs import Part

SIZE = 32  # weights per block
_FITTING = "--for gguf"  # the option of quantize that makes all of a plan fit


@dataclass(frozen=True)
class Block:
    """One kind of block.

    Attributes:
        name: What ggml calls it.
        bits: Width of a stored code.
        levels: Whole numbers that codes stand for, a range or the table of IQ4_NL.
        offset: Stored code minus level.
        shifted: Whether there is an `m`.
    """

    name: str
    bits: int
    levels: range | tuple[int, ...]
    offset: int = 0
    shifted: bool = False


IQ4_NL = Block("IQ4_NL", 4, tables.named()["iq4nl"])
Q4_0 = Block("Q4_0", 4, range(-8, 8), offset=8)
Q4_1 = Block("Q4_1", 4, range(16), shifted=True)
Q8_0 = Block("Q8_0", 8, range(-128, 128))


def flat(layer: LayerPlan) -> LayerPlan:
    """The layer with all axes behind the first as one, as GGUF lays convolutions out, if there is no `obstacle`."""
    if layer.kind == "linear":
        return layer
    rows, part = layer.shape[0], layer.parts[0]
    codes = layer.codes()[0].reshape(rows, -1)
    tensors = {**layer.tensors, "weight": packing.pack(codes, part.weight.format.bits)}
    columns = codes.shape[1]
    return LayerPlan("linear", (rows, columns), (replace(part, channels=columns),), tensors=tensors)


def obstacle(layer: LayerPlan) -> str:
    """Why no block holds the layer without loss and what to do, as the end of "layer L ...", or "" if one does."""
    if problem := obstacle_of_structure(layer) or obstacle_of_rotation(layer) or obstacle_of_inputs(layer):
        return problem
    part, columns = layer.parts[0], 1
    for size in layer.shape[1:]:
        columns *= size
    if layer.kind != "linear" and part.weight.group_size and columns != layer.shape[1]:
        return "is a convolution with scales per group; quantize with --for gguf, which leaves it float"
    if columns % SIZE:
        return (
            f"has {columns} weights in a row, no multiple of {SIZE}; keep it as it is with --exclude, or quantize with "
            f"{_FITTING}"
        )
    if part.weight.group_size and part.weight.group_size % SIZE and part.weight.group_size < columns:
        return (
            f"has one scale per {part.weight.group_size} weights, finer than {SIZE}; quantize with {_FITTING}"
        )
    block = block_of(part)
    if block is None:
        name = part.weight.format.name
        zero = " with zero points" if part.weight.zero_point else ""
        return f"is on the grid of {name}{zero}, which no block of GGUF has; quantize with {_FITTING}"
    scales = layer.tensors["weight_scale"] / _multiplier(part.weight.format)
    zeros = layer.tensors.get("weight_zero_point", scales)
    if not (_in_float16(scales) and _in_float16(zeros)):
        return (
            f"has scales that are no float16 numbers; quantize with --set scale_format=float16 or {_FITTING}"
        )
    return ""


def block_of(part: Part) -> Block | None:
    """The smallest block whose levels are those of the part's format. None without one."""
    format = part.weight.format
    if format.levels == IQ4_NL.levels:
        return None if part.weight.zero_point else IQ4_NL
    if grid_of(format) is None:
        return None
    largest, least = (end * _multiplier(format) for end in (format.max, format.min))
    if part.weight.zero_point:
        return Q4_1 if least >= 0 and largest < len(Q4_1.levels) else None
    if format.levels or format.bits > Q4_0.bits:
        return Q8_0 if largest in Q8_0.levels and least in Q8_0.levels else None
    return next((b for b in (Q4_0, Q4_1) if largest in b.levels and least in b.levels), None)


def encode(layer: LayerPlan) -> tuple[Block, Tensor]:
    """The block and the bytes uint8 [o, blocks in a row * bytes of a block] of a layer for which there is no `obstacle`."""
    layer = flat(layer)
    part, (rows, columns) = layer.parts[0], layer.shape
    block = block_of(part)
    assert block is not None
    format, count = part.weight.format, columns // SIZE
    codes = layer.codes()[0]
    if block is not IQ4_NL:
        values = torch.tensor(format.decode_table)[codes.int()] * _multiplier(format)
        codes = (values.to(torch.int16) + block.offset).to(torch.uint8)
    blocks = codes.reshape(rows, count, SIZE)
    if block.bits == 4:
        first, second = blocks.chunk(2, dim=-1)
        blocks = first | (second << 4)
    numbers = [_per_block(layer, "weight_scale", count) / _multiplier(format)]
    if block.shifted:
        own = "weight_zero_point" in layer.tensors
        numbers.append(_per_block(layer, "weight_zero_point", count) if own else torch.zeros_like(numbers[0]))
    heads = [number.to(torch.float16)[:, :, None].view(torch.uint8) for number in numbers]
    return block, torch.cat([*heads, blocks], dim=-1).reshape(rows, -1)


def _multiplier(format: Format) -> int:
    grid = grid_of(format)
    return 1 if grid is None else grid.multiplier


def _per_block(layer: LayerPlan, name: str, count: int) -> Tensor:
    """Scales or zero points [o, blocks]."""
    (rows, columns), spec = layer.shape, layer.parts[0].weight
    numbers = layer.tensors[name]
    if spec.granularity == "tensor":
        return numbers.expand(rows, 1).expand(rows, count)
    per_row = numbers.reshape(rows, -1)
    first_channels = torch.arange(0, columns, SIZE)
    return per_row[:, first_channels // min(spec.group_size or columns, columns)]


def _in_float16(values: Tensor) -> bool:
    return bool((values.to(torch.float16).float() == values).all())
