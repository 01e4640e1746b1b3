"""Integer operands: which layers an int8 dot product computes exactly, and in which integers.

A format whose values become small integers after multiplication by a power of two needs no float arithmetic inside a
product. Activations and weights turn into int8 *operands*, and the product is an exact int32 sum. Scales, zero points and bias
come after it::

    value  = (operand + shift) * scale + zero_point    (operand int8, shift 0 or 128, the rest float32)
    out    = scale_t * (scale_o * acc + zero_o * rowsum_t) + zero_t * weight_sum_o + bias_o

with ``acc = sum_k a_tk * w_ok``, ``rowsum_t = sum_k a_tk`` and ``weight_sum_o`` the sum of the weight's values. Every backend
has the same operands and the same ``acc``, bit for bit; they differ in the order of the float operations after it.

Unsigned formats that reach beyond 127 are shifted by 128 to be int8. The shift of activations is taken back inside the integer
sums (``acc + shift * sum_k w_ok``, ``rowsum_t + shift * k``), because in float32 a row of zeros would leave a remainder.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from difloat.kernels.reference import online_scale
from difloat.numbers.formats import Format
from difloat.numbers.integer_grids import grid_of
from difloat.numbers.rounding import round_
from difloat.plan.specs import Part, QuantSpec

_INT32_MAX = 2**31 - 1


@cache
def operand_table(format: Format) -> Tensor:
    """The int8 operand of every code of a format that has a `Grid`.

    >>> from difloat import formats
    >>> operand_table(formats.parse("e2m1"))[:8]
    tensor([ 0,  1,  2,  3,  4,  6,  8, 12], dtype=torch.int8)
    """
    grid = grid_of(format)
    assert grid is not None
    values = torch.tensor(format.decode_table, dtype=torch.float64)
    return (values * grid.multiplier - grid.shift).to(torch.int8)


def reason_against(part: Part) -> str | None:
    """Why int8 products do not compute this part exactly, in a few words, or None if they do.

    Inputs in groups of channels, or with a zero point from the data, take a sum per group (`is_stepped`).
    """
    if part.activation is None:
        return "activations are not quantized"
    for spec, what in ((part.weight, "weights"), (part.activation, "activations")):
        if grid_of(spec.format) is None:
            return f"{spec.format.name} {what} are no int8 integers"
    return None if is_plain(part.activation) or is_stepped(part.activation) else "kind of activation scale"


def is_plain(spec: QuantSpec) -> bool:
    """Whether an input is static per tensor (with or without zero point), or online per token or tensor on a signed grid."""
    if spec.online:
        return spec.granularity in ("token", "tensor") and spec.format.signed and not spec.zero_point
    return spec.granularity == "tensor"


def is_stepped(spec: QuantSpec) -> bool:
    """Whether every token of an input, or group of its channels, has an online step of its own and maybe a zero point.

    A grid without a zero point must be signed, since the largest magnitude may be that of a negative value. A shift by 128
    could not be taken back in integers.
    """
    grid = grid_of(spec.format)
    return (
        spec.online
        and spec.granularity in ("token", "group")
        and (spec.zero_point or (spec.granularity == "group" and spec.format.signed))
        and grid is not None
        and not grid.shift
    )


def sums_fit(part: Part, terms: int) -> bool:
    """Whether int32 holds any sum of `terms` products, also with one operand moved to 0..255 as fast kernels do.

    Where the shift of activations is taken back inside the sum, both may reach 255.
    """
    grid = None if part.activation is None else grid_of(part.activation.format)
    # AVX-512 multiplies an unsigned by a signed byte, so one operand may have been moved to 0..255.
    largest = 255 * (255 if grid is not None and grid.shift else 128)
    return terms * largest <= _INT32_MAX and grid_of(part.weight.format) is not None


@dataclass(frozen=True)
class Operand:
    """Rows of activations as integers.

    Attributes:
        values: The int8 integers [t, i].
        scale: float32 [t, 1]. It is NaN where a row of the input has a NaN, so that the results of the row are NaN.
        zero_point: float32 [1], the value of the integer 0 before the shift, or None if it is zero.
        shift: The number that has to be added to `values`.
    """

    values: Tensor
    scale: Tensor
    zero_point: Tensor | None
    shift: int = 0


def quantize_rows(x: Tensor, spec: QuantSpec, scale: Tensor | None, zero_point: Tensor | None) -> Operand:
    """Rows on their integer grid: the same integers that `reference.fake_quantize_input` rounds to.

    Args:
        x: Floating point [t, i], one row per token.
        spec: The spec of an activation that `reason_against` does not refuse.
        scale: float32 [1] of a static scale, or float32 [t, 1] or [1, 1] of an online scale that was found before. With None
            every row gets its online scale here.
        zero_point: float32 [1], or None.
    """
    grid = grid_of(spec.format)
    assert grid is not None
    values = x.float()
    if scale is None:
        scale = online_scale(values, spec.format, per_token=True)
    shifted = values / scale if zero_point is None else (values - zero_point).div_(scale)  # [t, i]
    broken = shifted.isnan().any(-1, keepdim=True)  # [t, 1]
    integers = round_(shifted, spec.format).mul_(grid.multiplier).sub_(grid.shift).to(torch.int8)
    step = scale.reshape(-1, 1) / grid.multiplier  # what an integer of 1 is worth
    row_scale = torch.where(broken, math.nan, step)
    return Operand(integers, row_scale, zero_point, grid.shift)
