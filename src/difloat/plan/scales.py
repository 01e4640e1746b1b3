"""Which scale belongs to which weights: scales in the shape of a weight, and a weight in the shape of its scales."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from difloat.numbers import rounding
from difloat.numbers.formats import Format
from difloat.plan.specs import QuantSpec


def expand_scale(scale: Tensor, spec: QuantSpec, shape: Sequence[int]) -> Tensor:
    """Stored weight scales (or zero points) in a shape that broadcasts with the weight [o, i, *k]."""
    out_channels, in_channels, *kernel = shape
    ones = [1] * len(kernel)
    if spec.granularity == "tensor":
        return scale.reshape(1, 1, *ones)
    if spec.granularity == "channel":
        return scale.reshape(out_channels, 1, *ones)
    assert spec.group_size is not None
    size = min(spec.group_size, in_channels)  # a group may be larger than the row, by far in a hostile file
    groups = scale.reshape(out_channels, -1).repeat_interleave(size, dim=1)[:, :in_channels]
    return groups.reshape(out_channels, in_channels, *ones)


def rows_of(weight: Tensor, spec: QuantSpec) -> Tensor:
    """The weight [o, i, *k] with one row per scale, [scales, values]: what a search over scales looks at.

    The last group of a row is padded with zeros if `i` is no multiple of the group size: zeros are on every grid.
    """
    if spec.granularity == "tensor":
        return weight.reshape(1, -1)
    if spec.granularity == "channel":
        return weight.flatten(1)
    assert spec.group_size is not None
    size = spec.group_size
    channels_last = weight.movedim(1, -1)
    padded = torch.nn.functional.pad(channels_last, (0, -weight.shape[1] % size)).unflatten(-1, (-1, size))
    return padded.movedim(-2, 1).reshape(weight.shape[0] * padded.shape[-2], -1)


def row_places(row_band: Tensor) -> Tensor:
    """Where every output channel lies among the stored rows, int64 [o], from the band of each."""
    return row_band.argsort(stable=True).argsort()


def fake_quantize(x: Tensor, format: Format, scale: Tensor, zero_point: Tensor | None = None) -> Tensor:
    """Round ``x`` to ``grid * scale + zero_point`` and stay in float; shapes broadcast.

    Gradients: straight-through to `x` inside the range, zero outside; to the scale by the product rule of the rounded
    value, as LSQ does (the rounding error inside the range, the end of the grid outside).
    """
    shifted = x if zero_point is None else x - zero_point
    rounded = rounding.round_straight_through(shifted / scale, format) * scale
    return rounded if zero_point is None else rounded + zero_point
