"""Inputs on signed or unsigned grids, whichever suits them: mixup-sign quantization (arXiv:2505.21591)."""

from __future__ import annotations

from dataclasses import replace

from difloat.numbers.formats import Format
from difloat.numbers.search import CLIPS, ZERO_POINTS
from difloat.plan.rules import Rule

HALF = 0.5  # as lopsided as that, an input may take unsigned formats
NARROW_SIGNED = tuple(0.8 + 0.05 * n for n in range(25))  # third-party: 0.8 to 2.0
NARROW_UNSIGNED = tuple(0.05 + 0.95 / 24 * n for n in range(25))  # third-party: 0.05 to 1.0
NARROW_ZEROS = tuple(n / 6 for n in range(7))


def input_rule(signed: tuple[Format, ...], unsigned: tuple[Format, ...], *, narrow: bool) -> Rule:
    """The rule for an input: a signed format, or for a lopsided one an unsigned format with a zero point.

    Args:
        signed: The candidates for every input.
        unsigned: The candidates for lopsided inputs. Without any these take signed formats as well.
        narrow: Whether to search the ranges of a third-party re-implementation instead of wider ones.
    """
    rule = Rule(signed, clips=NARROW_SIGNED if narrow else CLIPS)
    if not unsigned:
        return rule
    return replace(
        rule,
        formats=(*signed, *unsigned),
        zero_points=NARROW_ZEROS if narrow else ZERO_POINTS,
        unsigned_clips=NARROW_UNSIGNED if narrow else None,
        asymmetry=HALF,
    )
