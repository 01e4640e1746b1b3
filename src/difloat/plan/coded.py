"""A layer of a finished plan as a start of learned rounding: every weight may move to the next value of its own grid.

A weight of 0.9 on the grid 0, 1, 2 that second-order rounding sent to 0 may move to 1, and one that it sent to 1 may move to 0.
The neighbour is the one on the side of the float weight, so that further from it no weight ever moves than rounding sent it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import final

import torch
from torch import Tensor

from difloat.numbers.packing import unpack
from difloat.numbers.rounding import decode
from difloat.plan.encode import dequantize, join_rows, plan_layer
from difloat.plan.plan import LayerPlan
from difloat.plan.scales import expand_scale
from difloat.plan.specs import Part
from difloat.plan.weight import PackedWeight

_PULL = 0.45  # how far towards the float weight learning starts; below one half it starts at the codes


@final
@dataclass(frozen=True)
class Coded:
    """A layer with codes, which learned rounding takes in place of a `Draft`.

    Attributes:
        weight: Float [o, i, *k], the original values.
        layer: The formats, scales and codes; `startable` must hold for it.
    """

    weight: Tensor = field(repr=False)
    layer: LayerPlan

    @property
    def parts(self) -> tuple[Part, ...]:
        """The pieces of the input channels."""
        return self.layer.parts

    @property
    def error(self) -> float:
        """Sum of squared errors of the weight."""
        return float((self.weight.float() - dequantize(self.layer).to(self.weight.device)).square().sum())

    def plan(self, rounded: Tensor | None = None) -> LayerPlan:
        """The layer itself, or with values on its grids that were learned in place of its codes."""
        if rounded is None:
            return self.layer
        bands: list[list[PackedWeight]] = [
            list(band) for band in zip(*self.layer.weight().columns, strict=True)
        ]
        done = []
        for rows, pieces in zip(self._rows(), bands, strict=True):
            # Inputs are those of the layer, whose tensors stay.
            parts = [replace(piece.part, activation=None) for piece in pieces]
            scales = [piece.scale for piece in pieces]
            zeros = [torch.zeros_like(p.scale) if p.zero_point is None else p.zero_point for p in pieces]
            done.append(plan_layer(rounded[rows.to(rounded.device)], parts, scales, weight_zero_points=zeros))
        codes = join_rows(done, torch.cat(self._rows())).tensors["weight"]
        return replace(self.layer, tensors={**self.layer.tensors, "weight": codes})

    def grid_neighbours(self) -> tuple[Tensor, Tensor, Tensor]:
        """For every weight its value, the next one towards the float weight, and where learning starts between them.

        The start is below one half, so that the nearer one is the value that it has. Where the float weight lies beyond the
        end of the grid, or on the value, both are the same.
        """
        here = torch.empty_like(self.weight, dtype=torch.float32)
        there, start = torch.empty_like(here), torch.empty_like(here)
        for rows, channels, piece in self._pieces():
            own = self.weight.float()[rows][:, channels]
            one, other, position = _neighbours(own, piece)
            for whole, values in ((here, one), (there, other), (start, position)):
                whole[rows, channels] = values
        return here, there, start

    def _rows(self) -> list[Tensor]:
        """The rows of every band."""
        if not self.layer.bands:
            return [torch.arange(self.layer.shape[0])]
        of_rows = self.layer.tensors["row_band"].cpu()
        return [(of_rows == band).nonzero()[:, 0] for band in range(len(self.layer.bands))]

    def _pieces(self) -> Iterator[tuple[Tensor, slice, PackedWeight]]:
        """The rectangles with their rows and input channels."""
        at = 0
        for column in self.layer.weight().columns:
            channels = slice(at, at + column[0].part.channels)
            for rows, piece in zip(self._rows(), column, strict=True):
                yield rows.to(self.weight.device), channels, piece
            at = channels.stop


def startable(layer: LayerPlan) -> bool:
    """Whether codes of the layer stand for its weight as a float block sees it, one weight and nothing beside it."""
    return not (layer.smoothed or layer.schedule or layer.side is not None)


def _neighbours(weight: Tensor, piece: PackedWeight) -> tuple[Tensor, Tensor, Tensor]:
    spec = piece.spec
    codes = unpack(piece.codes, spec.format.bits, piece.part.channels)
    now = decode(codes, spec.format).to(weight.device)
    scale = expand_scale(piece.scale, spec, piece.shape).to(weight.device)
    zero = torch.zeros_like(piece.scale) if piece.zero_point is None else piece.zero_point
    offset = expand_scale(zero, spec, piece.shape).to(weight.device)
    wanted = (weight - offset) / scale  # in units of the grid, as `now`
    grid = torch.tensor(spec.format.values, device=weight.device)
    step = (wanted - now).sign().long()
    index = torch.searchsorted(grid, now) + step
    other = grid[index.clamp(0, len(grid) - 1)]
    share = ((wanted - now) / torch.where(other == now, 1.0, other - now)).clamp(0, 1)
    share = torch.where(other == now, 0.0, share)
    return now * scale + offset, other * scale + offset, _PULL * share
