"""Rounding column after column: errors fed forward through a factor, and the sweep that moves weights given all others.

Both go through blocks of columns. What happened in all blocks before reaches a block in one matrix product, and within a few
columns every column reaches those after it at once. Margins write g for groups, n for columns, r for rows.
"""

from __future__ import annotations

from dataclasses import replace
from typing import final

import torch
from torch import Tensor

from difloat.methods import quadratic
from difloat.methods.quadratic import Problem, Solution

_BLOCK = 128  # columns that all columns before them reach in one product
_INNER = 16  # columns of a block that reach each other one by one


def feed_forward(problem: Problem, steps: Tensor, shifts: Tensor, order: Tensor, upper: Tensor) -> Solution:
    """The solution by rounding column after column, with the errors of the columns before fed forward.

    Groups that are ordered apart have one part only, hence one format.

    Args:
        problem: The problem.
        steps: The scales [units, owners].
        shifts: The zero points [units, owners].
        order: The columns in the order in which they are rounded, int64 [g, n].
        upper: The upper triangular factor B [g, n, n] with a diagonal of ones, such that ``H = B D B^T`` in that order.
    """
    count = problem.target.shape[1]
    ordered = bool((order.diff() == 1).all())
    rows = order[:, :, None].expand_as(problem.target)  # [g, n, r]
    target = problem.target if ordered else problem.target.gather(1, rows)
    scales = _Scales(problem, steps, shifts, order)
    levels, errors = torch.empty_like(target), torch.empty_like(target)
    for start in range(0, count, _BLOCK):
        stop = min(start + _BLOCK, count)
        wanted = target[:, start:stop].clone()  # [g, columns of the block, r]
        if start:
            wanted.baddbmm_(upper[:, :start, start:stop].mT, errors[:, :start], alpha=-1)
        for column in range(start, stop):
            at, inner = column - start, (column - start) % _INNER
            end = min(at - inner + _INNER, stop - start)
            if at and not inner:
                own = upper[:, start:column, column : start + end].mT
                wanted[:, at:end].baddbmm_(own, errors[:, start:column], alpha=-1)
            level, value = scales.rounded(column, wanted[:, at])
            levels[:, column] = level
            error = torch.sub(value, target[:, column], out=errors[:, column])  # [g, r]
            # Within few columns every error reaches those after it at once.
            if at + 1 < end:
                wanted[:, at + 1 : end].addcmul_(
                    upper[:, column, column + 1 : start + end, None], error[:, None], value=-1
                )
    if not ordered:
        levels = torch.empty_like(levels).scatter_(1, rows, levels)
    return Solution(levels, steps, shifts)


def sweep(problem: Problem, solution: Solution, slope: Tensor) -> tuple[Solution, Tensor]:
    """Move every weight to the grid value nearest to its optimum given all others, column after column.

    Returns:
        The solution, and by how much the error of every row changed, [g, r]. `slope` is overwritten.
    """
    levels, values = torch.empty_like(solution.levels), solution.values(problem)
    count, order = values.shape[1], torch.arange(values.shape[1], device=values.device)
    scales = _Scales(problem, solution.steps, solution.shifts, order.expand(len(values), -1))
    moved, changed = torch.empty_like(values), torch.zeros_like(values[:, 0])
    diagonal = problem.moments.diagonal(dim1=1, dim2=2)[:, :, None].contiguous()  # [g, n, 1]
    for start in range(0, count, _BLOCK):
        stop = min(start + _BLOCK, count)
        block = slope[:, start:stop]
        if start:  # what all blocks before moved
            block.baddbmm_(problem.moments[:, start:stop, :start], moved[:, :start])
        for column in range(start, stop):
            at, inner = column - start, (column - start) % _INNER
            end = min(at - inner + _INNER, stop - start)
            if at and not inner:
                own = problem.moments[:, column : start + end, start:column]
                block[:, at:end].baddbmm_(own, moved[:, start:column])
            # The optimum of one weight alone, by the derivative and the second derivative of the error.
            best = values[:, column] - block[:, at] / diagonal[:, column]
            level, value = scales.rounded(column, best)
            levels[:, column] = level
            by = torch.sub(value, values[:, column], out=moved[:, column])  # [g, r]
            if at + 1 < end:
                block[:, at + 1 : end].addcmul_(
                    problem.moments[:, column, column + 1 : start + end, None], by[:, None]
                )
        own = moved[:, start:stop]
        changed += (own * diagonal[:, start:stop]).add_(block, alpha=2).mul_(own).sum(1)
    return replace(solution, levels=levels), changed


@final
class _Scales:
    """The scales of every column, for rounding one after the other."""

    def __init__(self, problem: Problem, steps: Tensor, shifts: Tensor, order: Tensor) -> None:
        self._rounders = quadratic.rounders(problem)
        self._steps, self._shifts = steps[:, problem.owner], shifts[:, problem.owner]  # [units, g, r]
        self._shifted = any(grid.shifted for unit in problem.units for grid in unit.grids)
        units = quadratic.unit_of(problem)[order]  # [g, n]
        self._units = units[0].tolist()
        self._apart = None if bool((units == units[:1]).all()) else units
        self._groups = torch.arange(len(units), device=units.device)

    def rounded(self, column: int, wanted: Tensor) -> tuple[Tensor, Tensor]:
        """The levels [g, r] of a column's numbers, and the values that they stand for."""
        unit = self._units[column]
        of = unit if self._apart is None else (self._apart[:, column], self._groups)
        step = self._steps[of]  # [g, r]
        if not self._shifted:
            level = self._rounders[unit](wanted / step)
            return level, level * step
        shift = self._shifts[of]
        level = self._rounders[unit]((wanted - shift).div_(step))
        return level, (level * step).add_(shift)
