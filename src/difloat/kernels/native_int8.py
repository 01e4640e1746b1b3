"""Backend "cpu": the native library reads packed weights as they are stored, and keeps nothing else in memory.

One call quantizes the input, multiplies in integers and writes the result in the input's dtype (``csrc/``, docs/kernels.md).
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from functools import cache, lru_cache

import torch
from torch import Tensor

from difloat.kernels import integer_operands, native_library
from difloat.kernels.geometry import Geometry
from difloat.kernels.pieces import by_piece
from difloat.plan.specs import Part
from difloat.plan.weight import Inputs, PackedWeight, Weight

_GROUP_MULTIPLE = 16  # channels: sums of a group are taken from whole vectors
_AVX2_RANGE = 128  # of the weights' integers: beyond it sums of 16 bits would saturate


def supports(part: Part, weight_shape: Sequence[int], x: Tensor) -> bool:
    """Whether this backend computes a part of a layer whose weight, of this part, has `weight_shape` [o, i, *k]."""
    return (
        x.dtype in native_library.TYPES
        and x.device.type == "cpu"
        and _computes(part, math.prod(weight_shape[1:]), len(weight_shape))
        and (len(weight_shape) == 2 or x.shape[1] == weight_shape[1])  # no groups of channels
    )


def _computes(part: Part, terms: int, axes: int) -> bool:
    size = _group(part)
    return (
        integer_operands.reason_against(part) is None
        and integer_operands.sums_fit(part, terms)
        and (size >= part.channels or (size % _GROUP_MULTIPLE == 0 and axes == 2))
        and (native_library.unit() == "avx512" or _range(part) <= _AVX2_RANGE)
    )


def _group(part: Part) -> int:
    return part.weight.group_size or part.channels


def _range(part: Part) -> int:
    format = part.weight.format
    return round((format.max - format.min) * (format.int8_multiplier() or 0))


def linear(x: Tensor, weight: Weight, inputs: Inputs, bias: Tensor | None) -> Tensor:
    """The linear layer of `reference.linear`, from [..., i] to [..., o], piece by piece."""
    return by_piece(_linear, x, weight, inputs, bias)


def _linear(x: Tensor, piece: PackedWeight, inputs: Inputs, bias: Tensor | None) -> Tensor:
    rows = x if x.dim() == 2 else x.reshape(-1, piece.part.channels)
    if rows.stride(1) != 1:
        rows = rows.contiguous()
    out = x.new_empty((*x.shape[:-1], piece.rows))
    if not out.numel():
        return out
    source = _input(rows, x.dtype, inputs, piece.part)
    shift = _shift(bias)
    result = native_library.Output(out.data_ptr(), None if shift is None else shift.data_ptr())
    threads = native_library.threads(rows.numel() * piece.rows)
    native_library.check(
        native_library.library().difloat_linear(source, native_weight(piece), result, threads)
    )
    return out


def conv2d(x: Tensor, weight: Weight, inputs: Inputs, bias: Tensor | None, geometry: Geometry) -> Tensor:
    """The convolution of `reference.conv2d`, piece by piece. The result is channels last."""
    return by_piece(_conv2d, x, weight, inputs, bias, geometry)


def _conv2d(
    x: Tensor, piece: PackedWeight, inputs: Inputs, bias: Tensor | None, geometry: Geometry
) -> Tensor:
    batch, channels, *size = x.shape
    kernel = piece.codes.shape[2:]
    extent = geometry.size(size, kernel)
    out = x.new_empty(batch, *extent, piece.rows)
    if not out.numel():
        return out.permute(0, 3, 1, 2)
    pictures = x.contiguous(memory_format=torch.channels_last)
    # Channels last, so that a pixel is a row [b * h * w, i] as a token is.
    pixels = pictures.as_strided((batch * math.prod(size), channels), (channels, 1))
    source = _input(pixels, x.dtype, inputs, piece.part)
    shift = _shift(bias)
    result = native_library.Output(out.data_ptr(), None if shift is None else shift.data_ptr())
    shape = native_geometry(geometry, batch, tuple(size), tuple(kernel))
    threads = native_library.threads(out.numel() * channels * math.prod(kernel))
    native_library.check(
        native_library.library().difloat_conv2d(source, native_weight(piece), result, shape, threads)
    )
    return out.permute(0, 3, 1, 2)


def native_geometry(
    geometry: Geometry, batch: int, size: Sequence[int], kernel: Sequence[int]
) -> native_library.Geometry:
    """The geometry of a convolution on `batch` pictures of `size`, as the library reads it."""
    pair, extent = ctypes.c_int64 * 2, geometry.size(size, kernel)
    numbers = (size, kernel, geometry.stride, geometry.padding, geometry.dilation, extent)
    return native_library.Geometry(batch, *[pair(*two) for two in numbers])


def _shift(bias: Tensor | None) -> Tensor | None:
    """The bias as the library reads it."""
    return None if bias is None else bias.detach().float().contiguous()


def _input(rows: Tensor, dtype: torch.dtype, inputs: Inputs, part: Part) -> native_library.Input:
    found = native_library.Input.from_buffer_copy(input_kind(part, dtype))
    found.data, found.rows, found.stride = rows.data_ptr(), rows.shape[0], rows.stride(0)
    if inputs.scale is not None:
        found.scale = float(inputs.scale)
    if inputs.zero_point is not None:
        found.zero_point = float(inputs.zero_point)
    return found


@cache
def input_kind(part: Part, dtype: torch.dtype) -> native_library.Input:
    """The fields that all inputs of a part have in common. Copying them is faster than filling in every field."""
    spec = part.activation
    assert spec is not None
    online = 0 if not spec.online else 1 if spec.granularity == "token" else 2
    return native_library.Input(
        None,
        0,
        part.channels,
        0,
        native_library.TYPES[dtype],
        online,
        1.0,
        0.0,
        native_library.grid(spec.format),
    )


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
    return native_library.weight(
        data, scale, zero, shape, stride, part, native_library.codes(part.weight.format)
    )
