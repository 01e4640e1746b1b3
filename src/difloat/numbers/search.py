"""Search of format, clip value and zero point by mean squared error.

A candidate needs no pass over the data. With a row sorted and its prefix sums at hand, moving one border between two
neighbouring values of the grid changes the error by an amount that only needs the number and the sum of the elements beyond
the border. The borders are the midpoints of neighbouring values. `searchsorted` finds each in O(log n), so a candidate costs
O(levels log n) instead of O(n), and its error is exact.

Three rules leave out candidates that cannot win, or can win next to nothing:

* Where there are many rows, a sample of them decides between the formats. Only formats that the sample cannot tell apart are
  compared on all rows (`_still_open`).
* The error of a grid of few values changes slowly with the clip value. So `coarse` keeps every fifth of many clip values,
  and one more round of refining finds those between them.
* Grids of many values lose so much by clipping that most clip values are out before their other borders are looked at
  (`_worth_trying`).

Clip values are fractions of the reach of a row: ``scale = fraction * reach / format.max``. The reach is ``absmax`` for signed
formats and ``max - zero_point`` for unsigned ones. Two's complement has one more value below zero. There 1.0 still puts ``max``
on absmax, and a row that reaches further down than up finds its tight range just below 1, at ``7 / 8`` for `int4`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from difloat.numbers.formats import Format
from difloat.numbers.scale_grids import ScaleFormat, Snap, snap_zero_points
from difloat.numbers.sorted_rows import SortedRows, rounding_errors, sort, squared_errors

CLIPS = tuple(percent / 100 for percent in range(20, 121))
"""Fractions of the reach that `search` tries as clip values. At 4 bits the best is usually near 0.6."""

ZERO_POINTS = tuple(tenth / 10 for tenth in range(11))
"""Fractions of the minimum of a row that are worth trying as zero points."""

SHRUNK = tuple(percent / 100 for percent in range(40, 101, 3))
"""Fractions for asymmetric integers, whose ranges shrink at both ends. They are coarser than `CLIPS`, and refined."""

OFFSETS = tuple(percent / 100 for percent in range(50, 101, 10))
"""Fractions of the minimum of a row for zero points of asymmetric integers."""

FEW_LEVELS_BITS = 3
"""Up to this width in bits the best range of a row is far inside of it, at 1 bit a quarter of the way to either end."""

SHRUNK_FAR = tuple(percent / 100 for percent in range(10, 101, 5))
"""Fractions that take the place of `SHRUNK` up to `FEW_LEVELS_BITS`, together with `ZERO_POINTS`."""

_FEW_VALUES_BITS = 5  # grids up to this width have an error that changes slowly with the clip value
_THINNED = 5  # of so many clip values one is tried first
_SAMPLE_ROWS = 256  # decide between formats
_STANDARD_ERRORS = 4  # of the mean difference between two formats that the sample must show
_REFINED = 11  # points per axis of a refined grid, the winner in the middle
_ROUGHLY_REFINED = 5  # the same where scales are fitted anew later
_BLOCK = 2**24  # elements sorted at a time: bounds memory to about 0.5 GB


@dataclass(frozen=True)
class Found:
    """The best quantizer: rows become ``round_to((x - zero_point) / scale, format) * scale + zero_point``.

    Attributes:
        format: The one format of all rows.
        scale: float32 [r]. A scale is positive, but for a table that is not symmetric it may be negative.
        zero_point: float32 [r], a real number. It is zero for signed formats and where none was searched.
        error: float64 [r], the sum of squared errors with exactly these float32 scales and zero points.
        error_by_format: The lowest total error of every candidate format by name, extrapolated if a sample ruled it out.
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
    zero_format: ScaleFormat = "float32",
    rough: bool = False,
) -> Found:
    """The one format for all rows, and the scale and zero point of every row, with the lowest squared error.

    >>> from difloat.numbers.formats import candidates
    >>> found = search(torch.linspace(-1, 1, 9)[None], candidates(4))
    >>> found.format.name, round(float(found.scale), 3)
    ('e2m1', 0.172)

    Every row chooses scale and zero point for itself, and its candidates are compared exactly. At equal error the format named
    first wins. Of more than 1,024 rows a sample rules out formats whose error is higher by four standard errors of the
    difference. A row without reach, which is all zero or constant at its zero point, gets scale 1.0.

    Args:
        rows: Floating point [r, n], read as float32. The elements of a row share a scale, so r is 1 for one scale per tensor.
        formats: Candidates, among which signed and unsigned ones may be mixed.
        clips: Fractions of the reach of the row to try as clip value.
        zero_points: Fractions of the minimum of the row to try as zero point of unsigned formats, for example
            `ZERO_POINTS`. None tries no zero point, and unsigned formats then need rows without negative values.
        refine: Rounds of a finer grid between the neighbours of each winner.
        snap: Moves the candidate scales of a format to the nearest that are allowed. The errors are those of the moved.
        zero_format: Grid of the zero points. The errors are those of zero points on it.
        rough: Whether fewer points of finer grids are enough.

    Raises:
        ValueError: if rows are empty or not finite, a fraction is not usable, or an unsigned format meets a negative value.
    """
    expected: dict[str, float] = {}

    def best(of: Tensor, candidates: Sequence[Format]) -> dict[str, Found]:
        asked: dict[str, Any] = {"clips": clips, "zero_points": zero_points, "refine": refine, "snap": snap}
        return best_per_format(of, candidates, **asked, zero_format=zero_format, rough=rough)

    _check(rows, formats, clips, zero_points)
    if len(formats) > 1 and len(rows) > 4 * _SAMPLE_ROWS:
        # A fixed seed takes the same rows at every call, and sorted they are read in the order of memory.
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))
        sample = best(rows[order[:_SAMPLE_ROWS].sort().values.to(rows.device)], formats)
        formats = _still_open(sample)
        share = len(rows) / _SAMPLE_ROWS
        expected = {name: float(one.error.sum()) * share for name, one in sample.items()}
    found = best(rows, formats)
    winner = min(found.values(), key=lambda one: one.error_by_format[one.format.name])
    return replace(winner, error_by_format=expected | winner.error_by_format)


def coarse(clips: Sequence[float], format: Format) -> tuple[Sequence[float], int]:
    """The clip values to try first for a grid, and how many rounds of refining make up for those left out.

    Of many clip values for a grid of few bits every fifth is enough. In other cases all are tried and refined once.
    """
    if format.bits > _FEW_VALUES_BITS or len(clips) <= 6 * _THINNED:
        return clips, 1
    ordered = sorted(set(clips))
    return tuple(sorted({*ordered[::_THINNED], ordered[-1]})), 2


def _still_open(sample: Mapping[str, Found]) -> list[Format]:
    """The formats that a sample of rows cannot tell from the best one."""
    best = min(sample.values(), key=lambda one: one.error_by_format[one.format.name])
    kept = []
    for one in sample.values():
        worse = one.error - best.error
        if float(worse.mean()) <= _STANDARD_ERRORS * float(worse.std()) / len(worse) ** 0.5:
            kept.append(one.format)
    return kept


def best_per_format(
    rows: Tensor,
    formats: Sequence[Format],
    *,
    clips: Sequence[float] = CLIPS,
    zero_points: Sequence[float] | None = None,
    refine: int = 1,
    snap: Snap | None = None,
    zero_format: ScaleFormat = "float32",
    rough: bool = False,
) -> dict[str, Found]:
    """The best quantizer of every format by its name, for callers that mix formats and compare them row by row."""
    _check(rows, formats, clips, zero_points)
    if refine < 0:
        raise ValueError(f"refine must be 0 or more rounds, got {refine}; leave it out for the default")
    points = _ROUGHLY_REFINED if rough else _REFINED
    clip_axis = _axis(clips, rows)
    zero_axis = {True: _axis((0.0,), rows), False: _axis(zero_points or (0.0,), rows)}  # by format.signed
    parts: dict[str, list[tuple[Tensor, Tensor, Tensor]]] = {format.name: [] for format in formats}
    for block in torch.split(rows.detach().float(), max(1, _BLOCK // rows.shape[1])):
        low, high = block.aminmax(dim=1, keepdim=True)  # [r, 1]
        _check_range(low, high, any(not format.signed for format in formats) and zero_points is None)
        sorted_rows: dict[bool, SortedRows] = {}
        for format in formats:
            if clip_axis.numel() == 1 == zero_axis[format.signed].numel() and not format.levels:
                axes = (clip_axis, zero_axis[format.signed])
                parts[format.name].append(_only(block, low, high, format, *axes, snap, zero_format))
                continue
            mirrored = format.symmetric  # magnitudes halve the borders to look up
            if mirrored not in sorted_rows:
                sorted_rows[mirrored] = sort(block.abs() if mirrored else block, low.double(), high.double())
            axes = (clip_axis, zero_axis[format.signed])
            best = _search_block(sorted_rows[mirrored], format, *axes, (refine, points), snap, zero_format)
            if format.levels and not mirrored:  # the sign of the scale is one more candidate
                turned = _search_block(
                    sorted_rows[mirrored], format.mirrored(), *axes, (refine, points), snap
                )
                better = turned[2] < best[2]  # [r]
                signed = (-turned[0], turned[1], turned[2])
                pairs = zip(signed, best, strict=True)
                scale, zero_point, error = (torch.where(better, a, b) for a, b in pairs)
                best = (scale, zero_point, error)
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


def _search_block(
    rows: SortedRows,
    format: Format,
    clips: Tensor,
    zeros: Tensor,
    refine: tuple[int, int],
    snap: Snap | None,
    zero_format: ScaleFormat = "float32",
) -> tuple[Tensor, Tensor, Tensor]:
    """Best scale, zero point and error of the rows, each [r], over the fractions `clips` [1, c] and `zeros` [1, z].

    `refine` has the rounds of refining and the points per axis of each.
    """
    count = rows.low.shape[0]
    clips, zeros = clips.expand(count, -1), zeros.expand(count, -1)  # [r, c], [r, z]
    for remaining in range(refine[0], -1, -1):
        scale, zero_point = _candidates(rows.low, rows.high, format, clips, zeros)  # [r, z * c]
        if snap is not None:
            scale = snap(scale, format)
        zero_point = snap_zero_points(zero_point, zero_format)
        error = squared_errors(rows, format, scale, zero_point)
        winner = error.argmin(dim=1, keepdim=True)
        if remaining:
            best_zero, best_clip = winner // clips.shape[1], winner % clips.shape[1]
            clips, zeros = _around(clips, best_clip, refine[1]), _around(zeros, best_zero, refine[1])
    # Prefix sums may leave an error of zero a rounding below it.
    best = error.gather(1, winner).squeeze(1).clamp_min(0)
    return scale.gather(1, winner).squeeze(1).float(), zero_point.gather(1, winner).squeeze(1).float(), best


def _only(
    block: Tensor,
    low: Tensor,
    high: Tensor,
    format: Format,
    clip: Tensor,
    zero: Tensor,
    snap: Snap | None,
    zero_format: ScaleFormat,
) -> tuple[Tensor, Tensor, Tensor]:
    """Scale, zero point and error of rows [r, n], each [r], with one candidate, for which nothing need be sorted."""
    scale, zero_point = _candidates(low.double(), high.double(), format, clip, zero)  # [r, 1]
    if snap is not None:
        scale = snap(scale, format)
    zero_point = snap_zero_points(zero_point, zero_format)
    return (
        scale[:, 0].float(),
        zero_point[:, 0].float(),
        rounding_errors(block, format, scale, zero_point)[:, 0],
    )


def _around(axis: Tensor, winner: Tensor, points: int) -> Tensor:
    """Finer axis [r, points] from the left to the right neighbour of `winner` [r, 1], which it holds exactly."""
    if axis.shape[1] == 1:
        return axis
    centre = axis.gather(1, winner)  # [r, 1]
    left = axis.gather(1, (winner - 1).clamp_min(0))
    right = axis.gather(1, (winner + 1).clamp_max(axis.shape[1] - 1))
    steps = torch.linspace(-1, 1, points, dtype=axis.dtype, device=axis.device)  # [points]
    return centre + steps.clamp_max(0) * (centre - left) + steps.clamp_min(0) * (right - centre)


def _candidates(
    low: Tensor, high: Tensor, format: Format, clips: Tensor, zeros: Tensor
) -> tuple[Tensor, Tensor]:
    """Scales and zero points [r, z * c] of all pairs of fractions: float32 numbers, as float64."""
    zero_point = (zeros * low).float().double() + 0.0  # no negative zero
    reach = torch.maximum(high, -low) if format.signed else high - zero_point  # [r, z]
    scale = clips[:, None, :] * (reach / format.max)[:, :, None]  # [r, z, c]
    limits = torch.finfo(torch.float32)
    # A row of zeros is exact at any scale, except on a table without a zero, where only the least comes near.
    idle = 1.0 if 0.0 in format.values else limits.tiny
    scale = torch.where(scale > 0, scale.clamp(limits.tiny, limits.max), idle).float().double()
    return scale.flatten(1), zero_point[:, :, None].expand(-1, -1, clips.shape[1]).flatten(1)
