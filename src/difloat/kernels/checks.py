"""Checks of the tensors of every operator, made before any backend takes a pointer.

A layer's stored tensors have the same shapes at every call. So what was found right once is remembered by shapes, strides,
dtypes and devices. The input is checked in every call.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from difloat.kernels.geometry import Geometry
from difloat.numbers.packing import packed_channels
from difloat.plan.specs import Part
from difloat.plan.weight import Branch, Inputs, PackedWeight, Weight

_INPUTS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_MOST_LAYOUTS = 1 << 14  # remembered at a time
_right: set[tuple[Any, ...]] = set()


def linear(x: Tensor, weight: Weight, inputs: Inputs, bias: Tensor | None) -> None:
    """Refuse tensors that a linear layer cannot be computed from.

    Args:
        x: The input, floating point [..., i].
        weight: The weight of one part, whose codes are uint8 [o, bytes].
        inputs: The scale and zero point of the input, each None where the part asks for none.
        bias: The bias [o], or None.

    Raises:
        ValueError: if a tensor has another shape, dtype, layout or device than the part asks for.
    """
    width(x, x.dim() - 1, weight.part.channels)
    _stored(x, weight, inputs, bias, 2)
    if weight.branch is not None:
        _branch(x, weight.branch, weight.out_channels)


def conv2d(x: Tensor, weight: Weight, inputs: Inputs, bias: Tensor | None, geometry: Geometry) -> None:
    """Refuse tensors that a convolution cannot be computed from: input [b, i, h, w], codes [o, bytes, kh, kw].

    Raises:
        ValueError: if a tensor has another shape, dtype, layout or device than the part asks for, or the geometry does not
            fit.
    """
    _picture(x, weight, geometry)
    _stored(x, weight, inputs, bias, 4)


def _branch(x: Tensor, branch: Branch, out_channels: int) -> None:
    """Refuse a low-rank branch that does not fit.

    `down` must be floating point [r, i] and `up` [o, r], both on the input's device.
    """
    down, up = branch.down, branch.up
    shapes = (tuple(down.shape), tuple(up.shape))
    fits = down.dim() == up.dim() == 2 and shapes == (
        (up.shape[1], x.shape[-1]),
        (out_channels, down.shape[0]),
    )
    if not fits or not (down.is_floating_point() and up.is_floating_point()):
        raise ValueError(
            f"a branch must be floating point [r, {x.shape[-1]}] and [{out_channels}, r], got {shapes[0]} {down.dtype} and "
            f"{shapes[1]} {up.dtype}"
        )
    _same_device(x, (down, up))


def packed_weight(
    packed: Tensor, scale: Tensor, zero_point: Tensor | None, bits: int, channels: int, group_size: int
) -> None:
    """Refuse a packed weight that cannot be decoded.

    It must hold codes of `bits` bits for `channels` channels and a matching number of float32 scales.

    Raises:
        ValueError: if a tensor has another shape, dtype or device.
    """
    _codes(packed, packed_channels(channels, bits), packed.dim() if packed.dim() in (2, 4) else 2)
    rows = packed.shape[0]
    # One per tensor, per output channel, or per group of input channels.
    counts = (1, rows, rows * -(-channels // group_size) if group_size else 1)
    for name, vector in (("scale", scale), ("zero point", zero_point)):
        if vector is not None and vector.numel() not in counts:
            raise ValueError(f"weight {name} must have one of {counts} entries, got {vector.numel()}")
        if vector is not None:
            _vector(f"weight {name}", vector, vector.numel())
    _same_device(packed, (scale, zero_point))


def attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> None:
    """Refuse tensors that attention cannot be computed from.

    The query is [b, h, q, d], key and value are [b, h, k, d], and a mask broadcasts to [b, h, q, k].

    Raises:
        ValueError: if shapes, dtypes or devices do not fit.
    """
    shapes = [tuple(tensor.shape) for tensor in (query, key, value)]
    if query.dim() != 4 or key.shape != value.shape or key.dim() != 4:
        raise ValueError(f"query, key and value must be [b, h, t, d], key and value alike, got {shapes}")
    batch, heads, queries, width = query.shape
    if (batch, heads, width) != (key.shape[0], key.shape[1], key.shape[3]) or not key.numel():
        raise ValueError(
            f"query, key and value must agree in batch, heads and width, with one key at least, got {shapes}"
        )
    if {key.dtype, value.dtype} != {query.dtype} or not query.is_floating_point():
        raise ValueError(
            f"query, key and value must have one floating-point dtype, got {query.dtype}, {key.dtype}, {value.dtype}"
        )
    _same_device(query, (key, value, mask))
    scores = (batch, heads, queries, key.shape[2])
    if mask is None:
        return
    fits = mask.dim() <= 4 and all(
        have in (1, want) for have, want in zip(mask.shape[::-1], scores[::-1], strict=False)
    )
    if not fits or not (mask.is_floating_point() or mask.dtype == torch.bool):
        raise ValueError(
            f"mask must be bool or floating point and broadcast to {scores}, got {tuple(mask.shape)} {mask.dtype}"
        )


def width(x: Tensor, axis: int, channels: int) -> None:
    """Refuse an input without `channels` entries along `axis`, or one that is no dense floating-point tensor.

    Raises:
        ValueError: if the size, dtype or layout is another one.
    """
    if x.dim() < 1 or x.shape[axis] != channels:
        raise ValueError(
            f"input of a quantized layer must have {channels} channels in axis {axis}, got shape {tuple(x.shape)}; "
            "call it as the layer it was made from"
        )
    if x.dtype not in _INPUTS or x.layout != torch.strided:
        raise ValueError(
            f"input of a quantized layer must be a dense tensor of float32, bfloat16, float16 or float64, got {x.dtype} "
            f"{x.layout}; cast it"
        )


def _picture(x: Tensor, weight: Weight, geometry: Geometry) -> None:
    if x.dim() != 4:
        raise ValueError(
            f"input of a quantized convolution must be [b, i, h, w], got shape {tuple(x.shape)}; add a batch axis"
        )
    groups, out_channels = geometry.groups, weight.out_channels
    if groups < 1 or out_channels % groups:
        raise ValueError(f"groups must divide the {out_channels} output channels, got {groups}")
    width(x, 1, weight.part.channels * groups)
    pairs = stride, padding, dilation = geometry.stride, geometry.padding, geometry.dilation
    if any(len(pair) != 2 for pair in pairs) or min(*stride, *dilation) < 1 or min(padding) < 0:
        raise ValueError(
            f"stride, padding and dilation must be pairs from 1, 0 and 1 on, got {[list(pair) for pair in pairs]}"
        )
    reach(x.shape[2:], weight.kernel, geometry)


def reach(picture: Sequence[int], kernel: Sequence[int], geometry: Geometry) -> None:
    """Refuse a picture (h, w) that is smaller than what a kernel (kh, kw) reaches.

    Raises:
        ValueError: if a side of the padded picture is too short.
    """
    padding = geometry.padding
    # The taps of a dilated kernel are d pixels apart.
    reaches = [d * (k - 1) + 1 for d, k in zip(geometry.dilation, kernel, strict=False)]
    if any(n + 2 * p < r for n, p, r in zip(picture, padding, reaches, strict=False)):
        raise ValueError(
            f"pictures must be as large as the kernel reaches, {reaches}, got {list(picture)} with padding {list(padding)}"
        )


def _stored(x: Tensor, weight: Weight, inputs: Inputs, bias: Tensor | None, axes: int) -> None:
    """Check the stored tensors of a layer, unless tensors of the same layout were found right before."""
    of_bands = [t for piece in weight.bands for t in (piece.codes, piece.scale, piece.zero_point)]
    tensors = (*of_bands, weight.row_band, inputs.scale, inputs.zero_point, bias)
    layouts = [None if t is None else (t.shape, t.stride(), t.dtype, t.device) for t in tensors]
    key = (tuple([piece.part for piece in weight.bands]), axes, x.device, *layouts)
    if key in _right:
        return
    for piece in weight.bands:
        _piece(piece, axes)
    rows, row_band = weight.out_channels, weight.row_band
    if row_band is None and len(weight.bands) > 1:
        raise ValueError(f"row_band must be there for {len(weight.bands)} bands of rows, got none")
    if row_band is not None and (row_band.dtype != torch.uint8 or tuple(row_band.shape) != (rows,)):
        raise ValueError(f"row_band must be uint8 [{rows}], got {row_band.dtype} {tuple(row_band.shape)}")
    _inputs_and_bias(rows, inputs, bias, weight.part)
    _same_device(x, tensors)
    _remember(key)


def _remember(key: tuple[Any, ...]) -> None:
    if len(_right) >= _MOST_LAYOUTS:
        _right.clear()
    _right.add(key)


def _piece(piece: PackedWeight, axes: int) -> None:
    part = piece.part
    _codes(piece.codes, packed_channels(part.channels, part.weight.format.bits), axes)
    count = part.weight.scale_count(piece.rows, part.channels)
    _vector("weight scale", piece.scale, count)
    _vector("weight zero point", piece.zero_point, count if part.weight.zero_point else 0)


def _codes(packed: Tensor, width: int, axes: int) -> None:
    if packed.dtype != torch.uint8 or packed.layout != torch.strided:
        raise ValueError(f"packed weight must be a dense uint8 tensor, got {packed.dtype} {packed.layout}")
    if packed.dim() != axes or packed.shape[1] != width:
        raise ValueError(
            f"packed weight must have {axes} axes and {width} bytes a row, got shape {tuple(packed.shape)}"
        )
    if axes == 4 and min(packed.shape[2:]) > 1 and packed.stride(2) != packed.shape[3] * packed.stride(3):
        raise ValueError(
            f"taps of a packed weight must lie evenly, got strides {packed.stride()}; make it contiguous"
        )


def _inputs_and_bias(rows: int, inputs: Inputs, bias: Tensor | None, part: Part) -> None:
    spec = part.activation
    static = spec is not None and not spec.online
    _vector("input scale", inputs.scale, int(static))
    _vector("input zero point", inputs.zero_point, int(static and spec is not None and spec.zero_point))
    if bias is not None and (tuple(bias.shape) != (rows,) or not bias.is_floating_point()):
        raise ValueError(f"bias must be floating point [{rows}], got {bias.dtype} {tuple(bias.shape)}")


def _vector(name: str, vector: Tensor | None, count: int) -> None:
    """Refuse anything but `count` float32 numbers side by side, and with a count of 0 anything but None."""
    if vector is None and not count:
        return
    if vector is None or not count:
        got = "none" if vector is None else f"{tuple(vector.shape)}"
        raise ValueError(f"{name} must {f'have {count} entries' if count else 'be left out'}, got {got}")
    if vector.dtype != torch.float32 or vector.numel() != count or not vector.is_contiguous():
        raise ValueError(
            f"{name} must be {count} float32 numbers side by side, got {vector.dtype} {tuple(vector.shape)} with strides "
            f"{vector.stride()}"
        )


def _same_device(x: Tensor, tensors: Sequence[Tensor | None]) -> None:
    for tensor in tensors:
        if tensor is not None and tensor.device != x.device:
            raise ValueError(
                f"all tensors of a layer must be on the device of its input, {x.device}, got one on {tensor.device}; move "
                "the model or the input"
            )
