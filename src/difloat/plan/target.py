"""The formats that a kind of machine computes exactly and fast, to which ``--target`` restricts a recipe's candidates."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from difloat.numbers.formats import Format, candidates
from difloat.numbers.integer_grids import grid_of
from difloat.plan.rules import Rule

Target = Literal["any", "cpu"]


def fits(format: Format, target: Target) -> bool:
    """Whether a target takes a format, which on a CPU means that its values become int8."""
    return target == "any" or grid_of(format) is not None


def restrict(rule: Rule, target: Target) -> Rule:
    """The rule with the formats that fit a target.

    Where none of them fits, all floating-point formats of the same width that do take their place. For example, `e4m3` gives
    way to `e1m6`, which has 8 bits as well.
    """
    kept = tuple(format for format in rule.formats if fits(format, target))
    if not kept:
        first = rule.formats[0]
        kept = tuple(f for f in candidates(first.bits, first.signed) if fits(f, target))
    return rule if kept == rule.formats else replace(rule, formats=kept)
