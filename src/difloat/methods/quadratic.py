"""Rounding of weights as a quadratic problem: columns [groups, columns, rows], moments, and the rows that share scales.

A column is one step of second-order rounding, and rows go together, those of several weights that read the same input as well.
Groups are those of a convolution. If moments know channels only, every tap of a convolution makes rows of its own, which share
the scales of their output channel. Margins write g for groups, n for columns, r for rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from difloat.numbers import lookup
from difloat.numbers.formats import Format
from difloat.numbers.scale_grids import ScaleFormat, Snap, snap_zero_points, snapping
from difloat.plan.rules import Draft

_PIECE = 32  # columns rounded at a time
_TILE = 512  # columns of a product of which one half is left out


@dataclass(frozen=True)
class Grid:
    """What a stretch of rows is rounded to in a run of columns.

    `snap` moves scales to the grid that they must lie on, and zero points lie on `zero_format`.
    """

    format: Format
    shifted: bool
    snap: Snap | None = None
    zero_format: ScaleFormat = "float32"

    def stored(self, step: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
        """Scales and zero points as they can be stored, near the ones given."""
        step, shift = step.float(), shift.float()
        if self.snap is not None:
            step = step.sign() * self.snap(step.abs(), self.format)
        return step, snap_zero_points(shift, self.zero_format)


@dataclass(frozen=True)
class Unit:
    """A run of columns that share scales, which is one part or one group of it, with the grid of every weight."""

    start: int
    stop: int
    grids: tuple[Grid, ...]


@dataclass(frozen=True)
class Problem:
    """The problem of rounding weights that read the same input.

    Attributes:
        target: The float weights [g, n, r], one after the other along the rows, which are zero for dead inputs.
        moments: The mean of ``x x^T``, [g, n, n], with a diagonal of 1 for dead inputs.
        owner: int64 [g, r], the number of the scales that a row has.
        rows: How many rows of a group every weight has.
        owned: How many different scales every weight has.
        units: The runs of columns that share scales.
    """

    target: Tensor
    moments: Tensor
    owner: Tensor
    rows: tuple[int, ...]
    owned: tuple[int, ...]
    units: tuple[Unit, ...]

    @property
    def owners(self) -> int:
        """How many different scales there are."""
        return sum(self.owned)

    def per_owner(self, of_rows: Tensor) -> Tensor:
        """Sums [owners] over the rows [g, r] that share scales, in float64."""
        zeros = of_rows.new_zeros(self.owners, dtype=torch.float64)
        return zeros.index_add(0, self.owner.flatten(), of_rows.flatten().double())

    def row_error(self, values: Tensor) -> Tensor:
        """``e H e^T`` of every row, [g, r]."""
        change = values - self.target  # [g, n, r]
        error = change.new_zeros(self.owner.shape)
        # H is symmetric, so products of the columns after those of a tile count twice, and those before it not at all.
        for start in range(0, change.shape[1], _TILE):
            own = slice(start, start + _TILE)
            product = self.moments[:, own, own] @ change[:, own]
            if own.stop < change.shape[1]:
                product.baddbmm_(self.moments[:, own, own.stop :], change[:, own.stop :], alpha=2)
            error += product.mul_(change[:, own]).sum(1)
        return error


@dataclass(frozen=True)
class Solution:
    """A solution: the levels [g, n, r], which are values of the format, and the steps and shifts [units, owners]."""

    levels: Tensor
    steps: Tensor
    shifts: Tensor

    def values(self, problem: Problem) -> Tensor:
        """The weights [g, n, r] that the levels stand for."""
        out = torch.empty_like(self.levels)
        for number, unit in enumerate(problem.units):
            step, shift = (of[number][problem.owner][:, None] for of in (self.steps, self.shifts))
            out[:, unit.start : unit.stop] = self.levels[:, unit.start : unit.stop] * step + shift
        return out


def problem_of(drafts: Sequence[Draft], moments: Tensor) -> Problem:
    """Lay out weights and the moments of their input.

    Args:
        drafts: Weights, formats, scales and zero points.
        moments: The mean of ``x x^T`` as `second_order.round_second_order` takes it.

    Raises:
        ValueError: if moments do not fit a weight or are not finite, parts have scales of several granularities, or scales
            belong to other columns in one weight than in another.
    """
    stacked = moments if moments.dim() == 3 else moments[None]
    groups, columns = stacked.shape[:2]
    diagonal = stacked.diagonal(dim1=1, dim2=2)  # [g, n]
    targets, owners, units = [], [], []
    owned: list[int] = []
    for draft in drafts:
        out_channels, channels = draft.weight.shape[:2]
        taps = draft.weight[0, 0].numel()
        wanted = {channels, channels * taps}
        if columns not in wanted or stacked.shape[2] != columns or out_channels % groups:
            raise ValueError(
                f"moments must be [n, n] or [groups, n, n] with n in {sorted(wanted)} for a weight "
                f"{list(draft.weight.shape)}, got {list(moments.shape)}; gather them from this layer's inputs"
            )
        own = 1 if columns == channels * taps else taps  # rows per output channel
        owners.append(_owners(draft, own).view(groups, -1) + sum(owned))
        owned.append(int(owners[-1].max()) + 1 - sum(owned))
        targets.append(_columns_of(draft.weight.detach().to(stacked.device, stacked.dtype), groups, own))
        units.append(_units(draft, taps // own))
    # The sum shows what is not finite in one reading of the matrix, and is finite for any that are of use.
    if not stacked.sum().isfinite() or bool((diagonal < 0).any()):
        raise ValueError(
            "moments must be finite and their diagonal not negative, got others; look for NaN in the inputs"
        )
    return Problem(
        # A weight of an input that is always 0 changes nothing, and 0 is on every grid with a zero.
        torch.cat(targets, 2).masked_fill_((diagonal == 0)[:, :, None], 0.0),
        alive(stacked),
        torch.cat(owners, 1).to(stacked.device),
        tuple(target.shape[2] for target in targets),
        tuple(owned),
        _joined(units),
    )


def _owners(draft: Draft, own: int) -> Tensor:
    """The number of the scales of every row, of which an output channel has `own`, int64 [o * own]."""
    if len({part.weight.granularity for part in draft.parts}) > 1:
        raise ValueError("all parts of a layer must have weight scales of one granularity, got several")
    channels = len(draft.weight)
    per_tensor = draft.parts[0].weight.granularity == "tensor"
    numbers = torch.zeros(channels, dtype=torch.int64) if per_tensor else torch.arange(channels)
    return numbers.repeat_interleave(own)


def alive(moments: Tensor) -> Tensor:
    """Moments [g, n, n] with a diagonal of 1 for dead inputs."""
    dead = moments.diagonal(dim1=1, dim2=2) == 0
    return moments + torch.diag_embed(dead.to(moments.dtype)) if dead.any() else moments


def _columns_of(weight: Tensor, groups: int, own: int) -> Tensor:
    """The weight [o, i, *k] as columns [g, n, r], with `own` rows per output channel."""
    rows = weight.flatten(1) if own == 1 else weight.flatten(2).transpose(1, 2).flatten(0, 1)
    return rows.unflatten(0, (groups, -1)).transpose(1, 2)


def weight_of(columns: Tensor, shape: Sequence[int]) -> Tensor:
    """The weight [o, i, *k] of columns that `_columns_of` made."""
    rows = columns.transpose(1, 2).flatten(0, 1)  # [g * r, n]
    if len(rows) == shape[0]:
        return rows.reshape(shape)
    return rows.unflatten(0, (shape[0], -1)).transpose(1, 2).reshape(shape)


def _units(draft: Draft, width: int) -> list[tuple[int, int, Grid]]:
    """The runs of columns of one weight that share scales: first column, last one, and the grid."""
    units, at = [], 0
    for part in draft.parts:
        size = part.weight.group_size or part.channels
        edges = [*range(at, at + part.channels, size), at + part.channels]
        snap = snapping(draft.weight.detach()[:, at : at + part.channels], draft.scale_format)
        grid = Grid(part.weight.format, part.weight.zero_point, snap, draft.scale_format)
        units += [(a * width, b * width, grid) for a, b in pairwise(edges)]
        at += part.channels
    return units


def _joined(units: Sequence[Sequence[tuple[int, int, Grid]]]) -> tuple[Unit, ...]:
    if any([one[:2] for one in own] != [one[:2] for one in units[0]] for own in units):
        raise ValueError(
            "weights that are rounded together must have scales for the same columns, got parts or groups of several sizes"
        )
    shared = ((*same[0][:2], tuple(grid for _, _, grid in same)) for same in zip(*units, strict=True))
    return tuple(Unit(start, stop, grids) for start, stop, grids in shared)


def scales_of(drafts: Sequence[Draft], problem: Problem) -> tuple[Tensor, Tensor]:
    """Steps and shifts [units, owners] of the drafts' scales and zero points."""
    steps, shifts = [], []
    for draft, owned in zip(drafts, problem.owned, strict=True):
        own = [scale.reshape(owned, -1).T for scale in draft.scales]
        zeros = [
            zero.reshape(owned, -1).T if part.weight.zero_point else torch.zeros_like(scale)
            for part, scale, zero in zip(draft.parts, own, draft.zero_points, strict=True)
        ]
        steps.append(torch.cat(own))
        shifts.append(torch.cat(zeros))
    return torch.cat(steps, 1).to(problem.target), torch.cat(shifts, 1).to(problem.target)


def rounders(problem: Problem) -> list[Callable[[Tensor], Tensor]]:
    """How the numbers [..., r] of all rows are rounded in every unit."""
    formats = [tuple(grid.format for grid in unit.grids) for unit in problem.units]
    made = {one: lookup.rounder(one, problem.rows, problem.target) for one in set(formats)}
    return [made[one] for one in formats]


def nearest(problem: Problem, steps: Tensor, shifts: Tensor) -> Solution:
    """The solution with every weight at the grid value nearest to it, on the scales given."""
    levels = torch.empty_like(problem.target)
    for number, (unit, round_) in enumerate(zip(problem.units, rounders(problem), strict=True)):
        step, shift = (of[number][problem.owner][:, None] for of in (steps, shifts))  # [g, 1, r]
        for start in range(unit.start, unit.stop, _PIECE):  # what is in between stays in the cache
            columns = slice(start, min(start + _PIECE, unit.stop))
            levels[:, columns] = round_(problem.target[:, columns].sub(shift).div_(step))
    return Solution(levels, steps, shifts)


def unit_of(problem: Problem) -> Tensor:
    """The unit of every column, int64 [n]."""
    widths = torch.tensor([unit.stop - unit.start for unit in problem.units])
    return torch.arange(len(problem.units)).repeat_interleave(widths).to(problem.target.device)
