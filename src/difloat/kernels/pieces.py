"""Layers whose rows have several widths: backends compute piece after piece, and results get the float layer's order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from difloat.kernels.derived import derived
from difloat.plan.scales import row_places
from difloat.plan.weight import PackedWeight, Weight


def order(row_band: Tensor) -> Tensor:
    """The output channel of every stored row, int32 [o]. It is kept, since sorting takes as long as one token."""
    return derived("row order", (row_band,), lambda: row_band.argsort(stable=True).int())


def places(row_band: Tensor) -> Tensor:
    """The place where every output channel is stored, int32 [o], which is the inverse of `order`."""
    return derived("row places", (row_band,), lambda: row_places(row_band).int())


def restored(weight: Weight, stored: Tensor, axis: int = 0) -> Tensor:
    """A tensor whose `axis` runs over the stored rows, put in the order of the float layer's rows."""
    return stored if weight.row_band is None else stored.index_select(axis, places(weight.row_band))


def as_stored(weight: Weight, vector: Tensor | None) -> Tensor | None:
    """A vector with an entry per output channel, put in the order of the stored rows."""
    if vector is None or weight.row_band is None:
        return vector
    return vector.index_select(0, order(weight.row_band))


def shapes(weight: Weight) -> list[tuple[int, ...]]:
    """The shape [rows, i, *k] of the float weight of every band."""
    return [piece.shape for piece in weight.bands]


def part_key(pieces: Sequence[PackedWeight]) -> tuple[Any, ...]:
    """The parts of all bands, which name what is derived from them."""
    return tuple([piece.part for piece in pieces])
