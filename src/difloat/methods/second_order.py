"""Second-order rounding of a weight on any grid: GPTQ (arXiv:2210.17323) in its LDL form, refitted and swept once.

The error of a row is ``e H e^T`` with ``e = q - w`` and H the mean of ``x x^T`` over input vectors. With ``H = U U^T``, U
upper triangular, it is ``sum_j U_jj^2 (e_j + a_j)^2``, where ``a_j = sum_{i<j} e_i U_ij / U_jj`` holds the errors of the
columns before j. So column after column is rounded to the grid value nearest to ``w_j - a_j``: no inverse is needed, and scales
and zero points are those that the search found.

The better of this and nearest rounding goes on, chosen apart for all rows that share a scale. With its grid values held, scales
and zero points are fitted by least squares under H, and then every weight is moved to its best grid value given all others.

A problem is laid out as [groups, columns, rows]: a column is one step, rows go together. Groups are those of a convolution. If
moments know channels only, every tap of a convolution makes rows of its own, which share the scales of their output channel.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

import torch
from torch import Tensor

from difloat.numbers import rounding
from difloat.numbers.formats import Format
from difloat.plan.plan import LayerPlan
from difloat.plan.rules import Draft

_TRIES = 7  # dampings, each ten times the one before
_BLOCK = 128  # columns whose errors are passed on one by one; those of blocks before in one product
_LEAST_SHARE = 0.2  # of a scale that a fit must leave
_INDEPENDENT = 1e-6  # of scale and zero point: how far their normal equations must be from singular, relative


@dataclass(frozen=True)
class SecondOrderSettings:
    """How a weight is rounded.

    Attributes:
        damping: Added to the diagonal of H, times its mean; ten times as much, up to six times, where H is not definite.
        by_diagonal: Columns by falling diagonal of H in place of their own order; scales stay with their columns.
        refit: Fit scales and zero points; not for scales that are restricted to a grid.
        sweep: Move every weight once to its best grid value given the others.
        rounds: Of fit and sweep.
    """

    damping: float = 0.01
    by_diagonal: bool = False
    refit: bool = True
    sweep: bool = True
    rounds: int = 1


@dataclass(frozen=True)
class Rounded:
    """A weight on its grid.

    Attributes:
        draft: With the scales and zero points that belong to `weight`.
        weight: float32 [o, i, *k], values on the grid.
        row_error: ``e H e^T`` of every output channel, [o], under the moments as given (undamped).
        nearest_error: The same of nearest rounding on the scales given.
        damping: The share of the mean diagonal that was needed, the largest of all groups.
    """

    draft: Draft
    weight: Tensor = field(repr=False)
    row_error: Tensor = field(repr=False)
    nearest_error: Tensor = field(repr=False)
    damping: float

    def plan(self) -> LayerPlan:
        """Encode and pack it, without inputs."""
        return self.draft.plan(self.weight)


@dataclass(frozen=True)
class _Unit:
    """A run of columns that share scales: one part, or one group of it."""

    start: int
    stop: int
    format: Format
    shifted: bool


@dataclass(frozen=True)
class _Problem:
    """Attributes: target [g, n, r]; moments [g, n, n], dead inputs with a diagonal of 1; owner int64 [g, r], whose scales."""

    target: Tensor
    moments: Tensor
    owner: Tensor
    owners: int
    units: tuple[_Unit, ...]

    def per_owner(self, of_rows: Tensor) -> Tensor:
        """Sums [owners] over the rows [g, r] that share scales, in float64."""
        zeros = of_rows.new_zeros(self.owners, dtype=torch.float64)
        return zeros.index_add(0, self.owner.flatten(), of_rows.flatten().double())

    def row_error(self, values: Tensor) -> Tensor:
        """``e H e^T`` of every row, [g, r]."""
        change = values - self.target
        return (change * (self.moments @ change)).sum(1)


@dataclass(frozen=True)
class _Solution:
    """Attributes: levels [g, n, r], values of the format; steps and shifts [units, owners]."""

    levels: Tensor
    steps: Tensor
    shifts: Tensor

    def values(self, problem: _Problem) -> Tensor:
        out = torch.empty_like(self.levels)
        for number, unit in enumerate(problem.units):
            step, shift = (of[number][problem.owner][:, None] for of in (self.steps, self.shifts))
            out[:, unit.start : unit.stop] = self.levels[:, unit.start : unit.stop] * step + shift
        return out


def round_second_order(draft: Draft, moments: Tensor, settings: SecondOrderSettings) -> Rounded:
    """Round a weight so that its outputs change least.

    Args:
        draft: Weight, formats, scales and zero points, as `draft_layer` finds them.
        moments: Mean of ``x x^T``, float32 or float64 (what all is computed in), [n, n], or [groups, n, n] of a grouped
            convolution. n is ``i * kh * kw`` in the order of the flattened weight, or i: then all taps of a convolution take
            the same moments and count as independent.
        settings: See there.

    Raises:
        ValueError: if moments do not fit the weight, are not finite, or cannot be factorised even with the largest damping.
    """
    problem = _problem(draft, moments)
    steps, shifts = _scales(draft, problem)
    nearest = _nearest(problem, steps, shifts)
    fed, damping = _feed_forward(problem, steps, shifts, settings)
    best, error = _best(problem, [nearest, fed])
    for _ in range(settings.rounds if settings.refit or settings.sweep else 0):
        best, error = _best(problem, [best, _polish(problem, best, settings)])
    return _assembled(draft, problem, best, error, nearest, damping)


def nearest_row_error(draft: Draft, moments: Tensor) -> Tensor:
    """``e H e^T`` of every output channel, [o], of nearest rounding on the scales given; arguments as `round_second_order`."""
    problem = _problem(draft, moments)
    error = problem.row_error(_nearest(problem, *_scales(draft, problem)).values(problem))
    return error.reshape(draft.weight.shape[0], -1).sum(1)


def _problem(draft: Draft, moments: Tensor) -> _Problem:
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
    diagonal = stacked.diagonal(dim1=1, dim2=2)
    if not stacked.isfinite().all() or bool((diagonal < 0).any()):
        raise ValueError(
            "moments must be finite and their diagonal not negative, got others; look for NaN in the inputs"
        )
    if len({part.weight.granularity for part in draft.parts}) > 1:
        raise ValueError("all parts of a layer must have weight scales of one granularity, got several")
    own = 1 if columns == channels * taps else taps  # rows per output channel
    per_tensor = draft.parts[0].weight.granularity == "tensor"
    owner = torch.zeros(out_channels, dtype=torch.int64) if per_tensor else torch.arange(out_channels)
    dead = diagonal == 0
    target = _columns_of(weight.to(stacked.device, stacked.dtype), groups, own)
    return _Problem(
        target.masked_fill(dead[:, :, None], 0.0),
        stacked + torch.diag_embed(dead.to(stacked.dtype)),
        owner.repeat_interleave(own).view(groups, -1).to(stacked.device),
        1 if per_tensor else out_channels,
        tuple(_units(draft, taps // own)),
    )


def _columns_of(weight: Tensor, groups: int, own: int) -> Tensor:
    """The weight [o, i, *k] as columns [g, n, r], with `own` rows per output channel."""
    rows = weight.flatten(1) if own == 1 else weight.flatten(2).transpose(1, 2).flatten(0, 1)
    return rows.unflatten(0, (groups, -1)).transpose(1, 2).contiguous()


def _weight_of(columns: Tensor, shape: Sequence[int]) -> Tensor:
    """Inverse of `_columns_of`."""
    rows = columns.transpose(1, 2).flatten(0, 1)
    if len(rows) == shape[0]:
        return rows.reshape(shape)
    return rows.unflatten(0, (shape[0], -1)).transpose(1, 2).reshape(shape)


def _units(draft: Draft, width: int) -> list[_Unit]:
    units, at = [], 0
    for part in draft.parts:
        size = part.weight.group_size or part.channels
        edges = [*range(at, at + part.channels, size), at + part.channels]
        shifted = part.weight.zero_point
        units += [_Unit(a * width, b * width, part.weight.format, shifted) for a, b in pairwise(edges)]
        at += part.channels
    return units


def _scales(draft: Draft, problem: _Problem) -> tuple[Tensor, Tensor]:
    """Steps and shifts [units, owners] of the draft's scales and zero points."""
    steps, shifts = [], []
    for part, scale, zero in zip(draft.parts, draft.scales, draft.zero_points, strict=True):
        steps.append(scale.reshape(problem.owners, -1).T)
        shifts.append(
            zero.reshape(problem.owners, -1).T if part.weight.zero_point else torch.zeros_like(steps[-1])
        )
    return torch.cat(steps).to(problem.target), torch.cat(shifts).to(problem.target)


def _factor(moments: Tensor, damping: float) -> tuple[Tensor, float]:
    """The upper triangular B [g, n, n] with a diagonal of ones, ``H = B D B^T`` for the damped H, and the largest damping."""
    mean = moments.diagonal(dim1=1, dim2=2).mean(1)
    shares = torch.full_like(mean, damping)
    for _ in range(_TRIES):
        damped = moments + torch.diag_embed((shares * mean)[:, None].expand(-1, moments.shape[1]))
        lower, failed = torch.linalg.cholesky_ex(damped.flip(1, 2))
        if not failed.any():
            upper = lower.flip(1, 2)
            return upper / upper.diagonal(dim1=1, dim2=2)[:, None], float(shares.max())
        shares = torch.where(failed > 0, shares * 10, shares)
    raise ValueError(
        f"moments must be positive definite when damped by up to {float(shares.max()) / 10:g} of their mean diagonal, got "
        "others; use more calibration rows"
    )


def _round(values: Tensor, step: Tensor, shift: Tensor, format: Format) -> Tensor:
    return rounding.round_(((values - shift) / step).contiguous(), format)


def _nearest(problem: _Problem, steps: Tensor, shifts: Tensor) -> _Solution:
    levels = torch.empty_like(problem.target)
    for number, unit in enumerate(problem.units):
        step, shift = (of[number][problem.owner][:, None] for of in (steps, shifts))
        columns = slice(unit.start, unit.stop)
        levels[:, columns] = _round(problem.target[:, columns], step, shift, unit.format)
    return _Solution(levels, steps, shifts)


def _unit_of(problem: _Problem) -> Tensor:
    """The unit of every column, int64 [n]."""
    widths = torch.tensor([unit.stop - unit.start for unit in problem.units])
    return torch.arange(len(problem.units)).repeat_interleave(widths).to(problem.target.device)


def _feed_forward(
    problem: _Problem, steps: Tensor, shifts: Tensor, settings: SecondOrderSettings
) -> tuple[_Solution, float]:
    """Column after column, with the errors of those before fed forward; and the damping that the factor needed.

    Groups that are ordered apart have one part only, hence one format.
    """
    groups, count, _ = problem.target.shape
    order = torch.arange(count, device=problem.target.device).expand(groups, -1)
    moments = problem.moments
    if settings.by_diagonal:
        order = moments.diagonal(dim1=1, dim2=2).argsort(dim=1, descending=True, stable=True)
        moments = moments.gather(1, order[:, :, None].expand(-1, -1, count))
        moments = moments.gather(2, order[:, None].expand(-1, count, -1))
    factor, damping = _factor(moments, settings.damping)
    rows = order[:, :, None].expand_as(problem.target)
    target, units = problem.target.gather(1, rows), _unit_of(problem)[order]  # [g, n]
    formats = [problem.units[number].format for number in units[0].tolist()]
    levels, errors = torch.empty_like(target), torch.zeros_like(target)
    for start in range(0, count, _BLOCK):
        stop = min(start + _BLOCK, count)
        wanted = target[:, start:stop] - factor[:, :start, start:stop].mT @ errors[:, :start]
        for column in range(start, stop):
            at, unit = column - start, units[:, column, None]
            step, shift = steps[unit, problem.owner], shifts[unit, problem.owner]
            levels[:, column] = _round(wanted[:, at], step, shift, formats[column])
            error = levels[:, column] * step + shift - target[:, column]
            errors[:, column] = error
            wanted[:, at + 1 :] -= factor[:, column, column + 1 : stop, None] * error[:, None]
    return _Solution(torch.empty_like(levels).scatter_(1, rows, levels), steps, shifts), damping


def _polish(problem: _Problem, start: _Solution, settings: SecondOrderSettings) -> _Solution:
    solution = start
    gradient = problem.moments @ (solution.values(problem) - problem.target)  # half of it, [g, n, r]
    if settings.refit:
        solution = _refit(problem, solution, gradient)
    if settings.sweep:
        gradient = problem.moments @ (solution.values(problem) - problem.target)
        solution = _sweep(problem, solution, gradient)
    return solution


def _refit(problem: _Problem, solution: _Solution, gradient: Tensor) -> _Solution:
    """Least squares of scale and zero point under H, unit after unit, with the levels held; `gradient` is used up.

    The error is a quadratic function of both, so what a fit saves is known before it is made, and one that saves nothing, with
    the rounding of the stored float32 numbers, is left out.
    """
    steps, shifts = solution.steps.clone(), solution.shifts.clone()
    for number, unit in enumerate(problem.units):
        columns = slice(unit.start, unit.stop)
        levels, own = solution.levels[:, columns], problem.moments[:, columns, columns]
        product = own @ levels
        bent = [(levels * product).sum(1), product.sum(1), own.sum((1, 2))[:, None].expand_as(problem.owner)]
        sloped = [(levels * gradient[:, columns]).sum(1), gradient[:, columns].sum(1)]
        a11, a12, a22 = map(problem.per_owner, bent)
        g1, g2 = map(problem.per_owner, sloped)
        by_step = torch.where(a11 > 0, -g1 / a11.clamp_min(1e-300), 0.0)
        by_shift = torch.zeros_like(by_step)
        if unit.shifted:
            determinant = a11 * a22 - a12 * a12
            solvable, divisor = determinant > _INDEPENDENT * a11 * a22, determinant.clamp_min(1e-300)
            by_step = torch.where(solvable, (a12 * g2 - a22 * g1) / divisor, by_step)
            by_shift = torch.where(solvable, (a12 * g1 - a11 * g2) / divisor, by_shift)
        step, shift = ((of[number] + by).float() for of, by in ((steps, by_step), (shifts, by_shift)))
        by_step, by_shift = step - steps[number].double(), shift - shifts[number].double()
        gained = 2 * (by_step * g1 + by_shift * g2) + (
            by_step.square() * a11 + 2 * by_step * by_shift * a12 + by_shift.square() * a22
        )
        taken = (gained < 0) & (step / steps[number] > _LEAST_SHARE)
        by_step, by_shift = by_step.where(taken, 0.0), by_shift.where(taken, 0.0)
        steps[number] = torch.where(taken, step.to(steps), steps[number])
        shifts[number] = torch.where(taken, shift.to(shifts), shifts[number])
        change = (levels * by_step[problem.owner][:, None] + by_shift[problem.owner][:, None]).to(levels)
        gradient += problem.moments[:, :, columns] @ change
    return _Solution(solution.levels, steps, shifts)


def _sweep(problem: _Problem, solution: _Solution, gradient: Tensor) -> _Solution:
    """Every weight moved to the grid value nearest to its optimum given all others, column after column."""
    levels, values = solution.levels.clone(), solution.values(problem)
    units, count = _unit_of(problem).tolist(), values.shape[1]
    for start in range(0, count, _BLOCK):
        stop = min(start + _BLOCK, count)
        inner, slope = problem.moments[:, start:stop, start:stop], gradient[:, start:stop].clone()
        moved = torch.zeros_like(slope)
        for column in range(start, stop):
            at, unit = column - start, units[column]
            step, shift = solution.steps[unit][problem.owner], solution.shifts[unit][problem.owner]
            best = values[:, column] - slope[:, at] / inner[:, at, at, None]
            levels[:, column] = _round(best, step, shift, problem.units[unit].format)
            moved[:, at] = levels[:, column] * step + shift - values[:, column]
            slope += inner[:, :, at, None] * moved[:, at, None]
        gradient += problem.moments[:, :, start:stop] @ moved
    return replace(solution, levels=levels)


def _best(problem: _Problem, found: Sequence[_Solution]) -> tuple[_Solution, Tensor]:
    """Of several solutions the best for every owner of scales (of equals the first), and the error of its rows [g, r]."""
    best, error = found[0], problem.row_error(found[0].values(problem))
    for other in found[1:]:
        others = problem.row_error(other.values(problem))
        better = problem.per_owner(others) < problem.per_owner(error)
        rows = better[problem.owner]
        best = _Solution(
            torch.where(rows[:, None], other.levels, best.levels),
            torch.where(better, other.steps, best.steps),
            torch.where(better, other.shifts, best.shifts),
        )
        error = torch.where(rows, others, error)
    return best, error


def _assembled(
    draft: Draft, problem: _Problem, best: _Solution, error: Tensor, nearest: _Solution, damping: float
) -> Rounded:
    stored = _Solution(best.levels.float(), best.steps.float(), best.shifts.float())
    weight = _weight_of(stored.values(problem), draft.weight.shape)
    scales, zeros, at = [], [], 0
    for scale in draft.scales:
        count = scale.numel() // problem.owners
        scales.append(stored.steps[at : at + count].T.reshape(-1))
        zeros.append(stored.shifts[at : at + count].T.reshape(-1))
        at += count
    squared = float((weight - draft.weight.detach().to(weight)).square().sum())
    out_channels = draft.weight.shape[0]
    by_row, at_nearest = (
        of.reshape(out_channels, -1).sum(1) for of in (error, problem.row_error(nearest.values(problem)))
    )
    made = replace(draft, scales=tuple(scales), zero_points=tuple(zeros), error=squared)
    return Rounded(made, weight, by_row, at_nearest, damping)
