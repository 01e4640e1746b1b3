"""Slow and exact truth about formats, in pure Python fractions; shared by the tests, never imported by the package.

Nothing here calls the package: a format is read field by field and decoded from its definition once more.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from fractions import Fraction
from functools import cache
from itertools import product

from difloat.numbers.formats import Format


def all_names() -> list[str]:
    """The names of all formats of 1 to 8 bits (int1 is none: its values would be 0 and -1)."""
    names = [f"int{bits}" for bits in range(2, 9)] + [f"uint{bits}" for bits in range(1, 9)]
    for sign, exponent, mantissa, specials in product(("", "u"), range(8), range(9), ("", "fn", "ieee")):
        free = exponent + mantissa
        wide_enough = free >= (3 if specials else 1)
        if wide_enough and free + (sign == "") <= 8 and (exponent or not specials):
            names.append(f"{sign}e{exponent}m{mantissa}{specials}")
    return names


def decode(code: int, format: Format) -> Fraction | float:
    """The number that `code` stands for; NaN and Inf as floats."""
    if format.integer:
        weights = [2**bit for bit in range(format.bits)]
        if format.signed:
            weights[-1] = -weights[-1]
        return Fraction(sum(weight for bit, weight in enumerate(weights) if code >> bit & 1))
    digits = f"{code:0{format.bits}b}"
    sign = 1
    if format.signed:
        sign, digits = (-1 if digits[0] == "1" else 1), digits[1:]
    exponent_digits, mantissa_digits = digits[: format.exponent_bits], digits[format.exponent_bits :]
    if format.specials == "fn" and "0" not in digits:
        return math.nan
    if format.specials == "ieee" and "0" not in exponent_digits:
        return math.nan if "1" in mantissa_digits else sign * math.inf
    exponent, mantissa = int(exponent_digits or "0", 2), int(mantissa_digits or "0", 2)
    bias = 2 ** (format.exponent_bits - 1) - 1 if format.exponent_bits else 0
    leading = 1 if exponent else 0
    fraction = leading + Fraction(mantissa, 2**format.mantissa_bits)
    return sign * fraction * Fraction(2) ** (max(exponent, 1) - bias)


@cache
def finite_values(format: Format) -> tuple[tuple[Fraction, int], ...]:
    """Every finite value with its code, ascending; negative zero is left out."""
    found = {}
    for code in range(2**format.bits):
        value = decode(code, format)
        if isinstance(value, Fraction):
            found.setdefault(value, code)
    return tuple(sorted(found.items()))


def midpoints(format: Format) -> list[Fraction]:
    """All ties: the numbers half way between two neighbouring values."""
    values = [value for value, _ in finite_values(format)]
    return [(low + high) / 2 for low, high in zip(values, values[1:], strict=False)]


def round_exactly(x: float | Fraction, format: Format) -> Fraction:
    """Nearest finite value, ties to the even code, saturating; `x` is not NaN."""
    levels = finite_values(format)
    if x in (math.inf, -math.inf):
        return levels[-1][0] if x > 0 else levels[0][0]
    x = Fraction(x)
    above = bisect_left(levels, (x, -1))
    neighbours = levels[max(above - 1, 0) : above + 1]
    return min(neighbours, key=lambda level: (abs(level[0] - x), level[1] & 1))[0]


def quantize(
    rows: Sequence[Sequence[float]], scales: Sequence[float], format: Format, zero_points: Sequence[float]
) -> list[list[Fraction]]:
    """Rows on their grids ``scale * value + zero_point``, one scale and zero point per row, without rounding error."""
    result = []
    for row, scale, zero in zip(rows, map(Fraction, scales), map(Fraction, zero_points), strict=True):
        result.append([round_exactly((Fraction(x) - zero) / scale, format) * scale + zero for x in row])
    return result


def squared_error(row: Sequence[float], scale: float, format: Format, zero_point: float = 0.0) -> Fraction:
    """Sum of squared errors of one row on the grid ``scale * value + zero_point``."""
    (quantized,) = quantize([row], [scale], format, [zero_point])
    return sum(((Fraction(x) - q) ** 2 for x, q in zip(row, quantized, strict=True)), Fraction(0))
