"""Rounding of a weight as a quadratic problem: columns [groups, columns, rows], moments, and the rows that share scales.

A column is one step of second-order rounding, and rows go together. Groups are those of a convolution. If moments know channels
only, every tap of a convolution makes rows of its own, which share the scales of their output channel. Margins write g for
groups, n for columns, r for rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from difloat.numbers import rounding
from difloat.numbers.formats import Format
from difloat.numbers.scale_grids import ScaleFormat, Snap, snap_zero_points, snapping
from difloat.plan.rules import Draft


@dataclass(frozen=True)
class Unit:
    """A run of columns that share scales, which is one part or one group of it.

    `snap` moves scales to the grid that they must lie on, and zero points lie on `zero_format`.
    """

    start: int
    stop: int
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
class Problem:
    """The problem of rounding one weight.

    Attributes:
        target: The float weight [g, n, r], which is zero for dead inputs.
        moments: The mean of ``x x^T``, [g, n, n], with a diagonal of 1 for dead inputs.
        owner: int64 [g, r], the number of the scales that a row has.
        owners: How many different numbers those are.
        units: The runs of columns that share scales.
    """

    target: Tensor
    moments: Tensor
    owner: Tensor
    owners: int
    units: tuple[Unit, ...]

    def per_owner(self, of_rows: Tensor) -> Tensor:
        """Sums [owners] over the rows [g, r] that share scales, in float64."""
        zeros = of_rows.new_zeros(self.owners, dtype=torch.float64)
        return zeros.index_add(0, self.owner.flatten(), of_rows.flatten().double())

    def row_error(self, values: Tensor) -> Tensor:
        """``e H e^T`` of every row, [g, r]."""
        change = values - self.target  # [g, n, r]
        return (change * (self.moments @ change)).sum(1)


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


def problem_of(draft: Draft, moments: Tensor) -> Problem:
    """Lay out a weight and the moments of its inputs.

    Args:
        draft: Weight, formats, scales and zero points.
        moments: The mean of ``x x^T`` as `second_order.round_second_order` takes it.

    Raises:
        ValueError: if moments do not fit the weight or are not finite, or parts have scales of several granularities.
    """
    weight = draft.weight.detach()
    out_channels, channels = weight.shape[:2]
    taps = weight[0, 0].numel()
    stacked = moments if moments.dim() == 3 else moments[None]
    groups, columns = stacked.shape[:2]
    wanted = {channels, channels * taps}
    if columns not in wanted or stacked.shape[2] != columns or out_channels % groups:
        raise ValueError(
            f"moments must be [n, n] or [groups, n, n] with n in {sorted(wanted)} for a weight {list(weight.shape)}, got "
            f"{list(moments.shape)}; gather them from this layer's inputs"
        )
    diagonal = stacked.diagonal(dim1=1, dim2=2)  # [g, n]
    # The sum shows what is not finite in one reading of the matrix, and is finite for any that are of use.
    if not stacked.sum(dtype=torch.float64).isfinite() or bool((diagonal < 0).any()):
        raise ValueError(
            "moments must be finite and their diagonal not negative, got others; look for NaN in the inputs"
        )
    if len({part.weight.granularity for part in draft.parts}) > 1:
        raise ValueError("all parts of a layer must have weight scales of one granularity, got several")
    own = 1 if columns == channels * taps else taps  # rows per output channel
    per_tensor = draft.parts[0].weight.granularity == "tensor"
    owner = torch.zeros(out_channels, dtype=torch.int64) if per_tensor else torch.arange(out_channels)
    target = _columns_of(weight.to(stacked.device, stacked.dtype), groups, own)
    return Problem(
        # A weight of an input that is always 0 changes nothing, and 0 is on every grid with a zero.
        target.masked_fill((diagonal == 0)[:, :, None], 0.0),
        alive(stacked),
        owner.repeat_interleave(own).view(groups, -1).to(stacked.device),
        1 if per_tensor else out_channels,
        tuple(_units(draft, taps // own)),
    )


def alive(moments: Tensor) -> Tensor:
    """Moments [g, n, n] with a diagonal of 1 for dead inputs."""
    dead = moments.diagonal(dim1=1, dim2=2) == 0
    return moments + torch.diag_embed(dead.to(moments.dtype)) if dead.any() else moments


def _columns_of(weight: Tensor, groups: int, own: int) -> Tensor:
    """The weight [o, i, *k] as columns [g, n, r], with `own` rows per output channel."""
    rows = weight.flatten(1) if own == 1 else weight.flatten(2).transpose(1, 2).flatten(0, 1)
    return rows.unflatten(0, (groups, -1)).transpose(1, 2).contiguous()


def weight_of(columns: Tensor, shape: Sequence[int]) -> Tensor:
    """The weight [o, i, *k] of columns that `_columns_of` made."""
    rows = columns.transpose(1, 2).flatten(0, 1)  # [g * r, n]
    if len(rows) == shape[0]:
        return rows.reshape(shape)
    return rows.unflatten(0, (shape[0], -1)).transpose(1, 2).reshape(shape)


def _units(draft: Draft, width: int) -> list[Unit]:
    units, at = [], 0
    for part in draft.parts:
        size = part.weight.group_size or part.channels
        edges = [*range(at, at + part.channels, size), at + part.channels]
        piece = draft.weight.detach()[:, at : at + part.channels]
        snap = snapping(piece, draft.scale_format)
        shared = (part.weight.format, part.weight.zero_point, snap, draft.scale_format)
        units += [Unit(a * width, b * width, *shared) for a, b in pairwise(edges)]
        at += part.channels
    return units


def scales_of(draft: Draft, problem: Problem) -> tuple[Tensor, Tensor]:
    """Steps and shifts [units, owners] of the draft's scales and zero points."""
    steps, shifts = [], []
    for part, scale, zero in zip(draft.parts, draft.scales, draft.zero_points, strict=True):
        steps.append(scale.reshape(problem.owners, -1).T)
        shifts.append(
            zero.reshape(problem.owners, -1).T if part.weight.zero_point else torch.zeros_like(steps[-1])
        )
    return torch.cat(steps).to(problem.target), torch.cat(shifts).to(problem.target)


def round_levels(values: Tensor, step: Tensor, shift: Tensor, format: Format) -> Tensor:
    """The nearest values of a format under steps and shifts that broadcast with the values."""
    return rounding.round_(((values - shift) / step).contiguous(), format)


def rounder(format: Format, like: Tensor) -> Callable[[Tensor], Tensor]:
    """`rounding.round_` of finite numbers of the dtype and device of `like`, for many small tensors.

    The borders of a table are made once here, which costs several times as much as looking one column up.
    """
    if not format.levels:
        return lambda x: rounding.round_(x, format)
    levels = torch.tensor(format.values, dtype=like.dtype, device=like.device)
    borders = (levels[1:] + levels[:-1]) / 2
    return lambda x: levels[torch.bucketize(x, borders)]


def nearest(problem: Problem, steps: Tensor, shifts: Tensor) -> Solution:
    """The solution with every weight at the grid value nearest to it, on the scales given."""
    levels = torch.empty_like(problem.target)
    for number, unit in enumerate(problem.units):
        step, shift = (of[number][problem.owner][:, None] for of in (steps, shifts))  # [g, 1, r]
        columns = slice(unit.start, unit.stop)
        levels[:, columns] = round_levels(problem.target[:, columns], step, shift, unit.format)
    return Solution(levels, steps, shifts)


def unit_of(problem: Problem) -> Tensor:
    """The unit of every column, int64 [n]."""
    widths = torch.tensor([unit.stop - unit.start for unit in problem.units])
    return torch.arange(len(problem.units)).repeat_interleave(widths).to(problem.target.device)
