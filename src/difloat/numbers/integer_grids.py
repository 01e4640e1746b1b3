"""Formats whose values are small integers, and how these become int8 operands of a product."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from difloat.numbers.formats import Format


@dataclass(frozen=True)
class Grid:
    """How the values of a format become int8: ``operand = value * multiplier - shift``.

    Attributes:
        multiplier: The power of two that makes every value an integer.
        shift: 128 for unsigned formats whose integers reach beyond 127, else 0.
    """

    multiplier: int
    shift: int


@cache
def grid_of(format: Format) -> Grid | None:
    """How a format becomes int8, or None if its values are no integers of 8 bits.

    >>> from difloat import formats
    >>> grid_of(formats.parse("e2m1")), grid_of(formats.parse("uint8"))
    (Grid(multiplier=2, shift=0), Grid(multiplier=1, shift=128))
    """
    multiplier = format.int8_multiplier()
    if multiplier is None:
        return None
    # Moved by 128, the integers 0 to 255 of an unsigned format are int8.
    return Grid(multiplier, 128 if format.max * multiplier > 127 else 0)
