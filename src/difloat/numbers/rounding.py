"""Rounding to the nearest value of a format. Scales are applied elsewhere.

One rule holds everywhere. A number goes to the nearest value, a tie goes to the even code (in a table to the lower level),
what lies beyond the ends goes to the end, and NaN stays NaN.

Inside a binade a format is a uniform grid. So rounding is one addition and subtraction of a large number whose last mantissa
bit weighs exactly one step of that binade. The exponent of the binade is read off the bits of the input, because a float32
logarithm is off by one at binade borders.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from difloat.numbers.formats import Format

_CHUNK = 1 << 15  # values encoded or decoded at a time on a CPU: what is in between stays in the cache
_LAYOUT = {  # dtype: integer type of the same width, mask of the exponent field, mantissa bits, exponent bias
    torch.float32: (torch.int32, 0x7F800000, 23, 127),
    torch.float64: (torch.int64, 0x7FF0000000000000, 52, 1023),
}


def round_to(x: Tensor, format: Format) -> Tensor:
    """The nearest value of the format for every element, with ties to the even code.

    Half-precision input is rounded in float32, which is exact, and cast back. Inf becomes the largest value, NaN stays NaN,
    and the result is never negative zero.

    >>> from difloat import formats
    >>> round_to(torch.tensor([0.2, 2.4, 2.5, 100.0]), formats.parse("e2m1"))
    tensor([0., 2., 2., 6.])

    Args:
        x: A floating-point tensor of any shape.
        format: Whose values are the grid.

    Returns:
        A tensor of the same shape and dtype.

    Raises:
        TypeError: if `x` is not floating point.
    """
    if not x.is_floating_point():
        raise TypeError(f"x must be a floating point tensor, got {x.dtype}; convert it with .float()")
    if x.dtype not in _LAYOUT:
        return round_to(x.float(), format).to(x.dtype)
    return round_(x.clone(), format)


def round_(x: Tensor, format: Format) -> Tensor:
    """`round_to` in place: overwrites a float32 or float64 tensor and returns it."""
    if format.levels:
        levels = torch.tensor(format.values, dtype=x.dtype, device=x.device)
        # A value on a border goes to the lower level.
        index = torch.bucketize(x, (levels[1:] + levels[:-1]) / 2)
        return x.copy_(torch.where(x.isnan(), x, levels[index]))
    # Clamped first, since a number beyond the last binade would be rounded to steps that do not exist.
    x.clamp_(format.min, format.max)
    if format.uniform:
        # torch rounds halves to even, which are the even codes of a uniform grid; + 0.0 drops the sign of zero.
        return x.div_(format.step).round_().mul_(format.step).add_(0.0)
    integer, exponent_mask, mantissa_bits, bias = _LAYOUT[x.dtype]
    exponent_field = x.view(integer).bitwise_and(exponent_mask)
    binade = exponent_field.view(x.dtype).clamp_min(math.ldexp(1.0, format.min_exponent))
    if format.mantissa_bits > 0:
        # The last mantissa bit of the anchor weighs one step of the binade, so adding it rounds half to even in steps.
        # A sum that cancels gives +0, so no negative zero is left.
        anchor = binade.mul_(_anchor(format, mantissa_bits))
        return x.add_(anchor).sub_(anchor)
    # Without mantissa bits "even in steps" is always the upper neighbour, while the even code alternates.
    anchor = binade * _anchor(format, mantissa_bits)
    code_of_lower = (exponent_field >> mantissa_bits) - (bias + format.min_exponent) + 1
    tie_to_lower = (x.abs() == 1.5 * binade) & (code_of_lower % 2 == 0)
    lower = torch.copysign(binade, x)
    x.add_(anchor).sub_(anchor)
    return x.copy_(torch.where(tie_to_lower, lower, x))


def _anchor(format: Format, mantissa_bits: int) -> float:
    # 1.5 keeps the sum inside one binade of the anchor, whichever sign the number has.
    return 1.5 * math.ldexp(1.0, mantissa_bits - format.mantissa_bits)


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, format: Format) -> Tensor:  # type: ignore[no-untyped-def]
        """Round, and note which values the range of the format holds."""
        # What saturates does not move with its input, so it gets no gradient.
        ctx.save_for_backward((x >= format.min) & (x <= format.max))
        return round_to(x, format)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[no-untyped-def]
        """The gradient of the values inside the range, and 0 for those that saturate."""
        (inside,) = ctx.saved_tensors
        return gradient * inside, None


def round_straight_through(x: Tensor, format: Format) -> Tensor:
    """`round_to` with the clipped straight-through gradient, which is 1 inside the range of the format and 0 outside.

    >>> from difloat import formats
    >>> x = torch.tensor([2.4, 100.0], requires_grad=True)
    >>> round_straight_through(x, formats.parse("e2m1")).sum().backward()
    >>> x.grad
    tensor([1., 0.])
    """
    return _StraightThrough.apply(x, format)


def encode(values: Tensor, format: Format) -> Tensor:
    """The codes of values, as uint8 of the same shape. Values that are not on the grid are rounded to it first.

    Zero is always code 0, so the code of negative zero never appears. NaN has no code.

    >>> from difloat import formats
    >>> encode(torch.tensor([0.5, 6.0, -0.5]), formats.parse("e2m1"))
    tensor([1, 7, 9], dtype=torch.uint8)
    """
    codes = torch.empty(values.shape, dtype=torch.uint8, device=values.device)
    size = _CHUNK if values.device.type == "cpu" else max(1, values.numel())
    for piece, target in zip(values.reshape(-1).split(size), codes.view(-1).split(size), strict=True):
        target.copy_(_encode(piece, format))
    return codes


def _encode(values: Tensor, format: Format) -> Tensor:
    if format.levels:
        every = torch.tensor(format.values, dtype=torch.float32, device=values.device)
        # As `round_` does it, without a search of the level among all.
        return torch.bucketize(values.float(), (every[1:] + every[:-1]) / 2).to(torch.uint8)
    rounded = round_to(values.float(), format)
    if format.integer:
        # Two's complement: the mask cuts a negative number to the width of a code.
        return rounded.to(torch.int16).bitwise_and(2**format.bits - 1).to(torch.uint8)
    codes = _magnitude_codes(rounded, format).to(torch.uint8)
    if format.signed:
        codes |= (rounded < 0).to(torch.uint8) << (format.bits - 1)
    return codes


def _magnitude_codes(rounded: Tensor, format: Format) -> Tensor:
    """The codes of float32 values on the grid, as int32 and without their sign bit.

    In a binade the upper bits of a float32 number count the values of the grid. So a shift leaves a number that goes up by
    one from value to value. Below the smallest binade values are multiples of the smallest one.
    """
    _, _, mantissa_bits, bias = _LAYOUT[torch.float32]
    magnitude = rounded.abs()  # the sign bit would shift in
    first = format.min_exponent  # of the smallest binade, whose codes start at 2 ** mantissa_bits
    counted = magnitude.view(torch.int32) >> (mantissa_bits - format.mantissa_bits)
    # the code of the smallest binade becomes 2 ** mantissa_bits
    counted -= (bias + first - 1) << format.mantissa_bits
    smallest = math.ldexp(1.0, first - format.mantissa_bits)
    return torch.where(magnitude < math.ldexp(1.0, first), (magnitude / smallest).to(torch.int32), counted)


def decode(codes: Tensor, format: Format) -> Tensor:
    """The values of codes, as float32 of the same shape. The codes are uint8, each below ``2**bits``.

    >>> from difloat import formats
    >>> decode(torch.tensor([1, 7, 9], dtype=torch.uint8), formats.parse("e2m1"))
    tensor([ 0.5000,  6.0000, -0.5000])
    """
    table = torch.tensor(format.decode_table, dtype=torch.float32, device=codes.device)
    return torch.nn.functional.embedding(codes.int(), table[:, None]).squeeze(-1)


def step_at(x: Tensor, format: Format) -> Tensor:
    """The distance between neighbouring values of the grid around every element, in the same shape.

    Elements beyond the range of the format get the distance at its end. This is the interval s of AdaRound on a
    floating-point grid (arXiv:2503.15465 Eq. 8).

    >>> from difloat import formats
    >>> step_at(torch.tensor([0.3, 2.5, 5.0]), formats.parse("e2m1"))
    tensor([0.5000, 1.0000, 2.0000])
    """
    if format.uniform:
        return torch.full_like(x, format.step)
    if format.levels:
        levels = torch.tensor(format.values, dtype=torch.float32, device=x.device)
        upper = torch.bucketize(x.float(), levels).clamp(1, len(levels) - 1)  # of the cell that holds x
        return (levels[upper] - levels[upper - 1]).to(x.dtype)
    clipped = x.float().clamp(format.min, format.max)
    integer, exponent_mask, _, _ = _LAYOUT[clipped.dtype]
    binade = clipped.view(integer).bitwise_and(exponent_mask).view(clipped.dtype)
    return (
        binade.clamp_min(math.ldexp(1.0, format.min_exponent)) * math.ldexp(1.0, -format.mantissa_bits)
    ).to(x.dtype)
