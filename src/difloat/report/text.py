"""Numbers as a reader wants them: shares, times, how much smaller."""

from __future__ import annotations

import math


def number_text(value: float | None) -> str:
    """A number with three digits, or a dash for None and NaN."""
    if value is None or math.isnan(value):
        return "–"
    if math.isinf(value):
        return "∞" if value > 0 else "-∞"
    return f"{value:.0f}" if value == 0 or abs(value) >= 100 else f"{value:#.3g}"


def db_text(value: float | None) -> str:
    """Decibels with one decimal. No error at all is ``exact``, and None and NaN are a dash."""
    if value is None or math.isnan(value):
        return "–"
    return f"{value:.1f}" if math.isfinite(value) else ("exact" if value < 0 else "∞")


def percent_text(share: float) -> str:
    """A share from 0 to 1 in percent. Small shares keep two digits."""
    if 0 < share < 0.0001:
        return "< 0.01 %"
    return f"{100 * share:.2g} %" if 0 < share < 0.1 else f"{100 * share:.0f} %"


def duration_text(seconds: float) -> str:
    """A time such as ``9.1 s``, ``2 min 13 s`` or ``3 h 5 min``."""
    if seconds < 60:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def sortable_text(value: float | None) -> str:
    """A number that the page's script can sort by. None and NaN are empty, which sorts last."""
    return "" if value is None or math.isnan(value) else f"{max(-1e300, min(1e300, value)):.9g}"


def size_text(original_bytes: float, packed_bytes: float, digits: int = 1) -> str:
    """The change of a size, such as ``3.9x smaller``, ``1.16x larger`` or ``the same size``.

    >>> size_text(16e6, 4.1e6), size_text(1e6, 1e6)
    ('3.9x smaller', 'the same size')

    Args:
        original_bytes: The size before.
        packed_bytes: The size after.
        digits: How many decimals are shown, or more where the ratio would read as 1.
    """
    ratio = original_bytes / max(packed_bytes, 1)
    word, times = ("smaller", ratio) if ratio >= 1 else ("larger", 1 / max(ratio, 1e-30))
    shown = next((n for n in (digits, 2, 3) if n >= digits and f"{times:.{n}f}" != f"{1:.{n}f}"), None)
    return "the same size" if shown is None else f"{times:.{shown}f}x {word}"
