"""The definition of every operator, in plain torch, on any device. Faster backends must give the same numbers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from difloat.kernels.geometry import Geometry
from difloat.numbers import formats
from difloat.numbers.formats import Format
from difloat.numbers.packing import unpack
from difloat.numbers.rounding import decode, round_
from difloat.plan.scales import row_places
from difloat.plan.specs import Part
from difloat.plan.weight import Inputs, PackedWeight, Weight

_CHUNK_VALUES = 1 << 17  # half a MiB of float32: the passes of one chunk stay in a core's second-level cache


def dequantize(
    packed: Tensor, scale: Tensor, zero_point: Tensor | None, format_name: str, channels: int, group_size: int
) -> Tensor:
    """The weight of one part of a layer, decoded and scaled.

    >>> dequantize(torch.tensor([[33, 3]], dtype=torch.uint8), torch.tensor([2.0]), None, "e2m1", channels=3, group_size=0)
    tensor([[1., 2., 3.]])

    Args:
        packed: uint8 [o, bytes, *k], as `packing.pack` lays codes out.
        scale: float32 [1] for one scale per tensor, [o] for one per output channel, or [o * groups].
        zero_point: float32 in the shape of the scales, added after scaling, or None.
        format_name: Name of the format of the codes.
        channels: How many input channels i there are.
        group_size: Input channels that share a scale, or 0 without groups.

    Returns:
        float32 [o, i, *k].
    """
    format = formats.parse(format_name)
    values = _decode_packed(packed, format, channels)
    values.mul_(_expand(scale, values.shape, group_size))
    return values if zero_point is None else values.add_(_expand(zero_point, values.shape, group_size))


def _decode_packed(packed: Tensor, format: Format, channels: int) -> Tensor:
    if 8 % format.bits or packed.dim() > 2:
        return decode(unpack(packed, format.bits, channels), format)
    # A byte holds whole codes, so one table look-up per byte gives all of its values at once.
    every_byte = torch.arange(256, dtype=torch.uint8, device=packed.device)[:, None]
    table = decode(unpack(every_byte, format.bits, 8 // format.bits), format)  # [256, codes of a byte]
    values = torch.nn.functional.embedding(packed.int(), table).flatten(1)  # [o, bytes * codes of a byte]
    return values[:, :channels].contiguous()


def _expand(scale: Tensor, shape: torch.Size, group_size: int) -> Tensor:
    ones = [1] * (len(shape) - 2)
    if not group_size:
        return scale.reshape(-1, 1, *ones)  # [o, 1, *1], or [1, 1, *1] for one scale
    groups = scale.reshape(shape[0], -1).repeat_interleave(group_size, dim=1)[:, : shape[1]]  # [o, i]
    return groups.reshape(shape[0], shape[1], *ones)


def fake_quantize_input(
    x: Tensor,
    scale: Tensor | None,
    zero_point: Tensor | None,
    format_name: str,
    per_token: bool,
    group_size: int = 0,
    asymmetric: bool = False,
) -> Tensor:
    """An activation rounded to its grid, in its own dtype.

    >>> fake_quantize_input(torch.tensor([[0.3, 6.0]]), None, None, "e2m1", per_token=True)
    tensor([[0.5000, 6.0000]])

    Args:
        x: Tokens [..., i], or pictures [b, i, h, w], of which each counts as one token.
        scale: float32 [1], or None for an online scale that is found in the data.
        zero_point: float32 [1], a real offset that is added after the grid, or None.
        format_name: Name of the format whose values are the grid.
        per_token: Whether every token has an online scale of its own.
        group_size: How many channels of a token share an online scale, or 0 if all do.
        asymmetric: Whether an online grid spans the smallest to the largest value instead of lying around zero.

    Returns:
        A tensor of the same shape and dtype.
    """
    format = formats.parse(format_name)
    values = x.float()
    if scale is None:
        # Groups run along the channels, which are the second axis of a picture.
        axis = 1 if x.dim() == 4 else -1
        groups = values.split(group_size, dim=axis) if group_size else [values]
        rounded = [_round_online(group, format, per_token, asymmetric) for group in groups]
        return (rounded[0] if len(rounded) == 1 else torch.cat(rounded, dim=axis)).to(x.dtype)
    flat = values.reshape(-1)
    result = torch.empty_like(flat)
    for chunk, out in zip(flat.split(_CHUNK_VALUES), result.split(_CHUNK_VALUES), strict=True):
        if zero_point is None:
            round_(torch.div(chunk, scale, out=out), format).mul_(scale)
        else:
            round_(torch.sub(chunk, zero_point, out=out).div_(scale), format).mul_(scale).add_(zero_point)
    return result.reshape(x.shape).to(x.dtype)


def _round_online(values: Tensor, format: Format, per_token: bool, asymmetric: bool) -> Tensor:
    if not asymmetric:
        scale = online_scale(values, format, per_token)
        return round_((values / scale).contiguous(), format).mul_(scale)
    scale, zero_point = online_range(values, format, per_token)
    return round_(((values - zero_point) / scale).contiguous(), format).mul_(scale).add_(zero_point)


def _token_axes(x: Tensor, per_token: bool) -> tuple[int, ...]:
    """The axes that share one online scale."""
    if not per_token:
        return tuple(range(x.dim()))
    return (1, 2, 3) if x.dim() == 4 else (-1,)


def online_scale(x: Tensor, format: Format, per_token: bool) -> Tensor:
    """The scale that maps the largest magnitude to the largest value of a format, or 1 where all is zero.

    >>> online_scale(torch.tensor([[3.0, -12.0], [0.0, 0.0]]), formats.parse("e2m1"), per_token=True).tolist()
    [[2.0], [1.0]]

    Args:
        x: Tokens [..., i], or pictures [b, i, h, w], of which each counts as one token.
        format: The format whose largest value is met.
        per_token: Whether every token has a scale of its own.

    Returns:
        Scales in a shape that broadcasts with the input.
    """
    largest = x.abs().amax(dim=_token_axes(x, per_token), keepdim=True)  # [..., 1], [b, 1, 1, 1] or all ones
    return torch.where(largest > 0, largest / format.max, torch.ones_like(largest))


def online_range(x: Tensor, format: Format, per_token: bool) -> tuple[Tensor, Tensor]:
    """The scale and zero point that map the smallest value to `format.min` and the largest to `format.max`.

    There is one of each per token or for all tokens, in shapes that broadcast with the input. Where all values are equal the
    scale is 1, and the zero point is that value.
    """
    axes = _token_axes(x, per_token)
    smallest, largest = x.amin(dim=axes, keepdim=True), x.amax(dim=axes, keepdim=True)
    span = largest - smallest
    scale = torch.where(span > 0, span / (format.max - format.min), torch.ones_like(span))
    # An input without a span is its own zero point, so it comes back exactly.
    return scale, torch.where(span > 0, smallest - format.min * scale, smallest)


def supports(part: Part, weight_shape: Sequence[int], x: Tensor) -> bool:
    """The reference computes everything."""
    return True


def linear(x: Tensor, weight: Weight, inputs: Inputs, bias: Tensor | None) -> Tensor:
    """A linear layer on one part of its input channels: the rounded input times the decoded weight.

    Args:
        x: The input, floating point [..., i].
        weight: The weight of one part.
        inputs: The scale and zero point of the input where they are static.
        bias: The bias [o], or None.

    Returns:
        [..., o] in the dtype of the input.
    """
    # Four axes would count as a picture, whose rows share an online scale.
    tokens = x.reshape(-1, x.shape[-1])  # [t, i]
    rounded = round_input(tokens, inputs.scale, inputs.zero_point, weight.part).reshape(x.shape)
    shift = None if bias is None else bias.to(x.dtype)
    return functional.linear(rounded, decode_weight(weight).to(x.dtype), shift)


def conv2d(x: Tensor, weight: Weight, inputs: Inputs, bias: Tensor | None, geometry: Geometry) -> Tensor:
    """A convolution on one part of its input channels. Padding adds zeros to the rounded input.

    Args:
        x: The input, floating point [b, i, h, w].
        weight: The weight of one part, whose codes are [o, bytes, kh, kw].
        inputs: The scale and zero point of the input where they are static.
        bias: The bias [o], or None.
        geometry: Stride, padding, dilation and groups.

    Returns:
        [b, o, h', w'] in the dtype of the input.
    """
    rounded = round_input(x, inputs.scale, inputs.zero_point, weight.part)
    shift = None if bias is None else bias.to(x.dtype)
    return geometry.convolve(rounded, decode_weight(weight).to(x.dtype), shift)


def round_input(x: Tensor, scale: Tensor | None, zero_point: Tensor | None, part: Part) -> Tensor:
    """The input of a part rounded to its grid, or the input itself where activations are not quantized or empty."""
    spec = part.activation
    if spec is None or not x.numel():
        return x
    return fake_quantize_input(
        x,
        scale,
        zero_point,
        spec.format.name,
        spec.granularity in ("token", "group"),
        spec.group_size or 0,
        spec.online and spec.zero_point,
    )


def decode_piece(piece: PackedWeight) -> Tensor:
    """The float32 values [o, i, *k] of one rectangle of a weight."""
    spec, channels = piece.spec, piece.part.channels
    return dequantize(
        piece.codes, piece.scale, piece.zero_point, spec.format.name, channels, spec.group_size or 0
    )


def decode_weight(weight: Weight) -> Tensor:
    """The float32 weight [o, i, *k] of one part, in the order of the float layer's rows."""
    if weight.row_band is None:
        return decode_piece(weight.bands[0])
    stored = torch.cat([decode_piece(piece) for piece in weight.bands])
    # Not the places that are kept: a compiler may trace this for gradients.
    return stored[row_places(weight.row_band)]
