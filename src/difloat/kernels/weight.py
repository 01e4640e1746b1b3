"""The weight of a layer whose rows (output channels) have several widths, as backends see it: one packed piece per band.

What every backend has to get right is the order: bands are stored one after the other, results are in the order of the float
layer's rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from difloat.kernels.derived import derived
from difloat.plan.scales import row_places
from difloat.plan.specs import Part

_CHUNK_ROWS = 256


@dataclass(frozen=True)
class Rows:
    """One part of such a layer.

    Attributes:
        packed: Per band uint8 [rows, bytes, *k].
        weight_scale: Per band, as many as the weight spec of its part asks for.
        weight_zero_point: Likewise, or None.
        row_band: uint8 [o], the band of every output channel; the rows of a band keep their order.
        parts: Per band; their activations and channels are the same.
    """

    packed: tuple[Tensor, ...]
    weight_scale: tuple[Tensor, ...]
    weight_zero_point: tuple[Tensor | None, ...]
    row_band: Tensor
    parts: tuple[Part, ...]

    def bands(self) -> Iterator[tuple[Tensor, Tensor, Tensor | None, Part]]:
        """Packed rows, scale, zero point and part of one band after the other."""
        return zip(self.packed, self.weight_scale, self.weight_zero_point, self.parts, strict=True)

    def shapes(self) -> list[tuple[int, ...]]:
        """Shape of the float weight of every band, [rows, i, *k]."""
        return [(p.shape[0], part.channels, *p.shape[2:]) for p, _, _, part in self.bands()]

    def order(self) -> Tensor:
        """The output channel that every stored row is, int32 [o]; kept, since sorting takes as long as one token."""
        return derived("row order", (self.row_band,), lambda: self.row_band.argsort(stable=True).int())

    def places(self) -> Tensor:
        """Where every output channel is stored, int32 [o]; the inverse of `order`."""
        return derived("row places", (self.row_band,), lambda: row_places(self.row_band).int())

    def restored(self, stored: Tensor, axis: int = 0) -> Tensor:
        """A tensor whose `axis` runs over the stored rows, in the order of the float layer's rows."""
        return stored.index_select(axis, self.places())

    def banded(self, vector: Tensor | None) -> Sequence[Tensor | None]:
        """A vector with an entry per output channel, cut into those of the bands; None for all if there is none."""
        if vector is None:
            return [None] * len(self.packed)
        return vector.index_select(0, self.order()).split([len(p) for p in self.packed])


def by_band(operator: Callable[..., Tensor], x: Tensor, weight: Rows, *rest: Any) -> Tensor:
    """A layer computed band by band: the input is rounded anew for each, and the results are put in order once.

    Args:
        operator: `linear` or `conv2d` of a backend.
        x: The input.
        weight: Of a part.
        *rest: Input scale, input zero point, bias and the geometry of a convolution.
    """
    input_scale, input_zero_point, bias, *geometry = rest
    results = []
    for (packed, scale, zero, part), shift in zip(weight.bands(), weight.banded(bias), strict=True):
        result = operator(x, packed, scale, zero, input_scale, input_zero_point, shift, part, *geometry)
        results.append(result.permute(0, 2, 3, 1) if geometry else result)
    joined = _joined(results, weight)
    return joined.permute(0, 3, 1, 2) if geometry else joined


def _joined(results: Sequence[Tensor], weight: Rows) -> Tensor:
    """Results [..., rows] of the bands side by side, in the order of the float layer's rows."""
    shape, places = (*results[0].shape[:-1], len(weight.row_band)), weight.places()
    out = results[0].new_empty(shape)
    flat = [result.reshape(-1, result.shape[-1]) for result in results]
    chunks = zip(*(result.split(_CHUNK_ROWS) for result in flat), strict=True)
    # In float32, which torch reorders five times as fast as half precision, and in pieces that stay in the cache.
    for target, pieces in zip(out.view(-1, shape[-1]).split(_CHUNK_ROWS), chunks, strict=True):
        target.copy_(torch.cat(pieces, -1).float().index_select(-1, places))
    return out
