"""Backend "decoded": the native library rounds activations and decodes weights, torch multiplies.

For what has no product in integers: formats that do not fit int8 (E4M3, E3M4, ...) and activations that stay as they are.
Weights stay packed; one layer at a time is decoded into a buffer that all layers of a thread share. Results are the
reference's, bit for bit.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional

from difloat.kernels import native_library
from difloat.kernels.weight import Rows
from difloat.plan.specs import Part, QuantSpec

_GROUP_MULTIPLE = 16  # channels: scales change between whole vectors
_buffers = threading.local()


def supports(part: Part, weight_shape: Sequence[int], x: Tensor) -> bool:
    """Whether this backend computes a part of a layer whose weight, of this part, has `weight_shape` [o, i, *k]."""
    size = part.weight.group_size or part.channels
    return (
        x.dtype in native_library.TYPES
        and x.device.type == "cpu"
        and native_library.unit() == "avx512"
        and (size >= part.channels or size % _GROUP_MULTIPLE == 0)
        and _rounds(part.activation, x)
    )


def _rounds(spec: QuantSpec | None, x: Tensor) -> bool:
    if spec is None:
        return True
    if spec.granularity == "group":
        assert spec.group_size is not None
        return not spec.zero_point and x.dim() != 4 and x.shape[-1] % spec.group_size == 0
    return not (spec.online and spec.zero_point)


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
    weight = _decoded(packed, weight_scale, weight_zero_point, part, x.dtype)
    return _linear(x, weight, input_scale, input_zero_point, bias, part)


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
    """See `reference.conv2d`."""
    weight = _decoded(packed, weight_scale, weight_zero_point, part, x.dtype)
    return _conv2d(x, weight, input_scale, input_zero_point, bias, part, stride, padding, dilation, groups)


def linear_rows(
    x: Tensor, weight: Rows, input_scale: Tensor | None, input_zero_point: Tensor | None, bias: Tensor | None
) -> Tensor:
    """`linear` with rows of several widths: decoded all are alike, so one product does."""
    decoded = _decoded_rows(weight, x.dtype)
    return _linear(x, decoded, input_scale, input_zero_point, bias, weight.parts[0])


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
    """`conv2d` with rows of several widths, in one product."""
    decoded, part = _decoded_rows(weight, x.dtype), weight.parts[0]
    return _conv2d(x, decoded, input_scale, input_zero_point, bias, part, stride, padding, dilation, groups)


def _linear(
    x: Tensor,
    weight: Tensor,
    input_scale: Tensor | None,
    input_zero_point: Tensor | None,
    bias: Tensor | None,
    part: Part,
) -> Tensor:
    spec = part.activation
    rows = x.reshape(-1, part.channels if spec is None or not spec.group_size else spec.group_size)
    rounded = _rounded(rows, input_scale, input_zero_point, part).reshape(x.shape)
    return functional.linear(rounded, weight, None if bias is None else bias.to(x.dtype))


def _conv2d(
    x: Tensor,
    weight: Tensor,
    input_scale: Tensor | None,
    input_zero_point: Tensor | None,
    bias: Tensor | None,
    part: Part,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    last = torch.channels_last
    dense = x.contiguous(memory_format=last) if x.is_contiguous(memory_format=last) else x.contiguous()
    pictures = dense.as_strided((x.shape[0], math.prod(x.shape[1:])), (math.prod(x.shape[1:]), 1))
    rounded = _rounded(pictures, input_scale, input_zero_point, part).as_strided(x.shape, dense.stride())
    shift = None if bias is None else bias.to(x.dtype)
    return functional.conv2d(rounded, weight, shift, list(stride), list(padding), list(dilation), groups)


def _rounded(rows: Tensor, scale: Tensor | None, zero: Tensor | None, part: Part) -> Tensor:
    """Rows, each with a scale of its own where scales are found per token, on their grid; dense."""
    spec = part.activation
    if spec is None or not rows.numel():
        return rows
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    out = rows.new_empty(rows.shape)
    online = 0 if not spec.online else 2 if spec.granularity == "tensor" else 1
    source = native_library.Input(
        rows.data_ptr(),
        *rows.shape,
        rows.stride(0),
        native_library.TYPES[rows.dtype],
        online,
        1.0 if scale is None else float(scale),
        0.0 if zero is None else float(zero),
        native_library.any_grid(spec.format),
    )
    native_library.check(
        native_library.library().difloat_round(source, out.data_ptr(), native_library.threads())
    )
    return out


def _decoded(packed: Tensor, scale: Tensor, zero: Tensor | None, part: Part, dtype: torch.dtype) -> Tensor:
    """The weight [o, i, *k], channels last, in this thread's buffer: gone with the next layer."""
    shape = (packed.shape[0], *packed.shape[2:], part.channels)
    out = _buffer(math.prod(shape), dtype).view(shape)
    _decode_into(out, packed, scale, zero, part)
    return out.movedim(-1, 1)


def _decoded_rows(weight: Rows, dtype: torch.dtype) -> Tensor:
    """Likewise of rows of several widths, in the order of the float layer: output channels of one group stay together."""
    shape = (len(weight.row_band), *weight.packed[0].shape[2:], weight.parts[0].channels)
    stored = _buffer(math.prod(shape), dtype).view(shape)
    start = 0
    for packed, scale, zero, part in weight.bands():
        _decode_into(stored[start : start + len(packed)], packed, scale, zero, part)
        start += len(packed)
    return weight.restored(stored).movedim(-1, 1)


def _decode_into(out: Tensor, packed: Tensor, scale: Tensor, zero: Tensor | None, part: Part) -> None:
    addresses = packed.data_ptr(), scale.data_ptr(), None if zero is None else zero.data_ptr()
    source = native_library.weight(*addresses, packed.shape, packed.stride(), part, None)
    found = native_library.values(part.weight.format)
    kind, threads = native_library.TYPES[out.dtype], native_library.threads()
    if out.numel():
        native_library.check(
            native_library.library().difloat_decode(source, found, out.data_ptr(), kind, threads)
        )


def _buffer(count: int, dtype: torch.dtype) -> Tensor:
    """Memory for `count` numbers that stays: getting pages from the system costs as much as filling them."""
    found: Tensor | None = getattr(_buffers, "memory", None)
    size = count * _bytes(dtype)
    if found is None or found.numel() < size:
        found = _buffers.memory = torch.empty(size, dtype=torch.uint8)
    return found[:size].view(dtype)


@cache
def _bytes(dtype: torch.dtype) -> int:
    return torch.empty(0, dtype=dtype).element_size()
