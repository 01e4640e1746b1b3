"""The nearest values of formats by one look-up per number, for loops that round many small tensors.

The axis of numbers is cut into cells of equal width, so narrow that no cell holds two borders between neighbouring values. The
cell of a number is found by one multiplication. One comparison with the border in it tells the value below from the one above,
so the result is that of `rounding.round_`, ties included. Rows of several formats go through one table together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from difloat.numbers import rounding
from difloat.numbers.formats import Format

_MOST_CELLS = 4096  # of a format, for which a table stays in the cache
_MARGIN = 0.02  # of a cell, by which borders keep away from its ends: whatever the arithmetic, it finds the cell of a border


def rounder(formats: Sequence[Format], counts: Sequence[int], like: Tensor) -> Callable[[Tensor], Tensor]:
    """A function that rounds finite tensors [..., r], of which the first `counts[0]` rows have the first format and so on.

    What it returns is `rounding.round_` of every stretch of rows. It may overwrite what it is given.

    >>> from difloat.numbers import formats
    >>> two = [formats.parse("iq4nl"), formats.parse("int4")]
    >>> rounder(two, [2, 2], torch.zeros(0))(torch.tensor([1.6, -300.0, 1.6, -300.0]))
    tensor([   1., -127.,    2.,   -8.])

    Args:
        formats: The format of every stretch.
        counts: How many rows every stretch has.
        like: A tensor of the dtype, float32 or float64, and the device of those that will be rounded.
    """
    if len(set(formats)) == 1 and formats[0].uniform:
        return lambda x: rounding.round_(x, formats[0])
    cells = {format: _cells(format, like) for format in set(formats)}
    if all(found is not None for found in cells.values()):
        return _Table.of([found for format in formats if (found := cells[format])], counts)
    own = {format: rounder([format], [1], like) for format in cells if cells[format] or format.uniform}

    def apart(x: Tensor) -> Tensor:
        pieces = zip(x.split(list(counts), dim=-1), formats, strict=True)
        return torch.cat(
            [own[f](piece) if f in own else rounding.round_(piece, f) for piece, f in pieces], -1
        )

    return apart


@dataclass(frozen=True)
class _Cells:
    """The cells of one format. Number x lies in cell ``x * slope + shift``, cut off at both ends.

    Attributes:
        slope: Cells per unit.
        shift: The place of 0.
        borders: The border in every cell, or one beyond it, [cells].
        values: The values below and above each of these, [2 * cells].
    """

    slope: float
    shift: float
    borders: Tensor
    values: Tensor


def _cells(format: Format, like: Tensor) -> _Cells | None:
    """The cells of a format, or None where it would take too many."""
    values = torch.tensor(format.values, dtype=like.dtype, device=like.device)
    borders = (values[1:] + values[:-1]) / 2
    if len(borders) == 0:
        return None
    # A tie that goes up is a border one float lower.
    up = rounding.round_(borders.clone(), format) > borders
    borders = borders.where(~up, borders.nextafter(torch.full_like(borders, -torch.inf)))
    places = borders.double() - borders[0].double()
    slope = 1 / float(places.diff().min()) if len(places) > 1 else 1.0
    while float(places[-1]) * slope < _MOST_CELLS:
        at = places * slope + 0.5
        inside = at - at.floor()
        if bool((inside > _MARGIN).all() and (inside < 1 - _MARGIN).all() and (at.floor().diff() > 0).all()):
            cells = at.long()  # ascending, the first is 0
            number = torch.searchsorted(cells, torch.arange(int(cells[-1]) + 1, device=like.device))
            pairs = torch.stack([values[number], values[number + 1]], dim=1)
            return _Cells(slope, 0.5 - float(borders[0]) * slope, borders[number], pairs.flatten())
        slope *= 1.01
    return None


@final
@dataclass(frozen=True)
class _Table:
    """Cells of several formats one after the other, and those of every row: slope, shift, first and last cell [r] each."""

    slope: Tensor
    shift: Tensor
    first: Tensor
    last: Tensor
    borders: Tensor
    values: Tensor

    @staticmethod
    def of(cells: Sequence[_Cells], counts: Sequence[int]) -> _Table:
        like, start, rows = cells[0].borders, 0, []
        for own in cells:
            size = len(own.borders)
            rows.append([own.slope, own.shift + start, start, start + size - 1])
            start += size
        each = torch.tensor(rows, dtype=torch.float64, device=like.device)
        of_rows = each.repeat_interleave(torch.tensor(counts, device=like.device), 0).to(like.dtype)
        slope, shift, first, last = (column.contiguous() for column in of_rows.T)
        borders, values = torch.cat([own.borders for own in cells]), torch.cat([own.values for own in cells])
        return _Table(slope, shift, first, last, borders, values)

    def __call__(self, x: Tensor) -> Tensor:
        place = torch.addcmul(self.shift, x, self.slope)
        cell = torch.minimum(torch.maximum(place, self.first), self.last).int().flatten()
        above = x.flatten() > self.borders.index_select(0, cell)
        return self.values.index_select(0, torch.add(above, cell, alpha=2)).view(x.shape)
