"""Formats whose values are small integers: what int8 products need to know of them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from difloat.numbers.formats import Format


@dataclass(frozen=True)
class Grid:
    """A format as int8: ``operand = value * multiplier - shift``."""

    multiplier: int
    shift: int


@cache
def grid_of(format: Format) -> Grid | None:
    """How `format` becomes int8, or None if it does not."""
    multiplier = format.int8_multiplier()
    if multiplier is None:
        return None
    return Grid(multiplier, 128 if format.max * multiplier > 127 else 0)
