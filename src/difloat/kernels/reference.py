"""The definition of every operator, in plain torch; runs on any device.

Faster backends must give the same numbers.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from difloat.kernels.weight import Rows
from difloat.numbers import formats
from difloat.numbers.formats import Format
from difloat.numbers.packing import unpack
from difloat.numbers.rounding import decode, round_
from difloat.plan.scales import row_places
from difloat.plan.specs import Part

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
    """A linear layer on one part of its input channels: the rounded input times the decoded weight.

    Args:
        x: [..., i], floating point.
        packed: uint8 [o, bytes] as `packing.pack` lays them out.
        weight_scale: float32, as many as the spec of the weight asks for.
        weight_zero_point: As `weight_scale`, or None.
        input_scale: float32 [1], or None where the scale is found at run time or the input is not quantized.
        input_zero_point: float32 [1] or None.
        bias: [o] or None.
        part: Formats and granularities.

    Returns:
        [..., o] in the dtype of `x`.
    """
    weight = decode_weight(packed, weight_scale, weight_zero_point, part)
    return _linear(x, weight, input_scale, input_zero_point, bias, part)


def linear_rows(
    x: Tensor, weight: Rows, input_scale: Tensor | None, input_zero_point: Tensor | None, bias: Tensor | None
) -> Tensor:
    """`linear` with rows of several widths."""
    return _linear(x, decode_rows(weight), input_scale, input_zero_point, bias, weight.parts[0])


def _linear(
    x: Tensor,
    weight: Tensor,
    input_scale: Tensor | None,
    input_zero_point: Tensor | None,
    bias: Tensor | None,
    part: Part,
) -> Tensor:
    tokens = x.reshape(
        -1, x.shape[-1]
    )  # four axes would count as a picture, whose rows share an online scale
    rounded = round_input(tokens, input_scale, input_zero_point, part).reshape(x.shape)
    return functional.linear(rounded, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


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
    """A convolution on one part of its input channels; padding adds zeros to the rounded input.

    Args:
        x: [b, i, h, w], floating point.
        packed: uint8 [o, bytes, kh, kw].
        weight_scale: As for `linear`, like the next four.
        weight_zero_point: See there.
        input_scale: See there.
        input_zero_point: See there.
        bias: See there.
        part: See there.
        stride: Two numbers, like `padding` and `dilation`.
        padding: Zeros on both sides of an axis.
        dilation: Distance of the taps.
        groups: As for `torch.nn.functional.conv2d`.

    Returns:
        [b, o, h', w'] in the dtype of `x`.
    """
    weight = decode_weight(packed, weight_scale, weight_zero_point, part)
    inputs = (input_scale, input_zero_point, bias)
    return _conv2d(x, weight, *inputs, part, stride, padding, dilation, groups)


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
    """`conv2d` with rows of several widths."""
    inputs = (input_scale, input_zero_point, bias)
    return _conv2d(x, decode_rows(weight), *inputs, weight.parts[0], stride, padding, dilation, groups)


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
    rounded = round_input(x, input_scale, input_zero_point, part)
    shift = None if bias is None else bias.to(x.dtype)
    geometry = (list(stride), list(padding), list(dilation), groups)
    return functional.conv2d(rounded, weight.to(x.dtype), shift, *geometry)


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


def decode_weight(packed: Tensor, scale: Tensor, zero_point: Tensor | None, part: Part) -> Tensor:
    """The float32 weight [o, i, *k] of a part."""
    spec = part.weight
    return dequantize(packed, scale, zero_point, spec.format.name, part.channels, spec.group_size or 0)


def decode_rows(weight: Rows) -> Tensor:
    """The float32 weight [o, i, *k] of a part of a layer with rows of several widths, in the float layer's order."""
    stored = torch.cat([decode_weight(*band) for band in weight.bands()])
    return stored[
        row_places(weight.row_band)
    ]  # not the places that are kept: a compiler may trace this for gradients


def conv_output_size(
    size: Sequence[int],
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> tuple[int, int]:
    """Height and width of the result of a convolution on a picture of `size` (h, w)."""
    height, width = (
        (n + 2 * p - d * (k - 1) - 1) // s + 1
        for n, k, s, p, d in zip(size, kernel, stride, padding, dilation, strict=True)
    )
    return height, width
