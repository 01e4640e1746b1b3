"""Strict reading of the fields of a JSON object: every number, flag and text has its type and range, or one sentence says so.

JSON that was damaged or written by hand may hold ``true`` where a number belongs, ``1e400`` (which Python reads as infinity) or
integers of a thousand digits. Python takes ``True`` for 1 and ``int("7")`` for 7. Nothing here converts.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any

LARGEST = (
    2**40
)  # no size in a plan is larger: no layer has more values, and products of two still fit 64 bits twice over
MOST_ENTRIES = 1 << 20  # of a list


def json_object(
    value: Any, what: str, needed: Collection[str], optional: Collection[str] = ()
) -> Mapping[str, Any]:
    """The object itself, if it has all `needed` fields and no others than `optional` ones.

    Raises:
        ValueError: if the value is no object with these fields.
    """
    names = set(value) if isinstance(value, Mapping) else set()
    if not isinstance(value, Mapping) or not set(needed) <= names <= {*needed, *optional}:
        got = sorted(map(str, value)) if isinstance(value, Mapping) else value
        wanted = [", ".join(sorted(needed))] if needed else []
        wanted += ["perhaps " + ", ".join(sorted(optional))] if optional else []
        raise ValueError(
            f"{what} must have the fields {' and '.join(wanted)} and no others, got {shown(got)}"
        )
    return value


def whole_number(value: Any, what: str, least: int = 1, most: int = LARGEST) -> int:
    """A whole number from `least` to `most`.

    >>> whole_number(7, "size")
    7

    Raises:
        ValueError: if the value is anything else, such as 2.0 or a flag.
    """
    if type(value) is not int or not least <= value <= most:
        raise ValueError(f"{what} must be a whole number from {least} to {most}, got {shown(value)}")
    return value


def finite_number(value: Any, what: str) -> float:
    """A finite number as a float.

    Raises:
        ValueError: if the value is anything else, such as a flag.
    """
    if type(value) not in (int, float) or not abs(value) <= 1e300 or not math.isfinite(value):
        raise ValueError(f"{what} must be a finite number, got {shown(value)}")
    return float(value)


def flag(value: Any, what: str) -> bool:
    """True or False.

    Raises:
        ValueError: if the value is anything else, such as 0 or 1.
    """
    if type(value) is not bool:
        raise ValueError(f"{what} must be true or false, got {shown(value)}")
    return value


def text(value: Any, what: str) -> str:
    """A string.

    Raises:
        ValueError: if the value is anything else.
    """
    if type(value) is not str:
        raise ValueError(f"{what} must be text, got {shown(value)}")
    return value


def entries(value: Any, what: str) -> list[Any] | tuple[Any, ...]:
    """A list or tuple of at most `MOST_ENTRIES` entries.

    Raises:
        ValueError: if the value is anything else.
    """
    if not isinstance(value, list | tuple) or len(value) > MOST_ENTRIES:
        raise ValueError(f"{what} must be a list of at most {MOST_ENTRIES} entries, got {shown(value)}")
    return value


def shown(value: Any) -> str:
    """A value as an error shows it, in at most 80 characters. A long number, which Python does not write out, is its length."""
    if type(value) is int and value.bit_length() > 200:
        return f"a whole number of {value.bit_length()} bits"
    if isinstance(value, Mapping | list | tuple) and len(value) > 16:
        return f"{type(value).__name__} of {len(value)} entries"
    try:
        return f"{value!r:.80}"
    except ValueError:  # a long number somewhere inside
        return f"{type(value).__name__} with a number of thousands of digits"
