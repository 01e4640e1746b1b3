"""The rules among which the weight of a layer gets one, by width: tables or integers, or what a kind of file holds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from difloat.methods.picture_budget import is_large
from difloat.methods.task import Task
from difloat.plan import file_offers
from difloat.plan.rules import MIN_MAX, Rule, asymmetric_integers, levels_or_integers
from difloat.plan.target import Target

WIDTHS = (2, 3, 4, 5, 6, 8)
Grid = Literal["table", "fit", "integer"]
REPLACED_LATER = replace(asymmetric_integers(2, "channel"), clips=MIN_MAX, zero_points=MIN_MAX)
"""The quickest and smallest rule, for weights that are rounded anew before anything multiplies them."""


@dataclass(frozen=True)
class WeightRules:
    """How the weights of a model may be stored.

    Attributes:
        grid: The grid of up to 4 bits, a "table" of levels, one that is "fit" to the layer, or an "integer" with a zero point.
        group_size: Input channels per scale. 0 takes one scale per output channel.
        target: A kind of file leaves what it holds. Other targets leave all.
        inputs: Whether layers round their inputs.
        rough: Whether a rough search of scales is enough (`Rule.rough`).
    """

    grid: Grid
    group_size: int = 0
    target: Target = "any"
    inputs: bool = False
    rough: bool = False

    @staticmethod
    def of_task(task: Task, grid: Grid, group_size: int, fitted_anew: bool) -> WeightRules:
        """The rules of a task. Scales that are fitted anew after rounding are searched roughly in large models."""
        rough = fitted_anew and is_large(task.model)
        return WeightRules(grid, group_size, task.target, task.bits.activation is not None, rough)

    def at(self, bits: int, shape: Sequence[int] = ()) -> Rule:
        """The rule of a width for a weight [o, i, *k]. A file gives the first of its formats that is wide enough."""
        if held := self._held(shape):
            return next(rule for rule in held if rule.formats[0].bits >= bits)
        make = asymmetric_integers if self.grid == "integer" else levels_or_integers
        rule = make(bits, "group" if self.group_size else "channel", self.group_size or None)
        return replace(rule, fitted=self.grid == "fit" and rule.formats[0].is_table, rough=self.rough)

    def offers(self, shape: Sequence[int]) -> list[Rule]:
        """The rules of all widths for a weight [o, i, *k], in ascending order."""
        return list(self._held(shape)) or [self.at(bits) for bits in WIDTHS]

    def _held(self, shape: Sequence[int]) -> tuple[Rule, ...]:
        return file_offers.offers(shape, self.inputs, self.target, self.grid != "integer")
