"""Tables, which are number formats of 2 to 16 int8 levels: their names, and where their levels come from.

``iq4nl`` has the levels of GGUF's IQ4_NL (`kvalues` of the gguf package). ``t4g``, ``t3g`` and ``t2g`` are Lloyd-Max quantizers
of a normal variable, found by Lloyd's iteration. Any other table is named by its levels.
"""

from __future__ import annotations

import math
import re
from functools import cache
from itertools import pairwise

_IQ4NL = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
# Magnitudes of the 16 levels, in units of the largest element of a group of normal numbers.
_T4G = (0.055, 0.157, 0.268, 0.386, 0.512, 0.654, 0.811, 1.0)
_NORMAL = {"t3g": 8, "t2g": 4}  # levels
_LARGEST = 63  # the span of 126 fits the 16-bit pair sums of AVX2
_TABLE = re.compile(r"table\((-?\d{1,3}(?:,-?\d{1,3})*)\)")


@cache
def named() -> dict[str, tuple[int, ...]]:
    """The levels of every table with a short name.

    >>> sorted(named()), named()["t2g"]
    (['iq4nl', 't2g', 't3g', 't4g'], (-63, -19, 19, 63))
    """
    upper = tuple(round(_LARGEST * magnitude) for magnitude in _T4G)
    found = {"iq4nl": _IQ4NL, "t4g": (*(-level for level in reversed(upper)), *upper)}
    for name, count in _NORMAL.items():
        levels = lloyd_max(count)
        found[name] = tuple(round(_LARGEST * level / levels[-1]) for level in levels)
    return found


def lloyd_max(count: int) -> tuple[float, ...]:
    """The `count` levels of least squared error for a standard normal variable, in ascending order (Lloyd 1982).

    Every level is the mean of the variable between the midpoints to its neighbours.

    >>> [round(level, 3) for level in lloyd_max(2)]
    [-0.798, 0.798]
    """
    levels = [4.0 * (j + 0.5) / count - 2.0 for j in range(count)]
    for _ in range(2000):
        borders = [-math.inf, *((a + b) / 2 for a, b in pairwise(levels)), math.inf]
        # The mean of a normal variable between a and b is the difference of densities over that of probabilities.
        levels = [(_density(a) - _density(b)) / (_below(b) - _below(a)) for a, b in pairwise(borders)]
    # The iteration leaves a rounding of asymmetry, which the mean with the mirrored levels removes.
    return tuple((a - b) / 2 for a, b in zip(levels, reversed(levels), strict=True))


def of_normal(count: int) -> tuple[int, ...]:
    """The levels of `lloyd_max` as whole numbers, the largest of them 127.

    >>> of_normal(4)
    (-127, -38, 38, 127)
    """
    levels = lloyd_max(count)
    return tuple(round(127 * level / levels[-1]) for level in levels)


def _density(x: float) -> float:
    return math.exp(-x * x / 2) / math.sqrt(2 * math.pi)


def _below(x: float) -> float:
    return (1 + math.erf(x / math.sqrt(2))) / 2


def name_of(levels: tuple[int, ...]) -> str:
    """The one name of a table, which is its short name or else ``table(...)`` with its levels and no spaces.

    >>> name_of((-2, -1, 1, 2))
    'table(-2,-1,1,2)'
    """
    short = {known: name for name, known in named().items()}
    return short.get(levels) or f"table({','.join(map(str, levels))})"


def levels_of(text: str) -> tuple[int, ...] | None:
    """The levels that a lower-case name stands for, or None if it names no table.

    >>> levels_of("table(-2,-1,1,2)"), levels_of("e2m1")
    ((-2, -1, 1, 2), None)

    Raises:
        ValueError: if the name is written as a table, but no table may have these levels.
    """
    if text in named():
        return named()[text]
    if not text.startswith("table("):
        return None
    match = _TABLE.fullmatch(text.replace(" ", ""))
    levels = tuple(map(int, match.group(1).split(","))) if match else ()
    ascending = all(a < b for a, b in pairwise(levels))
    if not (2 <= len(levels) <= 16 and ascending and -128 <= levels[0] < 0 < levels[-1] <= 127):
        raise ValueError(
            f"table must have 2 to 16 ascending levels of -128 to 127 on both sides of 0, got {text!r}; "
            "write for example 'table(-127,-40,30,113)'"
        )
    return levels
