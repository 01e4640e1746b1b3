"""Calls of the native library that are prepared once per layer, so that each call only reads its input and calls.

The input is rounded once for all rows, however many widths they have, and every row of the weight writes its output channel
where the float layer has it.

A prepared call holds addresses and none of the layer's tensors, so that a layer that is offloaded gives its memory back. Its
caller knows whether the tensors still lie where they lay (`layers.prepared`). Structs that change are made per call, so threads
share none.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Sequence
from functools import cache, lru_cache
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from difloat.kernels import checks, native_library, pieces
from difloat.kernels.geometry import Geometry, memory_format
from difloat.plan.specs import Part, QuantSpec
from difloat.plan.weight import PackedWeight, Weight

Call = Callable[[Tensor, Tensor | None, Tensor | None, Tensor | None], Tensor]
"""A function of the input, its scale, its zero point and the bias, which returns the result."""

MOST_SIZES = 64  # of pictures, whose geometry is kept


def linear(weight: Weight, dtype: torch.dtype) -> Call:
    """The product in integers with one weight of one part, for inputs [..., i] of one dtype whose width was checked."""
    product, output = native_library.library().difloat_linear, native_library.Output
    bands, order = _bands(weight), channel_order(weight)
    kind, channels, out_channels = input_kind(weight.part, dtype), weight.part.channels, weight.out_channels
    from_kind = native_library.Input.from_buffer_copy

    def call(x: Tensor, scale: Tensor | None, zero: Tensor | None, bias: Tensor | None) -> Tensor:
        rows = x if x.dim() == 2 else x.reshape(-1, channels)
        if rows.stride(1) != 1:
            rows = rows.contiguous()
        tokens = rows.shape[0]
        out = x.new_empty((*x.shape[:-1], out_channels))
        if not tokens:
            return out
        source = from_kind(kind)
        source.data, source.rows, source.stride = rows.data_ptr(), tokens, rows.stride(0)
        if scale is not None:
            source.scale = float(scale)
        if zero is not None:
            source.zero_point = float(zero)
        shift = None if bias is None else bias.detach().float().contiguous()
        bias_at = None if shift is None else shift.data_ptr()
        threads = native_library.threads(tokens * channels * out_channels)
        for structs, count, start in bands:
            to = None if order is None else order.data_ptr() + 4 * start
            status = product(
                source, structs, count, output(out.data_ptr(), bias_at, to, out_channels), threads
            )
            if status:
                native_library.check(status)
        return out

    return call


def conv2d(weight: Weight, dtype: torch.dtype, geometry: Geometry) -> Call:
    """A prepared convolution from [b, i, h, w] to [b, o, h', w'], with results in the memory format of the operator."""
    product, output = native_library.library().difloat_conv2d, native_library.Output
    bands, order = _bands(weight), channel_order(weight)
    kind, channels, out_channels = input_kind(weight.part, dtype), weight.part.channels, weight.out_channels
    from_kind, last = native_library.Input.from_buffer_copy, torch.channels_last
    terms, kernel = channels * math.prod(weight.kernel), tuple(weight.kernel)
    # Bands are cut out of one row of bytes, so only a single one has a layout of its own.
    weight_last = order is None and memory_format(weight.bands[0].codes) == last
    sizes: dict[tuple[int, int, int], Any] = {}

    def call(x: Tensor, scale: Tensor | None, zero: Tensor | None, bias: Tensor | None) -> Tensor:
        batch, _, height, width = x.shape
        shape = sizes.get((batch, height, width))
        if shape is None:
            checks.reach((height, width), kernel, geometry)
            if len(sizes) >= MOST_SIZES:
                sizes.clear()
            shape = sizes[batch, height, width] = native_geometry(geometry, batch, (height, width), kernel)
        rows, columns = shape.out
        as_last = weight_last or (x.is_contiguous(memory_format=last) and not x.is_contiguous())
        out = x.new_empty((batch, rows, columns, out_channels))
        if out.numel():
            pictures = x.contiguous(memory_format=last)
            source = from_kind(kind)
            source.data, source.rows, source.stride = pictures.data_ptr(), batch * height * width, channels
            if scale is not None:
                source.scale = float(scale)
            if zero is not None:
                source.zero_point = float(zero)
            shift = None if bias is None else bias.detach().float().contiguous()
            bias_at = None if shift is None else shift.data_ptr()
            threads = native_library.threads(out.numel() * terms)
            for structs, count, start in bands:
                to = None if order is None else order.data_ptr() + 4 * start
                target = output(out.data_ptr(), bias_at, to, out_channels)
                status = product(source, structs, count, target, shape, threads)
                if status:
                    native_library.check(status)
        return out.permute(0, 3, 1, 2).contiguous(memory_format=last if as_last else torch.contiguous_format)

    return call


def _bands(weight: Weight) -> list[tuple[Any, int, int]]:
    """The weight's structs, how many there are, and how many rows lie before them. Bands grouped alike share an entry."""
    found, start = [], 0
    for _, alike in groupby(weight.bands, lambda piece: piece.spec.group_size or weight.part.channels):
        members = list(alike)
        structs = (native_library.Weight * len(members))(*[native_weight(piece) for piece in members])
        found.append((structs, len(members), start))
        start += sum(piece.rows for piece in members)
    return found


def channel_order(weight: Weight) -> Tensor | None:
    """The output channel of every stored row, int32 [o], or None where rows lie in the order of the float layer."""
    return None if weight.row_band is None else pieces.order(weight.row_band)


@cache
def input_kind(part: Part, dtype: torch.dtype) -> native_library.Input:
    """The fields that all inputs of a part have in common. Copying them is faster than filling in every field."""
    spec = part.activation
    assert spec is not None
    grid, group = native_library.grid(spec.format), min(spec.group_size or part.channels, part.channels)
    kind = native_library.TYPES[dtype]
    return native_library.Input(None, 0, part.channels, 0, kind, online(spec), 1.0, 0.0, grid, group)


def online(spec: QuantSpec) -> int:
    """The source of an input's scales in the library's numbers.

    0 is stored, 1 per token (or group of its channels), 2 per tensor, and 3 as 1 with a zero point.
    """
    if not spec.online:
        return 0
    return 2 if spec.granularity == "tensor" else 3 if spec.zero_point else 1


def native_geometry(
    geometry: Geometry, batch: int, size: Sequence[int], kernel: Sequence[int]
) -> native_library.Geometry:
    """The geometry of a convolution on `batch` pictures of `size`, as the library reads it."""
    pair, extent = ctypes.c_int64 * 2, geometry.size(size, kernel)
    numbers = (size, kernel, geometry.stride, geometry.padding, geometry.dilation, extent)
    return native_library.Geometry(batch, *[pair(*two) for two in numbers])


def native_weight(piece: PackedWeight) -> native_library.Weight:
    """The struct of a packed weight, which holds addresses. Its tensors must outlive it."""
    zero = None if piece.zero_point is None else piece.zero_point.data_ptr()
    addresses = piece.codes.data_ptr(), piece.scale.data_ptr(), zero
    return _weight_at(*addresses, piece.codes.shape, piece.codes.stride(), piece.part)


# As many as a large model has layers, since filling in a struct takes a quarter of a small layer's time.
@lru_cache(maxsize=1 << 14)
def _weight_at(
    data: int, scale: int, zero: int | None, shape: Sequence[int], stride: Sequence[int], part: Part
) -> native_library.Weight:
    codes = native_library.codes(part.weight.format)
    return native_library.weight(data, scale, zero, shape, stride, part, codes)
