"""Scales in the shape of a weight, and a weight in the shape of its scales."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from difloat.numbers import rounding
from difloat.numbers.formats import Format
from difloat.plan.specs import QuantSpec


def expand_scale(scale: Tensor, spec: QuantSpec, shape: Sequence[int]) -> Tensor:
    """Stored weight scales, or zero points, in a shape that broadcasts with the weight [o, i, *k].

    >>> from difloat import formats
    >>> spec = QuantSpec(formats.parse("e2m1"), "group", group_size=2)
    >>> expand_scale(torch.tensor([1.0, 2.0]), spec, (1, 4))
    tensor([[1., 1., 2., 2.]])
    """
    out_channels, in_channels, *kernel = shape
    ones = [1] * len(kernel)
    if spec.granularity == "tensor":
        return scale.reshape(1, 1, *ones)
    if spec.granularity == "channel":
        return scale.reshape(out_channels, 1, *ones)
    assert spec.group_size is not None
    size = min(spec.group_size, in_channels)  # a group may be larger than the row, by far in a hostile file
    groups = scale.reshape(out_channels, -1).repeat_interleave(size, dim=1)[:, :in_channels]  # [o, i]
    return groups.reshape(out_channels, in_channels, *ones)


def rows_of(weight: Tensor, spec: QuantSpec) -> Tensor:
    """The weight [o, i, *k] with one row per scale, [scales, values], as a search over scales takes it.

    >>> from difloat import formats
    >>> rows_of(torch.arange(6.0).reshape(2, 3), QuantSpec(formats.parse("e2m1"), "group", group_size=2))
    tensor([[0., 1.],
            [2., 0.],
            [3., 4.],
            [5., 0.]])

    The last group of a row is padded with zeros, which are on every grid, if `i` is no multiple of the group size.
    """
    if spec.granularity == "tensor":
        return weight.reshape(1, -1)
    if spec.granularity == "channel":
        return weight.flatten(1)
    assert spec.group_size is not None
    size = spec.group_size
    channels_last = weight.movedim(1, -1)  # [o, *k, i]
    padded = torch.nn.functional.pad(channels_last, (0, -weight.shape[1] % size)).unflatten(
        -1, (-1, size)
    )  # [o, *k, groups, size]
    # [o, groups, *k, size]: a scale is shared by its channels at all kernel positions.
    return padded.movedim(-2, 1).reshape(weight.shape[0] * padded.shape[-2], -1)


def row_places(row_band: Tensor) -> Tensor:
    """The place of every output channel among the stored rows, int64 [o], found from the band of each."""
    # The first sort says which channel a stored row has, and the second inverts that permutation.
    return row_band.argsort(stable=True).argsort()


def fake_quantize(x: Tensor, format: Format, scale: Tensor, zero_point: Tensor | None = None) -> Tensor:
    """``x`` rounded to ``grid * scale + zero_point``, in float. Shapes broadcast.

    >>> from difloat import formats
    >>> fake_quantize(torch.tensor([0.3, 5.0]), formats.parse("e2m1"), torch.tensor(0.5))
    tensor([0.2500, 3.0000])

    The gradient to `x` is straight-through inside the range and zero outside. The gradient to the scale follows from the
    product rule of the rounded value, as in LSQ: the rounding error inside the range, and the end of the grid outside.
    """
    shifted = x if zero_point is None else x - zero_point
    rounded = rounding.round_straight_through(shifted / scale, format) * scale
    return rounded if zero_point is None else rounded + zero_point
