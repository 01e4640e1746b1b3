"""The definition of every operator, in plain torch; runs on any device.

Faster backends must give the same numbers.
"""

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
    """Weight values of one part of a layer.

    Args:
        packed: uint8 [o, bytes, *k] as `packing.pack` lays them out.
        scale: float32 [1] (per tensor), [o] (per channel) or [o * groups].
        zero_point: As `scale`, added after scaling; or None.
        format_name: Of the grid.
        channels: Input channels i.
        group_size: Input channels per group; 0 without groups.

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
    table = decode(unpack(every_byte, format.bits, 8 // format.bits), format)
    values = torch.nn.functional.embedding(packed.int(), table).flatten(1)
    return values[:, :channels].contiguous()


def _expand(scale: Tensor, shape: torch.Size, group_size: int) -> Tensor:
    ones = [1] * (len(shape) - 2)
    if not group_size:
        return scale.reshape(-1, 1, *ones)
    groups = scale.reshape(shape[0], -1).repeat_interleave(group_size, dim=1)[:, : shape[1]]
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
    """Round an activation to its grid and return it in its own dtype.

    Args:
        x: [..., i] (tokens) or [b, i, h, w] (pictures, where "token" means one picture).
        scale: float32 [1], or None for an online scale, found in the data.
        zero_point: float32 [1] real offset added after the grid, or None.
        format_name: Of the grid.
        per_token: One online scale per token instead of one for the tensor.
        group_size: With `per_token`, one online scale per so many channels of a token; 0: all channels share one.
        asymmetric: An online grid lies between the smallest and the largest value instead of around zero.

    Returns:
        Same shape and dtype as `x`.
    """
    format = formats.parse(format_name)
    values = x.float()
    if scale is None:
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
    """Scale that maps the largest magnitude to `format.max`, one per token or one for all; 1 where all is zero.

    The result broadcasts with `x`.
    """
    largest = x.abs().amax(dim=_token_axes(x, per_token), keepdim=True)
    return torch.where(largest > 0, largest / format.max, torch.ones_like(largest))


def online_range(x: Tensor, format: Format, per_token: bool) -> tuple[Tensor, Tensor]:
    """Scale and zero point that map the smallest value to `format.min` and the largest to `format.max`.

    One each per token or for all, in shapes that broadcast with `x`. Where all values are equal the scale is 1 and the
    zero point that value.
    """
    axes = _token_axes(x, per_token)
    smallest, largest = x.amin(dim=axes, keepdim=True), x.amax(dim=axes, keepdim=True)
    span = largest - smallest
    scale = torch.where(span > 0, span / (format.max - format.min), torch.ones_like(span))
    return scale, torch.where(span > 0, smallest - format.min * scale, smallest)


def supports(part: Part, weight_shape: Sequence[int], x: Tensor) -> bool:
    """The reference computes everything."""
    return True


def linear(x: Tensor, weight: Weight, inputs: Inputs, bias: Tensor | None) -> Tensor:
    """A linear layer on one part of its input channels: the rounded input times the decoded weight.

    Args:
        x: [..., i], floating point.
        weight: Of one part.
        inputs: Scale and zero point of the input where they are static.
        bias: [o] or None.

    Returns:
        [..., o] in the dtype of `x`.
    """
    # Four axes would count as a picture, whose rows share an online scale.
    tokens = x.reshape(-1, x.shape[-1])
    rounded = round_input(tokens, inputs.scale, inputs.zero_point, weight.part).reshape(x.shape)
    shift = None if bias is None else bias.to(x.dtype)
    return functional.linear(rounded, decode_weight(weight).to(x.dtype), shift)


def conv2d(x: Tensor, weight: Weight, inputs: Inputs, bias: Tensor | None, geometry: Geometry) -> Tensor:
    """A convolution on one part of its input channels; padding adds zeros to the rounded input.

    Args:
        x: [b, i, h, w], floating point.
        weight: Of one part, codes [o, bytes, kh, kw].
        inputs: As for `linear`.
        bias: [o] or None.
        geometry: Stride, padding, dilation and groups.

    Returns:
        [b, o, h', w'] in the dtype of `x`.
    """
    rounded = round_input(x, inputs.scale, inputs.zero_point, weight.part)
    shift = None if bias is None else bias.to(x.dtype)
    return geometry.convolve(rounded, decode_weight(weight).to(x.dtype), shift)


def round_input(x: Tensor, scale: Tensor | None, zero_point: Tensor | None, part: Part) -> Tensor:
    """The input of a part on its grid; `x` itself where activations are not quantized, or there are none."""
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
