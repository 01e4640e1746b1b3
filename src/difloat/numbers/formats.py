"""Number formats: which numbers exist.

A format is one small record. Its values, its largest number, its codes and what hardware can do with it are derived.

>>> e2m1 = parse("e2m1")
>>> e2m1.bits, e2m1.max
(4, 6.0)
>>> e2m1.values[-4:]
(2.0, 3.0, 4.0, 6.0)

``eXmY`` has a sign bit, X exponent bits and Y mantissa bits. ``ueXmY`` has no sign bit. ``intN`` is two's complement and
``uintN`` is unsigned. Every code of these formats is a finite number, as the quantization papers use them, so the maximum of
``e4m3`` is 480. Two suffixes name the hardware variants, which spend codes on special values. With ``fn`` the all-ones code
is NaN, as in ``e4m3fn``. With ``ieee`` the top exponent holds Inf and NaN, as in ``e5m2ieee``.

The exponent bias is ``2**(X - 1) - 1``. A paper's own bias, a clip value and a scale are one degree of freedom, which lives in
the scale of the quantizer and not in the format.

A *table* is a format of 2 to 16 int8 levels. Its levels are its name (``table(-127,-40,30,113)``), or it has a short name
(`tables`).
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
    """The numbers that one code of `bits` bits can mean.

    A code holds, from its highest bit down, the sign, the exponent and the mantissa. Integers are two's complement.

    >>> Format(signed=True, exponent_bits=2, mantissa_bits=1).name
    'e2m1'
    >>> parse("e2m1").decode_table[:8]
    (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)

    Attributes:
        signed: Whether the highest bit of a code is the sign.
        exponent_bits: Width of the exponent field, which integer formats do not have.
        mantissa_bits: Width of the mantissa field. Integer formats keep all bits but the sign here.
        integer: Whether codes are integers instead of floating-point numbers.
        specials: Which codes are not finite numbers, as the suffix of the name says.
        levels: The values of a table in ascending order. Code j means ``levels[j]``, and codes beyond the last level mean it.
    """

    signed: bool
    exponent_bits: int
    mantissa_bits: int
    integer: bool = False
    specials: Literal["", "fn", "ieee"] = ""
    levels: tuple[int, ...] = ()

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
        """Exponent bias, which is 0 for formats without an exponent field."""
        return 2 ** (self.exponent_bits - 1) - 1 if self.exponent_bits else 0

    @property
    def min_exponent(self) -> int:
        """Exponent of the smallest normal number, which subnormal numbers share. A uniform grid has no other exponent."""
        return self.mantissa_bits if self.integer else 1 - self.bias

    @property
    def step(self) -> float:
        """Distance between 0 and the smallest positive value. For a table it is the least distance of two levels."""
        if self.levels:
            return float(min(b - a for a, b in zip(self.levels, self.levels[1:], strict=False)))
        return math.ldexp(1.0, self.min_exponent - self.mantissa_bits)

    @cached_property
    def decode_table(self) -> tuple[float, ...]:
        """The value of every code, in code order. Only the hardware variants have NaN and Inf among them."""
        if self.levels:
            return tuple(float(self.levels[min(c, len(self.levels) - 1)]) for c in range(2**self.bits))
        return tuple(self._decode(code) for code in range(2**self.bits))

    @property
    def is_table(self) -> bool:
        """Whether the values are the levels of a table."""
        return bool(self.levels)

    @property
    def level_words(self) -> tuple[int, ...]:
        """The levels of a table as bytes of four signed 32-bit words, code by code, for look-ups by shifting."""
        every = [int(self.decode_table[code % len(self.decode_table)]) & 0xFF for code in range(16)]
        words = [sum(byte << 8 * n for n, byte in enumerate(every[at : at + 4])) for at in range(0, 16, 4)]
        return tuple(word - 2**32 if word >= 2**31 else word for word in words)

    def _decode(self, code: int) -> float:
        if self.integer:
            # Two's complement: the highest bit weighs minus what it weighs without a sign.
            return float(code - 2**self.bits if self.signed and code >> (self.bits - 1) else code)
        mantissa = code & (2**self.mantissa_bits - 1)
        exponent = (code >> self.mantissa_bits) & (2**self.exponent_bits - 1)
        sign = -1.0 if self.signed and code >> (self.bits - 1) else 1.0
        top = exponent == 2**self.exponent_bits - 1
        if self.specials == "ieee" and top:
            return math.nan if mantissa else sign * math.inf
        if self.specials == "fn" and top and mantissa == 2**self.mantissa_bits - 1:
            return math.nan
        # Subnormal numbers have no hidden bit: they are multiples of the step.
        if exponent == 0:
            return sign * mantissa * self.step
        fraction = 1 + math.ldexp(mantissa, -self.mantissa_bits)
        return sign * math.ldexp(fraction, exponent - self.bias)

    @cached_property
    def values(self) -> tuple[float, ...]:
        """The finite values in ascending order, each once. Negative zero counts as zero."""
        return tuple(sorted({v + 0.0 for v in self.decode_table if math.isfinite(v)}))

    @property
    def max(self) -> float:
        """Largest finite value."""
        return self.values[-1]

    @property
    def min(self) -> float:
        """Smallest finite value, which is ``-max`` or 0, or one step below ``-max`` for two's complement."""
        return self.values[0]

    @property
    def uniform(self) -> bool:
        """Whether the values are evenly spaced, as those of `e1m2` and `ue1m3` are: integer formats in all but name."""
        return self.exponent_bits <= 1 and not self.levels

    @property
    def symmetric(self) -> bool:
        """Whether the negative of every value is a value."""
        return self.values == tuple(-value + 0.0 for value in reversed(self.values))

    def mirrored(self) -> Format:
        """The table of the negated levels. Multiplied by a scale it is this table multiplied by the negated scale."""
        return table(tuple(-level for level in reversed(self.levels)))

    def int8_multiplier(self) -> int | None:
        """Smallest power of two that turns every value into an integer of 8 bits, or None if there is none.

        Signed formats become int8 and unsigned ones uint8. An int8 dot product of such integers is exact.

        >>> parse("e2m1").int8_multiplier(), parse("e4m3").int8_multiplier()
        (2, None)
        """
        if self.specials:
            return None
        if self.levels:
            return 1
        multiplier = max(1, round(1 / self.step)) if self.step <= 1 else 1
        low, high = (-128, 127) if self.signed else (0, 255)
        # A larger power of two would only make the integers wider, so the smallest one decides.
        fits = all(v * multiplier == int(v * multiplier) for v in self.values)
        return multiplier if fits and self.min * multiplier >= low and self.max * multiplier <= high else None

    def embeds_in_e4m3(self) -> bool:
        """Whether a bit shift turns every code into one of `e4m3`, up to a constant power of two.

        Hardware's e4m3 (`e4m3fn`) has a NaN where the all-finite `e4m3` has 480. So `e4m3` itself is the only one of these
        formats that FP8 tensor cores do not hold exactly.
        """
        return (
            not self.integer
            and 1 <= self.exponent_bits <= 4
            and self.mantissa_bits <= 3
            and self.specials != "ieee"
        )


def table(levels: tuple[int, ...]) -> Format:
    """The table of these ascending levels, which are not checked. `parse` checks the names that users write.

    >>> table((-2, -1, 1, 2)).values
    (-2.0, -1.0, 1.0, 2.0)
    """
    return Format(True, 0, (len(levels) - 1).bit_length() - 1, levels=levels)


@cache
def parse(name: str) -> Format:
    """The format of a name such as ``e2m1``, ``ue3m1``, ``e4m3fn``, ``e5m2ieee``, ``int4``, ``uint8`` or ``iq4nl``.

    >>> parse("int4").values[0], parse("uint4").max
    (-8.0, 15.0)
    >>> parse("table(-127,-40,30,113)").bits
    2

    Args:
        name: Name of a floating-point or integer format of 1 to 8 bits, or of a table. Case does not matter.

    Raises:
        ValueError: if no format has this name.
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

    >>> [format.name for format in candidates(4)]
    ['e3m0', 'e2m1', 'e1m2']

    Formats without an exponent field are left out, since ``e0mY`` is ``e1m(Y-1)`` with one bit fewer of range.
    Few bits leave few formats, and some of them are integers in all but name (`Format.uniform`):

    * 1 bit: ``ue1m0``, two values, which is ``uint1`` times two; no signed one.
    * 2 bits: ``e1m0``, the ternary grid {-2, 0, 2}; ``ue2m0`` = {0, 1, 2, 4} and ``ue1m1``, which is ``uint2``.
    * 3 bits: ``e2m0`` = {0, +-1, +-2, +-4} and ``e1m1``, which is ``int3`` without -4; ``ue3m0``, ``ue2m1`` and ``ue1m2``,
      which is half of ``uint3``.

    Args:
        bits: Width of a code, from 1 to 8. Signed formats have at least 2 bits.
        signed: Whether the formats have a sign bit.
        integer_grids: Whether formats with one exponent bit, whose grid is uniform, are among the result.

    Raises:
        ValueError: if no format has this width.
    """
    least = 1 + int(signed)
    if not least <= bits <= _MAX_BITS:
        kind = "signed" if signed else "unsigned"
        raise ValueError(
            f"bits of {kind} formats must be {least} to {_MAX_BITS}, got {bits}; choose another width"
        )
    # With 8 exponent bits the largest value would be no float32, and with 1 the grid is uniform.
    free = bits - int(signed)
    lowest = 1 if integer_grids else 2
    exponents = range(min(free, _MAX_EXPONENT_BITS), lowest - 1, -1)
    return tuple(Format(signed, exponent, free - exponent) for exponent in exponents)
