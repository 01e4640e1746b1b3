"""Backend "decoded": the native library rounds activations and decodes weights, and torch multiplies.

It serves layers without a product in integers: formats that do not fit int8 (E4M3, E3M4, ...), and activations that stay as
they are. Weights stay packed. One layer at a time is decoded into a buffer that all layers of a thread share. Layers whose
calls are prepared keep their decoded weight instead, as far as ``DIFLOAT_DECODED_MB`` allows (0 without it). Results are
those of the reference, bit for bit.
"""

from __future__ import annotations

import math
import os
import threading
import weakref
from collections.abc import Callable, Hashable, Sequence
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional

from difloat.kernels import checks, native_library, native_prepared
from difloat.kernels.geometry import Geometry, memory_format
from difloat.plan.specs import Part, QuantSpec
from difloat.plan.weight import Inputs, Weight

_GROUP_MULTIPLE = 16  # channels: scales change between whole vectors
_VARIABLE = "DIFLOAT_DECODED_MB"
_buffers = threading.local()
_kept: weakref.WeakValueDictionary[Hashable, Tensor] = (
    weakref.WeakValueDictionary()
)  # dies with the calls that hold it


def supports(part: Part, weight_shape: Sequence[int], x: Tensor) -> bool:
    """Whether this backend computes a part of a layer whose weight, of this part, has `weight_shape` [o, i, *k]."""
    size = part.weight.group_size or part.channels
    return (
        x.dtype in native_library.TYPES
        and x.device.type == "cpu"
        and native_library.unit() is not None
        and (size >= part.channels or size % _GROUP_MULTIPLE == 0)
        and _rounds(part.activation, x)
    )


def _rounds(spec: QuantSpec | None, x: Tensor) -> bool:
    if spec is None:
        return True
    if spec.granularity == "group":
        assert spec.group_size is not None
        return x.dim() != 4 and x.shape[-1] % spec.group_size == 0
    return not (spec.online and spec.zero_point and spec.granularity == "tensor")


def linear(x: Tensor, weight: Weight, inputs: Inputs, bias: Tensor | None) -> Tensor:
    """The linear layer of `reference.linear`. Decoded rows of all widths are alike, so it takes one product."""
    return _linear(weight, x.dtype, _decoding(weight, x.dtype))(x, inputs.scale, inputs.zero_point, bias)


def conv2d(x: Tensor, weight: Weight, inputs: Inputs, bias: Tensor | None, geometry: Geometry) -> Tensor:
    """The convolution of `reference.conv2d`, as one convolution of torch."""
    return _conv2d(weight, x.dtype, geometry, _decoding(weight, x.dtype))(
        x, inputs.scale, inputs.zero_point, bias
    )


def prepared_linear(weight: Weight, dtype: torch.dtype) -> native_prepared.Call:
    """`linear` prepared for one weight, and for inputs of one dtype whose width was checked (`native_prepared`)."""
    return _linear(weight, dtype, _keeping(weight, dtype))


def _linear(weight: Weight, dtype: torch.dtype, decoded: Callable[[], Tensor]) -> native_prepared.Call:
    spec = weight.part.activation
    width = weight.part.channels if spec is None or not spec.group_size else spec.group_size
    rounded = _rounding(weight.part, dtype)

    def call(x: Tensor, scale: Tensor | None, zero: Tensor | None, bias: Tensor | None) -> Tensor:
        rows = rounded(x.reshape(-1, width), scale, zero).reshape(x.shape)
        return functional.linear(rows, decoded(), None if bias is None else bias.to(dtype))

    return call


def prepared_conv2d(weight: Weight, dtype: torch.dtype, geometry: Geometry) -> native_prepared.Call:
    """`conv2d` prepared for one weight, with results in the memory format of the operator."""
    return _conv2d(weight, dtype, geometry, _keeping(weight, dtype))


def _conv2d(
    weight: Weight, dtype: torch.dtype, geometry: Geometry, decoded: Callable[[], Tensor]
) -> native_prepared.Call:
    rounded = _rounding(weight.part, dtype)
    last, kernel = torch.channels_last, tuple(weight.kernel)
    weight_last = weight.row_band is None and memory_format(weight.bands[0].codes) == last
    sizes: set[torch.Size] = set()  # of pictures that the kernel reaches

    def call(x: Tensor, scale: Tensor | None, zero: Tensor | None, bias: Tensor | None) -> Tensor:
        shape = x.shape
        if shape not in sizes:
            checks.reach(shape[2:], kernel, geometry)
            if len(sizes) >= native_prepared.MOST_SIZES:
                sizes.clear()
            sizes.add(shape)
        input_last = x.is_contiguous(memory_format=last)
        # A picture is one row of the rounding, in whatever order its numbers lie in memory.
        dense = x.contiguous(memory_format=last) if input_last else x.contiguous()
        values = shape[1] * shape[2] * shape[3]
        pictures = dense.as_strided((shape[0], values), (values, 1))
        rows = rounded(pictures, scale, zero).as_strided(shape, dense.stride())
        out = geometry.convolve(rows, decoded(), None if bias is None else bias.to(dtype))
        as_last = weight_last or (input_last and not x.is_contiguous())
        return out.contiguous(memory_format=last if as_last else torch.contiguous_format)

    return call


def _rounding(part: Part, dtype: torch.dtype) -> Callable[[Tensor, Tensor | None, Tensor | None], Tensor]:
    """A function that rounds rows [t, i] to their grid, densely. Where scales are found per token, every row has its own."""
    spec = part.activation
    if spec is None:
        return lambda rows, scale, zero: rows
    round_rows, from_kind = native_library.library().difloat_round, native_library.Input.from_buffer_copy
    grid, online = native_library.any_grid(spec.format), native_prepared.online(spec)
    kind = native_library.Input(None, 0, 0, 0, native_library.TYPES[dtype], online, 1.0, 0.0, grid, 0)

    def rounded(rows: Tensor, scale: Tensor | None, zero: Tensor | None) -> Tensor:
        if not rows.numel():
            return rows
        rows = rows if rows.stride(1) == 1 else rows.contiguous()
        out = rows.new_empty(rows.shape)
        source = from_kind(kind)
        source.data, source.stride = rows.data_ptr(), rows.stride(0)
        source.rows, source.channels = rows.shape
        if scale is not None:
            source.scale = float(scale)
        if zero is not None:
            source.zero_point = float(zero)
        status = round_rows(source, out.data_ptr(), native_library.threads())
        if status:
            native_library.check(status)
        return out

    return rounded


@cache
def allowed_bytes() -> int:
    """How many bytes of decoded weights may be kept, by the environment variable.

    Raises:
        ValueError: if it is no whole number.
    """
    text = os.environ.get(_VARIABLE, "0")
    if not (text.isascii() and text.isdecimal()):
        raise ValueError(
            f"{_VARIABLE} must be a whole number of megabytes, got {text!r}; write for example 500"
        )
    return int(text) * 10**6


def kept_bytes() -> int:
    """How many bytes of decoded weights are kept now."""
    return sum(tensor.nbytes for tensor in list(_kept.values()))


def may_keep(weight: Weight, dtype: torch.dtype) -> bool:
    """Whether `prepared_linear` or `prepared_conv2d` would keep this weight decoded, or does already."""
    known = _key(_sources(weight), dtype) in _kept
    return known or 0 < decoded_bytes(weight, dtype) <= allowed_bytes() - kept_bytes()


def decoded_bytes(weight: Weight, dtype: torch.dtype) -> int:
    """The bytes of the decoded weight of one part."""
    return weight.out_channels * math.prod(weight.kernel) * weight.part.channels * _bytes(dtype)


def _sources(weight: Weight) -> list[Tensor]:
    """The stored tensors that a decoded weight is made from."""
    sources = [] if weight.row_band is None else [weight.row_band]
    for piece in weight.bands:
        sources += [piece.codes, piece.scale, *([] if piece.zero_point is None else [piece.zero_point])]
    return sources


def _key(sources: Sequence[Tensor], dtype: torch.dtype) -> Hashable:
    return (dtype, *[tensor.data_ptr() for tensor in sources])


def _keeping(weight: Weight, dtype: torch.dtype) -> Callable[[], Tensor]:
    """`_decoding` into memory of its own if that is allowed, and again only after the stored tensors were written to.

    The function holds the stored tensors, since it asks for their versions.
    """
    sources = _sources(weight)
    key = _key(sources, dtype)
    memory = _kept.get(key)  # of another class of token counts
    if memory is None:
        if not may_keep(weight, dtype):
            return _decoding(weight, dtype)
        memory = _kept[key] = torch.empty(decoded_bytes(weight, dtype), dtype=torch.uint8)
    decode = _decoding(weight, dtype, memory)
    versions: list[int] = []
    found: list[Tensor] = []

    def decoded() -> Tensor:
        now = [tensor._version for tensor in sources]
        if now != versions:
            found[:], versions[:] = [decode()], now
        return found[0]

    return decoded


def _decoding(weight: Weight, dtype: torch.dtype, memory: Tensor | None = None) -> Callable[[], Tensor]:
    """A function that decodes the weight [o, i, *k] in the float layer's order, channels last.

    Args:
        weight: The weight of one part.
        dtype: The dtype of the result.
        memory: The uint8 memory that holds it, or None for this thread's buffer, which the next layer overwrites.
    """
    decode, kind = native_library.library().difloat_decode, native_library.TYPES[dtype]
    shape = (weight.out_channels, *weight.kernel, weight.part.channels)  # [o, *k, i]
    order = native_prepared.channel_order(weight)
    bands, start, count = [], 0, math.prod(shape)
    row_bytes = _bytes(dtype) * math.prod(shape[1:])
    for piece in weight.bands:
        codes, zero = piece.codes, piece.zero_point
        addresses = codes.data_ptr(), piece.scale.data_ptr(), None if zero is None else zero.data_ptr()
        struct = native_library.weight(*addresses, codes.shape, codes.stride(), piece.part, None)
        bands.append((struct, native_library.values(piece.spec.format), start))
        start += piece.rows

    def decoded() -> Tensor:
        stored = (_buffer(count, dtype) if memory is None else memory.view(dtype)).view(shape)
        threads = native_library.threads()
        for struct, values, before in bands if count else ():
            to = stored.data_ptr() + (row_bytes * before if order is None else 0)
            channel = None if order is None else order.data_ptr() + 4 * before
            status = decode(struct, values, channel, to, kind, threads)
            if status:
                native_library.check(status)
        return stored.movedim(-1, 1)

    return decoded


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
