"""Number formats: which numbers exist.

A format is one small record; its values, its largest number, its codes and what hardware can do with it are derived.

Naming: ``eXmY`` has a sign bit, X exponent and Y mantissa bits, ``ueXmY`` has no sign bit, ``intN`` is two's complement,
``uintN`` unsigned. Every code of these is a finite number, as the quantization papers use them (the maximum of ``e4m3`` is
480). Two suffixes name the hardware variants that spend codes on specials: ``fn`` (the all-ones code is NaN: ``e4m3fn``) and
``ieee`` (the top exponent holds Inf and NaN: ``e5m2ieee``).

The exponent bias is ``2**(X - 1) - 1``, and values are in natural units: the bias of a paper, a clip value and a scale are
one degree of freedom, which lives in the scale (`quantizer`).

A *table* is a format of 2 to 16 int8 levels, named by them (``table(-127,-40,30,113)``) or by a short name (`tables`).
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Literal

from difloat.numbers import tables

_FLOAT = re.compile(r"(u?)e([0-9])m([0-9])(fn|ieee)?")
_INTEGER = re.compile(r"(u?)int([0-9])")
_MAX_BITS = 8
_MAX_EXPONENT_BITS = 7  # with 8 the largest value, 2**128, is no float32


@dataclass(frozen=True)
class Format:
    """The numbers one code of `bits` bits can mean.

    Fields of an integer format: `exponent_bits` is 0 and `mantissa_bits` counts the bits below the sign.
    Code layout, high to low: sign, exponent, mantissa; integers are two's complement.
    """

    signed: bool
    exponent_bits: int
    mantissa_bits: int
    integer: bool = False
    specials: Literal["", "fn", "ieee"] = ""
    levels: tuple[
        int, ...
    ] = ()  # of a table, ascending; code j means levels[j], codes beyond them the last level

    @property
    def name(self) -> str:
        """The name that `parse` reads back."""
        if self.levels:
            return tables.name_of(self.levels)
        unsigned = "" if self.signed else "u"
        if self.integer:
            return f"{unsigned}int{self.bits}"
        return f"{unsigned}e{self.exponent_bits}m{self.mantissa_bits}{self.specials}"

    @property
    def bits(self) -> int:
        """Width of a code in bits."""
        return int(self.signed) + self.exponent_bits + self.mantissa_bits

    @property
    def bias(self) -> int:
        """Exponent bias; 0 for formats without an exponent field."""
        return 2 ** (self.exponent_bits - 1) - 1 if self.exponent_bits else 0

    @property
    def min_exponent(self) -> int:
        """Exponent of the smallest normal number, which subnormals share; a uniform grid has only this one."""
        return self.mantissa_bits if self.integer else 1 - self.bias

    @property
    def step(self) -> float:
        """Distance between 0 and the smallest positive value; of a table the least distance of two levels."""
        if self.levels:
            return float(min(b - a for a, b in zip(self.levels, self.levels[1:], strict=False)))
        return math.ldexp(1.0, self.min_exponent - self.mantissa_bits)

    @cached_property
    def decode_table(self) -> tuple[float, ...]:
        """The value of every code, in code order; NaN and Inf only in the hardware variants."""
        if self.levels:
            return tuple(float(self.levels[min(c, len(self.levels) - 1)]) for c in range(2**self.bits))
        return tuple(self._decode(code) for code in range(2**self.bits))

    def _decode(self, code: int) -> float:
        if self.integer:
            return float(code - 2**self.bits if self.signed and code >> (self.bits - 1) else code)
        mantissa = code & (2**self.mantissa_bits - 1)
        exponent = (code >> self.mantissa_bits) & (2**self.exponent_bits - 1)
        sign = -1.0 if self.signed and code >> (self.bits - 1) else 1.0
        top = exponent == 2**self.exponent_bits - 1
        if self.specials == "ieee" and top:
            return math.nan if mantissa else sign * math.inf
        if self.specials == "fn" and top and mantissa == 2**self.mantissa_bits - 1:
            return math.nan
        if exponent == 0:
            return sign * mantissa * self.step
        fraction = 1 + math.ldexp(mantissa, -self.mantissa_bits)
        return sign * math.ldexp(fraction, exponent - self.bias)

    @cached_property
    def values(self) -> tuple[float, ...]:
        """The finite values, ascending, each once (negative zero is zero)."""
        return tuple(sorted({v + 0.0 for v in self.decode_table if math.isfinite(v)}))

    @property
    def max(self) -> float:
        """Largest finite value."""
        return self.values[-1]

    @property
    def min(self) -> float:
        """Smallest finite value: ``-max``, 0, or one step below ``-max`` for two's complement."""
        return self.values[0]

    @property
    def uniform(self) -> bool:
        """Whether the values are evenly spaced: the format is an integer format in all but name (`e1m2`, `ue1m3`)."""
        return self.exponent_bits <= 1 and not self.levels

    @property
    def symmetric(self) -> bool:
        """Whether the negative of every value is a value."""
        return self.values == tuple(-value + 0.0 for value in reversed(self.values))

    def mirrored(self) -> Format:
        """The table of the negated levels: it times a scale is this one times the negated scale."""
        return table(tuple(-level for level in reversed(self.levels)))

    def int8_multiplier(self) -> int | None:
        """Smallest power of two that turns every value into an integer of 8 bits, or None.

        8 bits means int8 for signed formats and uint8 for unsigned ones. With it an int8 dot product computes exactly.
        """
        if self.specials:
            return None
        if self.levels:
            return 1
        multiplier = max(1, round(1 / self.step)) if self.step <= 1 else 1
        low, high = (-128, 127) if self.signed else (0, 255)
        fits = all(v * multiplier == int(v * multiplier) for v in self.values)
        return multiplier if fits and self.min * multiplier >= low and self.max * multiplier <= high else None

    def embeds_in_e4m3(self) -> bool:
        """Whether a bit shift turns every code into one of `e4m3`, up to a constant power of two.

        Hardware e4m3 (`e4m3fn`) has a NaN where the all-finite `e4m3` has 480, so of all formats for which this holds
        only `e4m3` itself needs care on FP8 tensor cores.
        """
        return (
            not self.integer
            and 1 <= self.exponent_bits <= 4
            and self.mantissa_bits <= 3
            and self.specials != "ieee"
        )


def table(levels: tuple[int, ...]) -> Format:
    """The table of these levels, unchecked: `parse` checks what users write."""
    return Format(True, 0, (len(levels) - 1).bit_length() - 1, levels=levels)


@cache
def parse(name: str) -> Format:
    """The format called `name`: ``eXmY``, ``ueXmY`` (also with ``fn``, ``ieee``), ``intN``, ``uintN``, 1 to 8 bits, or a table.

    Raises:
        ValueError: if the name is no such format.
    """
    text = name.strip().lower()
    if (levels := tables.levels_of(text)) is not None:
        return table(levels)
    if match := _FLOAT.fullmatch(text):
        unsigned, exponent, mantissa, specials = match.groups()
        result = Format(not unsigned, int(exponent), int(mantissa), specials=specials or "")  # type: ignore[arg-type]
    elif match := _INTEGER.fullmatch(text):
        signed = not match.group(1)
        result = Format(signed, 0, int(match.group(2)) - int(signed), integer=True)
    else:
        raise ValueError(
            f"format must be eXmY, ueXmY, intN, uintN or a table, got {name!r}; write for example 'e2m1' or 'uint4'"
        )
    _check(result, name)
    return result


def _check(format: Format, name: str) -> None:
    if not 1 <= format.bits <= _MAX_BITS or format.exponent_bits + format.mantissa_bits < 1:
        raise ValueError(f"format must have 1 to {_MAX_BITS} bits besides at least one value, got {name!r}")
    if format.exponent_bits > _MAX_EXPONENT_BITS:
        raise ValueError(
            f"format must have at most {_MAX_EXPONENT_BITS} exponent bits to fit float32, got {name!r}"
        )
    if format.specials and format.exponent_bits + format.mantissa_bits < 3:
        raise ValueError(f"format with specials must have at least 3 bits besides the sign, got {name!r}")
    if len(format.values) < 2:
        raise ValueError(
            f"format must have finite values besides zero, got {name!r}, all Inf or NaN; give it an exponent bit"
        )


@cache
def candidates(bits: int, signed: bool = True, *, integer_grids: bool = True) -> tuple[Format, ...]:
    """All floating-point formats of `bits` bits, from most exponent bits to fewest.

    Formats without an exponent field are left out, since ``e0mY`` is ``e1m(Y-1)`` with one bit fewer of range.

    Few bits leave few formats, and some of them are integers in all but name (`Format.uniform`):

    * 1 bit: ``ue1m0``, two values, which is ``uint1`` times two; no signed one.
    * 2 bits: ``e1m0``, the ternary grid {-2, 0, 2}; ``ue2m0`` = {0, 1, 2, 4} and ``ue1m1``, which is ``uint2``.
    * 3 bits: ``e2m0`` = {0, +-1, +-2, +-4} and ``e1m1``, which is ``int3`` without -4; ``ue3m0``, ``ue2m1`` and ``ue1m2``,
      which is half of ``uint3``.

    Args:
        bits: Width of a code, 1 to 8, of signed formats 2 to 8.
        signed: With a sign bit.
        integer_grids: Keep the formats whose grid is uniform (one exponent bit).
    """
    least = 1 + int(signed)
    if not least <= bits <= _MAX_BITS:
        kind = "signed" if signed else "unsigned"
        raise ValueError(
            f"bits of {kind} formats must be {least} to {_MAX_BITS}, got {bits}; choose another width"
        )
    free = bits - int(signed)
    lowest = 1 if integer_grids else 2
    exponents = range(min(free, _MAX_EXPONENT_BITS), lowest - 1, -1)
    return tuple(Format(signed, exponent, free - exponent) for exponent in exponents)
