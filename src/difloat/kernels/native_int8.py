"""Backend "cpu": the native library. Packed weights are read as they are stored; nothing else stays in memory.

One call quantizes the input, multiplies in integers and writes the result in the input's dtype (``csrc/``; docs/kernels.md).
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from functools import cache, lru_cache

import torch
from torch import Tensor

from difloat.kernels import integer_operands, native_library
from difloat.kernels.reference import conv_output_size
from difloat.kernels.weight import Rows, by_band
from difloat.plan.specs import Part

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


def linear(
    x: Tensor,
    packed: Tensor,
    weight_scale: Tensor,
    weight_zero_point: Tensor | None,
    input_scale: Tensor | None,
    input_zero_point: Tensor | None,
    bias: Tensor | None,
    part: Part,
) -> Tensor:
    """See `reference.linear`; [..., i] to [..., o]."""
    rows = x if x.dim() == 2 else x.reshape(-1, part.channels)
    if rows.stride(1) != 1:
        rows = rows.contiguous()
    out = x.new_empty((*x.shape[:-1], packed.shape[0]))
    if not out.numel():
        return out
    source = _input(rows.data_ptr(), rows.shape[0], rows.stride(0), x, input_scale, input_zero_point, part)
    weight = _weight(packed, weight_scale, weight_zero_point, part)
    shift = _shift(bias)
    result = native_library.Output(out.data_ptr(), None if shift is None else shift.data_ptr())
    threads = native_library.threads(rows.numel() * packed.shape[0])
    native_library.check(native_library.library().difloat_linear(source, weight, result, threads))
    return out


def conv2d(
    x: Tensor,
    packed: Tensor,
    weight_scale: Tensor,
    weight_zero_point: Tensor | None,
    input_scale: Tensor | None,
    input_zero_point: Tensor | None,
    bias: Tensor | None,
    part: Part,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """See `reference.conv2d`; the result is channels last."""
    batch, channels, *size = x.shape
    kernel = packed.shape[2:]
    extent = conv_output_size(size, kernel, stride, padding, dilation)
    out = x.new_empty(batch, *extent, packed.shape[0])
    if not out.numel():
        return out.permute(0, 3, 1, 2)
    pictures = x.contiguous(memory_format=torch.channels_last)
    pixels = batch * math.prod(size)
    source = _input(pictures.data_ptr(), pixels, channels, x, input_scale, input_zero_point, part)
    weight = _weight(packed, weight_scale, weight_zero_point, part)
    shift = _shift(bias)
    result = native_library.Output(out.data_ptr(), None if shift is None else shift.data_ptr())
    pair = ctypes.c_int64 * 2
    pairs = (pair(*numbers) for numbers in (size, kernel, stride, padding, dilation, extent))
    threads = native_library.threads(out.numel() * channels * math.prod(kernel))
    native_library.check(
        native_library.library().difloat_conv2d(
            source, weight, result, native_library.Geometry(batch, *pairs), threads
        )
    )
    return out.permute(0, 3, 1, 2)


def linear_rows(
    x: Tensor, weight: Rows, input_scale: Tensor | None, input_zero_point: Tensor | None, bias: Tensor | None
) -> Tensor:
    """`linear` with rows of several widths, band by band."""
    return by_band(linear, x, weight, input_scale, input_zero_point, bias)


def conv2d_rows(
    x: Tensor,
    weight: Rows,
    input_scale: Tensor | None,
    input_zero_point: Tensor | None,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """`conv2d` with rows of several widths, band by band."""
    geometry = (stride, padding, dilation, groups)
    return by_band(conv2d, x, weight, input_scale, input_zero_point, bias, *geometry)


def _shift(bias: Tensor | None) -> Tensor | None:
    """The bias as the library reads it."""
    return None if bias is None else bias.detach().float().contiguous()


def _input(
    address: int, rows: int, stride: int, x: Tensor, scale: Tensor | None, zero: Tensor | None, part: Part
) -> native_library.Input:
    found = native_library.Input.from_buffer_copy(_input_kind(part, x.dtype))
    found.data, found.rows, found.stride = address, rows, stride
    if scale is not None:
        found.scale = float(scale)
    if zero is not None:
        found.zero_point = float(zero)
    return found


@cache
def _input_kind(part: Part, dtype: torch.dtype) -> native_library.Input:
    """What all inputs of a part have in common: copying it is faster than filling in every field."""
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


def _weight(packed: Tensor, scale: Tensor, zero: Tensor | None, part: Part) -> native_library.Weight:
    """The struct holds addresses: its tensors must outlive it."""
    addresses = packed.data_ptr(), scale.data_ptr(), None if zero is None else zero.data_ptr()
    return _weight_at(*addresses, packed.shape, packed.stride(), part)


@lru_cache(
    maxsize=1 << 14
)  # layers of a large model; a filled-in struct is a quarter of a small layer's time
def _weight_at(
    data: int, scale: int, zero: int | None, shape: Sequence[int], stride: Sequence[int], part: Part
) -> native_library.Weight:
    return native_library.weight(
        data, scale, zero, shape, stride, part, native_library.codes(part.weight.format)
    )
