"""The definition of every operator, in plain torch; runs on any device.

Faster backends must give the same numbers.
"""

from __future__ import annotations

import torch
from torch import Tensor

from difloat import formats
from difloat.formats import Format
from difloat.packing import unpack
from difloat.rounding import decode, round_

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
    x: Tensor, scale: Tensor | None, zero_point: Tensor | None, format_name: str, per_token: bool
) -> Tensor:
    """Round an activation to its grid and return it in its own dtype.

    Args:
        x: [..., i] (tokens) or [b, i, h, w] (pictures, where "token" means one picture).
        scale: float32 [1], or None for an online scale: the largest magnitude becomes the format's maximum.
        zero_point: float32 [1] real offset added after the grid, or None.
        format_name: Of the grid.
        per_token: One online scale per token instead of one for the tensor.

    Returns:
        Same shape and dtype as `x`.
    """
    format = formats.parse(format_name)
    values = x.float()
    if scale is None:
        scale = online_scale(values, format, per_token)
    if scale.dim() > 1:
        return round_((values / scale).contiguous(), format).mul_(scale).to(x.dtype)
    flat = values.reshape(-1)
    result = torch.empty_like(flat)
    for chunk, out in zip(flat.split(_CHUNK_VALUES), result.split(_CHUNK_VALUES), strict=True):
        if zero_point is None:
            round_(torch.div(chunk, scale, out=out), format).mul_(scale)
        else:
            round_(torch.sub(chunk, zero_point, out=out).div_(scale), format).mul_(scale).add_(zero_point)
    return result.reshape(x.shape).to(x.dtype)


def online_scale(x: Tensor, format: Format, per_token: bool) -> Tensor:
    """Scale that maps the largest magnitude to `format.max`: per token [..., 1] or for the tensor [1]; 1 where all is zero."""
    if not per_token:
        largest = x.abs().amax().reshape(1)
    elif x.dim() == 4:
        largest = x.abs().amax(dim=(1, 2, 3), keepdim=True)
    else:
        largest = x.abs().amax(dim=-1, keepdim=True)
    return torch.where(largest > 0, largest / format.max, torch.ones_like(largest))
