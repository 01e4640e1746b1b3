"""Sorted rows and their prefix sums, from which the squared error of any scale and zero point of a grid is exact and cheap."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from difloat.numbers import rounding
from difloat.numbers.formats import Format

_MANY_VALUES = 32  # of a grid, where looking up all borders costs more than ruling candidates out by clipping
_SHORT = 4  # rows with fewer elements than so many times the values of the grid are rounded instead
_CHUNK = 2**18  # borders looked up at a time: stays in the cache
_VALUES = 2**15  # values rounded at a time, which stay in the cache too


@dataclass(frozen=True)
class SortedRows:
    """Rows ready for `squared_errors`."""

    values: Tensor  # [r, n] float64, ascending; magnitudes for grids that are symmetric around zero
    prefix: Tensor  # [r, n + 1] float64, prefix[:, i] is the sum of the i lowest values
    squares: Tensor  # [r, 1] float64
    low: Tensor  # [r, 1] float64, minimum and maximum with their signs
    high: Tensor


def sort(rows: Tensor, low: Tensor, high: Tensor) -> SortedRows:
    """Sort rows [r, n] float32, with minima and maxima [r, 1]."""
    rows = rows.contiguous()
    if rows.device.type == "cpu":  # numpy sorts float32 several times faster than torch
        values = torch.from_numpy(np.sort(rows.numpy(), axis=1)).double()
    else:
        values = rows.sort(dim=1).values.double()
    prefix = values.new_zeros(values.shape[0], values.shape[1] + 1)  # [r, n + 1]
    torch.cumsum(values, dim=1, out=prefix[:, 1:])
    return SortedRows(values, prefix, values.square().sum(dim=1, keepdim=True), low, high)


def squared_errors(rows: SortedRows, format: Format, scale: Tensor, zero_point: Tensor) -> Tensor:
    """Sum of squared errors [r, c] of every candidate; `scale` and `zero_point` are [r, c].

    All elements start at the zero of the grid, or at its least value above zero, and those beyond each border move outwards.
    So the differences stay about as small as the data.
    """
    levels = torch.tensor(format.values, dtype=torch.float64, device=scale.device)  # [v]
    length = rows.values.shape[1]
    base = levels[levels >= 0][0]
    start_at = zero_point + base * scale  # [r, c]
    # The sum of (x - s)^2, expanded into the sums of x^2, of x and of ones.
    error = rows.squares + start_at * (length * start_at - 2 * rows.prefix[:, -1:])
    direct = len(levels) >= _MANY_VALUES and length < _SHORT * len(levels)
    chunk = max(1, _VALUES // length if direct else _CHUNK // (scale.shape[1] * len(levels)))
    for start in range(0, scale.shape[0], chunk):
        part = slice(start, start + chunk)
        slots = (rows.values[part], rows.prefix[part], scale[part], zero_point[part])
        if len(levels) < _MANY_VALUES:
            error[part] -= _gains(*slots, levels)
            continue
        columns = _worth_trying(*slots, levels, error[part])
        given = (*slots[:2], scale[part][:, columns], zero_point[part][:, columns])
        if direct:
            kept = _direct_errors(given[0], *given[2:], format)
        else:
            kept = error[part][:, columns] - _gains(*given, levels)
        error[part] = error[part].fill_(torch.inf).index_copy_(1, columns, kept)
    return error


def rounding_errors(rows: Tensor, format: Format, scale: Tensor, zero_point: Tensor) -> Tensor:
    """What `squared_errors` gives for rows [r, n] that are not sorted, by rounding all of their elements."""
    chunk = max(1, _VALUES // rows.shape[1])
    pieces = zip(rows.split(chunk), scale.split(chunk), zero_point.split(chunk), strict=True)
    return torch.cat([_direct_errors(piece.double(), step, shift, format) for piece, step, shift in pieces])


def _direct_errors(values: Tensor, scale: Tensor, zero_point: Tensor, format: Format) -> Tensor:
    """Sum of squared errors [r, c] of rounding every one of the `values` [r, n] with every candidate [r, c]."""
    errors = torch.empty_like(scale)
    for column in range(scale.shape[1]):
        step, shift = scale[:, column, None], zero_point[:, column, None]  # [r, 1]
        rounded = rounding.round_((values - shift).div_(step), format)  # [r, n]
        errors[:, column] = rounded.mul_(step).add_(shift).sub_(values).square_().sum(dim=1)
    return errors


def _worth_trying(
    values: Tensor, prefix: Tensor, scale: Tensor, zero_point: Tensor, levels: Tensor, start: Tensor
) -> Tensor:
    """Columns [c] of the candidates whose clipping alone costs some row less than the widest candidate costs in all.

    What lies beyond the grid's end m costs ``sum (x - m)^2``, which is at least ``(sum (x - m))^2 / n`` of these n elements.
    """
    last = scale.argmax(dim=1, keepdim=True)  # [r, 1], the widest
    widest, shift = scale.gather(1, last), zero_point.gather(1, last)
    known = start.gather(1, last) - _gains(values, prefix, widest, shift, levels)  # [r, 1]
    length, total = values.shape[1], prefix[:, -1:]
    top, bottom = levels[-1] * scale + zero_point, levels[0] * scale + zero_point  # [r, c]
    below = torch.searchsorted(values, top)  # [r, c], how many stay inside
    above = (total - prefix.gather(1, below)) - (length - below) * top  # sum of x - m
    clipped = above.square() / (length - below).clamp_min(1)
    if levels[0] < 0 or bool((bottom > values[:, :1]).any()):
        under = torch.searchsorted(values, bottom)
        short = under * bottom - prefix.gather(1, under)
        clipped += short.square() / under.clamp_min(1)
    return (clipped <= known).any(dim=0).nonzero().squeeze(1)


def _gains(values: Tensor, prefix: Tensor, scale: Tensor, zero_point: Tensor, levels: Tensor) -> Tensor:
    """`_gain` on both sides of the grid's zero. A symmetric grid, whose `values` are magnitudes, has one side only."""
    saved = _gain(values, prefix, scale, zero_point, levels[levels >= 0], upwards=True)
    if levels[0] < 0 and levels[0] != -levels[-1]:
        saved = saved + _gain(
            values, prefix, scale, zero_point, levels[levels <= levels[levels >= 0][0]], upwards=False
        )
    return saved


def _gain(
    values: Tensor, prefix: Tensor, scale: Tensor, zero_point: Tensor, levels: Tensor, *, upwards: bool
) -> Tensor:
    """Error [r, c] saved when the elements above (below) each border between two `levels` [v] move across it.

    An element x that moves from value a to its neighbour b saves ``2 |b - a| |x - (a + b) / 2|``.
    """
    midpoints, widths = (levels[1:] + levels[:-1]) / 2, levels.diff()  # [v - 1]
    borders = scale[:, :, None] * midpoints + zero_point[:, :, None]  # [r, c, v - 1]
    index = torch.searchsorted(values, borders.flatten(1))  # [r, c * (v - 1)]
    sums = prefix.gather(1, index)  # of what lies below the border
    if upwards:
        sums, index = prefix[:, -1:] - sums, values.shape[1] - index
    distances = sums.view_as(borders).sub_(borders.mul_(index.view_as(borders)))  # [r, c, v - 1]
    saved = 2 * scale * (distances @ widths)
    return saved if upwards else -saved
