"""Operator schemas and shape functions: `torch.ops.difloat.*`, so that `torch.compile` sees through quantized layers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from difloat import formats
from difloat.kernels import reference


@torch.library.custom_op("difloat::dequantize", mutates_args=())
def dequantize(
    packed: Tensor, scale: Tensor, zero_point: Tensor | None, format_name: str, channels: int, group_size: int
) -> Tensor:
    """See `reference.dequantize`."""
    return reference.dequantize(packed, scale, zero_point, format_name, channels, group_size)


@dequantize.register_fake
def _(
    packed: Tensor, scale: Tensor, zero_point: Tensor | None, format_name: str, channels: int, group_size: int
) -> Tensor:
    return packed.new_empty((packed.shape[0], channels, *packed.shape[2:]), dtype=torch.float32)


@torch.library.custom_op("difloat::fake_quantize_input", mutates_args=())
def fake_quantize_input(
    x: Tensor,
    scale: Tensor | None,
    zero_point: Tensor | None,
    format_name: str,
    per_token: bool,
    group_size: int = 0,
    asymmetric: bool = False,
) -> Tensor:
    """See `reference.fake_quantize_input`; the gradient is the clipped straight-through one."""
    return reference.fake_quantize_input(x, scale, zero_point, format_name, per_token, group_size, asymmetric)


@fake_quantize_input.register_fake
def _(
    x: Tensor,
    scale: Tensor | None,
    zero_point: Tensor | None,
    format_name: str,
    per_token: bool,
    group_size: int = 0,
    asymmetric: bool = False,
) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _keep_range(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, scale, zero_point, format_name, *_ = inputs
    if scale is None:  # an online scale clips nothing
        ctx.save_for_backward(None)
        return
    format = formats.parse(format_name)
    grid = (x if zero_point is None else x - zero_point) / scale
    ctx.save_for_backward((grid >= format.min) & (grid <= format.max))


def _straight_through(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    (inside,) = ctx.saved_tensors
    return gradient if inside is None else gradient * inside, None, None, None, None, None, None


fake_quantize_input.register_autograd(_straight_through, setup_context=_keep_range)
