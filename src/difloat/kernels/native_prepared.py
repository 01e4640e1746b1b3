"""Calls of the native library that are prepared once per layer, so that each call only reads its input and calls.

A prepared call holds addresses and no tensors, so that a layer that is offloaded gives its memory back. Its caller knows
whether the tensors still lie where they lay (`layers.prepared`). Structs that change are made per call, so threads share none.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from difloat.kernels import checks, native_library, pieces
from difloat.kernels.geometry import Geometry, memory_format
from difloat.kernels.native_int8 import input_kind, native_geometry, native_weight
from difloat.plan.weight import Weight

Call = Callable[[Tensor, Tensor | None, Tensor | None, Tensor | None], Tensor]
"""A function of the input, its scale, its zero point and the bias, which returns the result."""

_MOST_SIZES = 64  # of pictures, whose geometry is kept


def linear(weight: Weight, dtype: torch.dtype, has_bias: bool) -> Call:
    """`native_int8.linear` prepared for the weight of one part, and for inputs of one dtype whose width was checked."""
    product, bands, order, places = _bands(weight, native_library.library().difloat_linear, has_bias)
    kind, channels, out_channels = input_kind(weight.part, dtype), weight.part.channels, weight.out_channels
    from_kind, output = native_library.Input.from_buffer_copy, native_library.Output

    def call(x: Tensor, scale: Tensor | None, zero: Tensor | None, bias: Tensor | None) -> Tensor:
        rows = x if x.dim() == 2 else x.reshape(-1, channels)
        if rows.stride(1) != 1:
            rows = rows.contiguous()
        lead, tokens = x.shape[:-1], rows.shape[0]
        if not tokens:
            return x.new_empty((*lead, out_channels))
        source = from_kind(kind)
        source.data, source.rows, source.stride = rows.data_ptr(), tokens, rows.stride(0)
        if scale is not None:
            source.scale = float(scale)
        if zero is not None:
            source.zero_point = float(zero)
        if bias is not None and order is not None:
            # Bands compute the rows in their stored order, so the bias is put in that order.
            bias = bias.index_select(0, order)
        results = []
        for struct, start, stop in bands:
            out = x.new_empty((*lead, stop - start))
            shift = None if bias is None else bias[start:stop].detach().float().contiguous()
            target = output(out.data_ptr(), None if shift is None else shift.data_ptr())
            status = product(
                source, struct, target, native_library.threads(tokens * channels * (stop - start))
            )
            if status:
                native_library.check(status)
            results.append(out)
        return results[0] if places is None else pieces.joined(results, places)

    return call


def conv2d(weight: Weight, dtype: torch.dtype, has_bias: bool, geometry: Geometry) -> Call:
    """`native_int8.conv2d` prepared for the weight of one part, in the memory format that `operators.conv2d` gives results."""
    product, bands, order, places = _bands(weight, native_library.library().difloat_conv2d, has_bias)
    kind, channels, out_channels = input_kind(weight.part, dtype), weight.part.channels, weight.out_channels
    from_kind, output, last = (
        native_library.Input.from_buffer_copy,
        native_library.Output,
        torch.channels_last,
    )
    terms, kernel = channels * math.prod(weight.kernel), tuple(weight.kernel)
    # Bands are cut out of one row of bytes, so only a single one has a layout of its own.
    weight_last = places is None and memory_format(weight.bands[0].codes) == last
    sizes: dict[tuple[int, int, int], Any] = {}

    def call(x: Tensor, scale: Tensor | None, zero: Tensor | None, bias: Tensor | None) -> Tensor:
        batch, _, height, width = x.shape
        shape = sizes.get((batch, height, width))
        if shape is None:
            checks.reach((height, width), kernel, geometry)
            if len(sizes) >= _MOST_SIZES:
                sizes.clear()
            shape = sizes[batch, height, width] = native_geometry(geometry, batch, (height, width), kernel)
        rows, columns = shape.out
        as_last = weight_last or (x.is_contiguous(memory_format=last) and not x.is_contiguous())
        if not batch * rows * columns:
            empty = x.new_empty((batch, out_channels, rows, columns))
            return empty.contiguous(memory_format=last if as_last else torch.contiguous_format)
        pictures = x.contiguous(memory_format=last)
        source = from_kind(kind)
        source.data, source.rows, source.stride = pictures.data_ptr(), batch * height * width, channels
        if scale is not None:
            source.scale = float(scale)
        if zero is not None:
            source.zero_point = float(zero)
        if bias is not None and order is not None:
            bias = bias.index_select(0, order)
        results = []
        for struct, start, stop in bands:
            out = x.new_empty((batch, rows, columns, stop - start))
            shift = None if bias is None else bias[start:stop].detach().float().contiguous()
            target = output(out.data_ptr(), None if shift is None else shift.data_ptr())
            status = product(source, struct, target, shape, native_library.threads(out.numel() * terms))
            if status:
                native_library.check(status)
            results.append(out)
        result = results[0] if places is None else pieces.joined(results, places)
        return result.permute(0, 3, 1, 2).contiguous(
            memory_format=last if as_last else torch.contiguous_format
        )

    return call


def _bands(
    weight: Weight, product: Any, has_bias: bool
) -> tuple[Any, list[tuple[Any, int, int]], Tensor | None, Tensor | None]:
    """The library's function, the struct and rows of every band, and the two orders of rows where there are several bands."""
    bands, start = [], 0
    for piece in weight.bands:
        bands.append((native_weight(piece), start, start + piece.rows))
        start += piece.rows
    if weight.row_band is None:
        return product, bands, None, None
    order = pieces.order(weight.row_band) if has_bias else None
    return product, bands, order, pieces.places(weight.row_band)
