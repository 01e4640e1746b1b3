"""Backend "decoded": the native library rounds activations and decodes weights, and torch multiplies.

It serves layers without a product in integers: formats that do not fit int8 (E4M3, E3M4, ...), and activations that stay as
they are. Weights stay packed. One layer at a time is decoded into a buffer that all layers of a thread share. Results are
those of the reference, bit for bit.
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
from difloat.kernels.geometry import Geometry
from difloat.kernels.pieces import restored
from difloat.plan.specs import Part, QuantSpec
from difloat.plan.weight import Inputs, PackedWeight, Weight

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


def linear(x: Tensor, weight: Weight, inputs: Inputs, bias: Tensor | None) -> Tensor:
    """The linear layer of `reference.linear`. Decoded rows of all widths are alike, so it takes one product."""
    spec = weight.part.activation
    rows = x.reshape(-1, weight.part.channels if spec is None or not spec.group_size else spec.group_size)
    rounded = _rounded(rows, inputs, weight.part).reshape(x.shape)
    shift = None if bias is None else bias.to(x.dtype)
    return functional.linear(rounded, _decoded(weight, x.dtype), shift)


def conv2d(x: Tensor, weight: Weight, inputs: Inputs, bias: Tensor | None, geometry: Geometry) -> Tensor:
    """The convolution of `reference.conv2d`, as one convolution of torch."""
    last = torch.channels_last
    # A picture is one row of the rounding, in whatever order its numbers lie in memory.
    dense = x.contiguous(memory_format=last) if x.is_contiguous(memory_format=last) else x.contiguous()
    pictures = dense.as_strided((x.shape[0], math.prod(x.shape[1:])), (math.prod(x.shape[1:]), 1))
    rounded = _rounded(pictures, inputs, weight.part).as_strided(x.shape, dense.stride())
    shift = None if bias is None else bias.to(x.dtype)
    return geometry.convolve(rounded, _decoded(weight, x.dtype), shift)


def _rounded(rows: Tensor, inputs: Inputs, part: Part) -> Tensor:
    """Rows [t, i] rounded to their grid, as a dense tensor. Where scales are found per token, every row has its own."""
    spec = part.activation
    if spec is None or not rows.numel():
        return rows
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    out = rows.new_empty(rows.shape)
    # 0 stands for a stored scale, 1 for a scale per row, 2 for one of the whole tensor.
    online = 0 if not spec.online else 2 if spec.granularity == "tensor" else 1
    source = native_library.Input(
        rows.data_ptr(),
        *rows.shape,
        rows.stride(0),
        native_library.TYPES[rows.dtype],
        online,
        1.0 if inputs.scale is None else float(inputs.scale),
        0.0 if inputs.zero_point is None else float(inputs.zero_point),
        native_library.any_grid(spec.format),
    )
    native_library.check(
        native_library.library().difloat_round(source, out.data_ptr(), native_library.threads())
    )
    return out


def _decoded(weight: Weight, dtype: torch.dtype) -> Tensor:
    """The weight [o, i, *k] in the order of the float layer's rows, channels last, in this thread's buffer.

    The next layer overwrites it.
    """
    shape = (weight.out_channels, *weight.kernel, weight.part.channels)  # [o, *k, i]
    stored = _buffer(math.prod(shape), dtype).view(shape)
    start = 0
    for piece in weight.bands:
        _decode_into(stored[start : start + piece.rows], piece)
        start += piece.rows
    return restored(weight, stored).movedim(-1, 1)


def _decode_into(out: Tensor, piece: PackedWeight) -> None:
    codes, zero = piece.codes, piece.zero_point
    addresses = codes.data_ptr(), piece.scale.data_ptr(), None if zero is None else zero.data_ptr()
    source = native_library.weight(*addresses, codes.shape, codes.stride(), piece.part, None)
    found = native_library.values(piece.spec.format)
    kind, threads = native_library.TYPES[out.dtype], native_library.threads()
    if out.numel():
        native_library.check(
            native_library.library().difloat_decode(source, found, out.data_ptr(), kind, threads)
        )


def _buffer(count: int, dtype: torch.dtype) -> Tensor:
    """Memory for `count` numbers, which is kept because getting pages from the system costs as much as filling them."""
    found: Tensor | None = getattr(_buffers, "memory", None)
    size = count * _bytes(dtype)
    if found is None or found.numel() < size:
        found = _buffers.memory = torch.empty(size, dtype=torch.uint8)
    return found[:size].view(dtype)


@cache
def _bytes(dtype: torch.dtype) -> int:
    return torch.empty(0, dtype=dtype).element_size()
