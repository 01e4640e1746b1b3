"""Scales that are rounded to a grid of their own, as foreign file formats and 4-bit tensor cores ask for.

NVFP4 stores the scale of every group as an e4m3 number, times one float32 scale of the whole tensor; the MX formats store
a power of two (OCP Microscaling Formats v1.0, section 5); GGUF stores a float16 number, and for the types that have one its
zero point as another. ComfyUI's W4A8 decodes to int8 numbers of a row, so a scale there is a whole number times one of the row.
A plan whose scales were searched on such a grid can be exported
without any loss (`interchange`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor

from difloat.numbers import formats, rounding
from difloat.numbers.formats import Format

ScaleFormat = Literal["float32", "e4m3", "e8m0", "float16", "whole"]
Snap = Callable[[Tensor, Format], Tensor]

_GRID = formats.parse("e4m3fn")  # of group scales, hardware's own: no 480
_GLOBAL_BITS = (
    8  # significant bits of the tensor's scale: its products with e4m3 numbers are exact in float32
)
_SMALLEST_SHARED = -100  # exponent; its product with the smallest e4m3 number is no subnormal
_SMALLEST_FLOAT16 = 2.0**-24
_LARGEST_INT8 = 127
_LARGEST_EXPONENT = 127  # of e8m0, and of float32


def snapping(rows: Tensor, scale_format: ScaleFormat) -> Snap | None:
    """The function that moves scales to the nearest ones that a scale format allows, or None for float32.

    With "e4m3" all rows share one float32 scale. It is chosen so that the row that reaches furthest gets the largest e4m3
    number. With "whole" scales are whole numbers, for rows of a weight that were divided by `row_units`. The results of the
    function are positive and finite.

    >>> from difloat import formats
    >>> snap = snapping(torch.ones(2, 4), "e8m0")
    >>> snap(torch.tensor([0.3, 0.9]), formats.parse("e2m1"))
    tensor([0.2500, 1.0000])

    Args:
        rows: The numbers [r, n] whose scales are moved.
        scale_format: The grid of the scales.

    Raises:
        ValueError: if there is no such scale format.
    """
    if scale_format not in get_args(ScaleFormat):
        raise ValueError(f"scale_format must be one of {get_args(ScaleFormat)}, got {scale_format!r}")
    if scale_format == "float32":
        return None
    if scale_format == "float16":
        return lambda scale, format: _float16(scale.clamp_min(_SMALLEST_FLOAT16))
    if scale_format == "whole":
        return _whole
    if scale_format == "e8m0":
        return lambda scale, format: _power_of_two(scale)
    reach = float(rows.detach().abs().max())

    def snap(scale: Tensor, format: Format) -> Tensor:
        shared = shared_scale(reach / format.max)
        # Zero is no scale, so the smallest positive e4m3 number is the lower end.
        inside = (scale / shared).clamp(_GRID.step, _GRID.max)
        return rounding.round_to(inside, _GRID) * shared

    return snap


def row_units(weight: Tensor) -> Tensor:
    """The number that the scales of every row of a weight [o, i] are whole multiples of, float32 [o, 1].

    The largest weight of a row becomes about 127 of them. A unit has few significant bits, so that products with int8 numbers
    are exact.

    >>> row_units(torch.tensor([[127.0, -3.0], [0.0, 0.0]])).tolist()
    [[1.0], [1.0]]
    """
    mantissa, exponent = torch.frexp(weight.detach().float().abs().amax(1, keepdim=True) / _LARGEST_INT8)
    short = torch.ldexp((mantissa * 2**_GLOBAL_BITS).ceil(), exponent - _GLOBAL_BITS)
    return torch.where(short > 0, short.clamp_min(2.0**_SMALLEST_SHARED), 1.0)


def _whole(scale: Tensor, format: Format) -> Tensor:
    """The nearest whole numbers with which no value of the format leaves int8."""
    return scale.round().clamp(1, max(1, _LARGEST_INT8 // max(format.max, -format.min)))


def snap_zero_points(zero_points: Tensor, scale_format: ScaleFormat) -> Tensor:
    """Zero points moved to the grid of the scales. Those on float32 stay what they are."""
    return _float16(zero_points) if scale_format == "float16" else zero_points


def _float16(values: Tensor) -> Tensor:
    """The nearest finite float16 numbers, in the dtype of `values`."""
    largest = torch.finfo(torch.float16).max
    return values.clamp(-largest, largest).to(torch.float16).to(values.dtype)


def shared_scale(largest: float) -> float:
    """The float32 scale of a tensor whose group scales go up to `largest`.

    It has few significant bits and is rounded up. A tensor of zeros gets 1.

    >>> shared_scale(448.0), shared_scale(0.0)
    (1.0, 1.0)
    """
    if not largest > 0:
        return 1.0
    fraction, exponent = math.frexp(largest / _GRID.max)
    # Rounded up, so that the largest group scale stays within e4m3.
    rounded = math.ldexp(math.ceil(math.ldexp(fraction, _GLOBAL_BITS)), exponent - _GLOBAL_BITS)
    return max(rounded, math.ldexp(1.0, _SMALLEST_SHARED))


def _power_of_two(scale: Tensor) -> Tensor:
    """The power of two that is nearest in ratio.

    e8m0 holds 2**-127 to 2**127. float32 without its subnormal numbers starts at 2**-126, which is the lower end here.
    """
    exponent = scale.double().log2().round().clamp(1 - _LARGEST_EXPONENT, _LARGEST_EXPONENT)
    return torch.exp2(exponent).to(scale.dtype)
