"""Layers whose rows have several widths: backends compute piece after piece, and results get the float layer's order."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from difloat.kernels.derived import derived
from difloat.plan.scales import row_places
from difloat.plan.weight import Inputs, PackedWeight, Weight

CHUNK_ROWS = 256


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


def by_piece(
    run: Callable[..., Tensor],
    x: Tensor,
    weight: Weight,
    inputs: Inputs,
    bias: Tensor | None,
    *geometry: Any,
) -> Tensor:
    """The result of a layer that is computed piece by piece. The results are put in order once, at the end.

    Args:
        run: A function that computes one `PackedWeight`, with the arguments of `linear` or `conv2d` of a backend. It rounds
            the input anew for each piece.
        x: The input of the layer.
        weight: The weight of one part.
        inputs: The scale and zero point of the input.
        bias: The bias [o], or None.
        *geometry: The geometry of a convolution.
    """
    if weight.row_band is None:
        return run(x, weight.bands[0], inputs, bias, *geometry)
    results, shift = [], as_stored(weight, bias)
    shifts: Sequence[Tensor | None] = [None] * len(weight.bands)
    if shift is not None:
        shifts = shift.split([piece.rows for piece in weight.bands])
    for piece, own in zip(weight.bands, shifts, strict=True):
        result = run(x, piece, inputs, own, *geometry)
        # Rows come last, so that bands of pictures are joined as those of tokens are.
        results.append(result.permute(0, 2, 3, 1) if geometry else result)
    out = joined(results, places(weight.row_band))
    return out.permute(0, 3, 1, 2) if geometry else out


def joined(results: Sequence[Tensor], row_places: Tensor) -> Tensor:
    """Results [..., rows] of the bands side by side [..., o], in the order of the float layer's rows."""
    count = row_places.shape[0]
    out = results[0].new_empty((*results[0].shape[:-1], count))
    rows, flat = out.view(-1, count), []  # loops, since every comprehension is a call of its own
    for result in results:
        flat.append(result.reshape(-1, result.shape[-1]))
    # In float32, which torch reorders five times as fast as half precision, and in pieces that stay in the cache.
    for start in range(0, rows.shape[0], CHUNK_ROWS):
        chunks = []
        for result in flat:
            chunks.append(result[start : start + CHUNK_ROWS])
        target = rows[start : start + CHUNK_ROWS]
        target.copy_(torch.cat(chunks, -1).float().index_select(-1, row_places))
    return out


def shapes(weight: Weight) -> list[tuple[int, ...]]:
    """The shape [rows, i, *k] of the float weight of every band."""
    return [piece.shape for piece in weight.bands]


def part_key(pieces: Sequence[PackedWeight]) -> tuple[Any, ...]:
    """The parts of all bands, which name what is derived from them."""
    return tuple([piece.part for piece in pieces])
