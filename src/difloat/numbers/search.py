"""Exact search of format, clip value and zero point by mean squared error.

A candidate needs no pass over the data. With a row sorted and its prefix sums at hand, moving one border
between two neighbouring values of the grid changes the error by an amount that only needs the number and the sum of the
elements beyond the border. The borders are the midpoints of neighbouring values; `searchsorted` finds them in
O(log n), so a candidate costs O(levels log n) instead of O(n), and the result is that of trying every candidate
on every element.

Clip values are fractions of the reach of a row: ``scale = fraction * reach / format.max``, with ``absmax`` as the
reach for signed formats and ``max - zero_point`` for unsigned ones. Two's complement has one more value below
zero: 1.0 still puts its ``max`` on absmax, and a row that reaches further down than up finds its tight range at a
fraction just below 1 (``7 / 8`` for `int4`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from difloat.numbers.formats import Format
from difloat.numbers.scale_grids import Snap

CLIPS = tuple(percent / 100 for percent in range(20, 121))
"""Fractions of the reach that `search` tries as clip values; at 4 bits the best is usually near 0.6."""

ZERO_POINTS = tuple(tenth / 10 for tenth in range(11))
"""Fractions of the minimum of a row that are worth trying as zero points."""

SHRUNK = tuple(percent / 100 for percent in range(40, 101, 3))
"""Fractions for ranges of asymmetric integers whose both ends shrink: coarser than `CLIPS`, refined by the search."""

OFFSETS = tuple(percent / 100 for percent in range(50, 101, 10))
"""Fractions of the minimum of a row for zero points of asymmetric integers."""

FEW_LEVELS_BITS = 3
"""Up to this width the best range of a row is far inside of it: at 1 bit near a quarter of the way to either end."""

SHRUNK_FAR = tuple(percent / 100 for percent in range(10, 101, 5))
"""Like `SHRUNK`, for few levels; go with `ZERO_POINTS`."""

_REFINED = 11  # points per axis of a refined grid, the winner in the middle
_BLOCK = 2**24  # elements sorted at a time: bounds memory to about 0.5 GB
_CHUNK = 2**18  # borders looked up at a time: stays in the cache


@dataclass(frozen=True)
class Found:
    """The best quantizer: rows become ``round_to((x - zero_point) / scale, format) * scale + zero_point``.

    Attributes:
        format: One format for all rows.
        scale: [r] float32, positive.
        zero_point: [r] float32, real; zeros for signed formats and when it was not searched.
        error: [r] float64, sum of squared errors with exactly these float32 scales and zero points.
        error_by_format: Lowest total error of every candidate format by its name, for reports.
    """

    format: Format
    scale: Tensor
    zero_point: Tensor
    error: Tensor
    error_by_format: dict[str, float]


def search(
    rows: Tensor,
    formats: Sequence[Format],
    *,
    clips: Sequence[float] = CLIPS,
    zero_points: Sequence[float] | None = None,
    refine: int = 1,
    snap: Snap | None = None,
) -> Found:
    """The one format for all rows, and the scale and zero point of every row, with the lowest squared error.

    All candidates are compared exactly; at equal error the format named first wins. Every row chooses scale
    and zero point for itself. A row without reach (all zero, constant at its zero point) gets scale 1.0.

    Args:
        rows: [r, n] floating point, read as float32; the elements of a row share a scale (r = 1: per tensor).
        formats: Candidates; signed and unsigned may be mixed.
        clips: Fractions of the reach of the row to try as clip value.
        zero_points: Fractions of the minimum of the row to try as zero point of unsigned formats, for example
            `ZERO_POINTS`. None: no zero point, and unsigned formats need rows without negative values.
        refine: Rounds of a finer grid between the neighbours of each winner.
        snap: Moves the candidate scales of a format to the nearest that are allowed; the errors are those of the moved.

    Raises:
        ValueError: if rows are empty or hold NaN or Inf, if a fraction is not usable, or if an unsigned
            format without zero point meets a negative value.
    """
    found = best_per_format(rows, formats, clips=clips, zero_points=zero_points, refine=refine, snap=snap)
    return min(found.values(), key=lambda one: one.error_by_format[one.format.name])


def best_per_format(
    rows: Tensor,
    formats: Sequence[Format],
    *,
    clips: Sequence[float] = CLIPS,
    zero_points: Sequence[float] | None = None,
    refine: int = 1,
    snap: Snap | None = None,
) -> dict[str, Found]:
    """Like `search`, but the best of every format, by its name: whoever mixes formats compares row by row."""
    _check(rows, formats, clips, zero_points)
    if refine < 0:
        raise ValueError(f"refine must be 0 or more rounds, got {refine}; leave it out for the default")
    clip_axis = _axis(clips, rows)
    zero_axis = {True: _axis((0.0,), rows), False: _axis(zero_points or (0.0,), rows)}  # by format.signed
    parts: dict[str, list[tuple[Tensor, Tensor, Tensor]]] = {format.name: [] for format in formats}
    for block in torch.split(rows.detach().float(), max(1, _BLOCK // rows.shape[1])):
        low, high = block.aminmax(dim=1, keepdim=True)
        _check_range(low, high, any(not format.signed for format in formats) and zero_points is None)
        sorted_rows: dict[bool, _SortedRows] = {}
        for format in formats:
            mirrored = format.min == -format.max
            if mirrored not in sorted_rows:
                sorted_rows[mirrored] = _sort(block.abs() if mirrored else block, low.double(), high.double())
            axes = (clip_axis, zero_axis[format.signed])
            best = _search_block(sorted_rows[mirrored], format, *axes, refine, snap)
            parts[format.name].append(best)
    columns = {
        name: [torch.cat(column) for column in zip(*blocks, strict=True)] for name, blocks in parts.items()
    }
    totals = {name: float(error.sum()) for name, (_, _, error) in columns.items()}
    return {
        format.name: Found(format, scale, zero_point, error, totals)
        for format in formats
        for scale, zero_point, error in [columns[format.name]]
    }


def _check(
    rows: Tensor, formats: Sequence[Format], clips: Sequence[float], zero_points: Sequence[float] | None
) -> None:
    if rows.ndim != 2 or rows.numel() == 0 or not rows.is_floating_point():
        raise ValueError(
            f"rows must be floating point [r, n], not empty, got {rows.dtype} {list(rows.shape)}; reshape them"
        )
    if not formats or any(format.max <= 0 for format in formats):
        names = [format.name for format in formats]
        raise ValueError(
            f"formats must be one or more with a positive value, got {names}; name for example 'e2m1'"
        )
    if not clips or not all(0 < clip < np.inf for clip in clips):
        raise ValueError(
            f"clips must be positive fractions, got {list(clips)}; leave them out for the default"
        )
    if zero_points is not None and (not zero_points or not all(0 <= zero <= 1 for zero in zero_points)):
        raise ValueError(
            f"zero_points must be fractions from 0 to 1, got {list(zero_points)}; use ZERO_POINTS"
        )


def _axis(fractions: Sequence[float], like: Tensor) -> Tensor:
    return torch.tensor(sorted(set(fractions)), dtype=torch.float64, device=like.device)[None]


def _check_range(low: Tensor, high: Tensor, refuse_negative: bool) -> None:
    if not (low.isfinite().all() and high.isfinite().all()):
        raise ValueError(
            "rows must be finite, got NaN or Inf; find out where the weights or activations broke"
        )
    if refuse_negative and low.min() < 0:
        raise ValueError(
            f"rows must not be negative for unsigned formats, got {low.min():g}; pass zero_points"
        )


@dataclass(frozen=True)
class _SortedRows:
    values: Tensor  # [r, n] float64, ascending; magnitudes for grids that are symmetric around zero
    prefix: Tensor  # [r, n + 1] float64, prefix[:, i] is the sum of the i lowest values
    squares: Tensor  # [r, 1] float64
    low: Tensor  # [r, 1] float64, minimum and maximum with their signs
    high: Tensor


def _sort(rows: Tensor, low: Tensor, high: Tensor) -> _SortedRows:
    rows = rows.contiguous()
    if rows.device.type == "cpu":  # numpy sorts float32 several times faster than torch
        values = torch.from_numpy(np.sort(rows.numpy(), axis=1)).double()
    else:
        values = rows.sort(dim=1).values.double()
    prefix = values.new_zeros(values.shape[0], values.shape[1] + 1)
    torch.cumsum(values, dim=1, out=prefix[:, 1:])
    return _SortedRows(values, prefix, values.square().sum(dim=1, keepdim=True), low, high)


def _search_block(
    rows: _SortedRows, format: Format, clips: Tensor, zeros: Tensor, refine: int, snap: Snap | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Best scale, zero point and error of the rows, each [r]; fractions `clips` [1, c] and `zeros` [1, z]."""
    count = rows.low.shape[0]
    clips, zeros = clips.expand(count, -1), zeros.expand(count, -1)
    for remaining in range(refine, -1, -1):
        scale, zero_point = _candidates(rows, format, clips, zeros)
        if snap is not None:
            scale = snap(scale, format)
        error = _errors(rows, format, scale, zero_point)
        winner = error.argmin(dim=1, keepdim=True)
        if remaining:
            best_zero, best_clip = winner // clips.shape[1], winner % clips.shape[1]
            clips, zeros = _around(clips, best_clip), _around(zeros, best_zero)
    # Prefix sums may leave an error of zero a rounding below it.
    best = error.gather(1, winner).squeeze(1).clamp_min(0)
    return scale.gather(1, winner).squeeze(1).float(), zero_point.gather(1, winner).squeeze(1).float(), best


def _around(axis: Tensor, winner: Tensor) -> Tensor:
    """Finer axis [r, _REFINED] from left to right neighbour of `winner` [r, 1], which it holds exactly."""
    if axis.shape[1] == 1:
        return axis
    centre = axis.gather(1, winner)
    left = axis.gather(1, (winner - 1).clamp_min(0))
    right = axis.gather(1, (winner + 1).clamp_max(axis.shape[1] - 1))
    steps = torch.linspace(-1, 1, _REFINED, dtype=axis.dtype, device=axis.device)
    return centre + steps.clamp_max(0) * (centre - left) + steps.clamp_min(0) * (right - centre)


def _candidates(rows: _SortedRows, format: Format, clips: Tensor, zeros: Tensor) -> tuple[Tensor, Tensor]:
    """Scales and zero points [r, z * c] of all pairs of fractions: float32 numbers, as float64."""
    zero_point = (zeros * rows.low).float().double() + 0.0  # no negative zero
    reach = torch.maximum(rows.high, -rows.low) if format.signed else rows.high - zero_point
    scale = clips[:, None, :] * (reach / format.max)[:, :, None]
    limits = torch.finfo(torch.float32)
    scale = torch.where(scale > 0, scale.clamp(limits.tiny, limits.max), 1.0).float().double()
    return scale.flatten(1), zero_point[:, :, None].expand(-1, -1, clips.shape[1]).flatten(1)


def _errors(rows: _SortedRows, format: Format, scale: Tensor, zero_point: Tensor) -> Tensor:
    """Sum of squared errors [r, c] of every candidate; `scale` and `zero_point` [r, c].

    Starts with all elements at the zero of the grid and moves those beyond each border outwards, so that the
    differences stay about as small as the data.
    """
    levels = torch.tensor(format.values, dtype=torch.float64, device=scale.device)
    length = rows.values.shape[1]
    error = rows.squares + zero_point * (length * zero_point - 2 * rows.prefix[:, -1:])
    chunk = max(1, _CHUNK // (scale.shape[1] * len(levels)))
    for start in range(0, scale.shape[0], chunk):
        part = slice(start, start + chunk)
        slots = (rows.values[part], rows.prefix[part], scale[part], zero_point[part])
        error[part] -= _gain(*slots, levels[levels >= 0], upwards=True)
        if format.min < 0 and format.min != -format.max:
            error[part] -= _gain(*slots, levels[levels <= 0], upwards=False)
    return error


def _gain(
    values: Tensor, prefix: Tensor, scale: Tensor, zero_point: Tensor, levels: Tensor, *, upwards: bool
) -> Tensor:
    """Error [r, c] saved when the elements above (below) each border between two `levels` [v] move across it.

    An element x that moves from value a to its neighbour b saves ``2 |b - a| |x - (a + b) / 2|``.
    """
    midpoints, widths = (levels[1:] + levels[:-1]) / 2, levels.diff()
    borders = scale[:, :, None] * midpoints + zero_point[:, :, None]
    index = torch.searchsorted(values, borders.flatten(1))
    sums = prefix.gather(1, index)
    if upwards:
        sums, index = prefix[:, -1:] - sums, values.shape[1] - index
    distances = sums.view_as(borders).sub_(borders.mul_(index.view_as(borders)))
    saved = 2 * scale * (distances @ widths)
    return saved if upwards else -saved
