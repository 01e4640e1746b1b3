"""Operator schemas and shape functions: `torch.ops.difloat.*`, so that `torch.compile` sees through quantized layers."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.grad import conv2d_input

from difloat.kernels import checks, dispatch, reference
from difloat.numbers import formats
from difloat.plan.specs import Part


@torch.library.custom_op("difloat::dequantize", mutates_args=())
def dequantize(
    packed: Tensor, scale: Tensor, zero_point: Tensor | None, format_name: str, channels: int, group_size: int
) -> Tensor:
    """See `reference.dequantize`."""
    checks.packed_weight(packed, scale, zero_point, formats.parse(format_name).bits, channels, group_size)
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


@torch.library.custom_op("difloat::linear", mutates_args=())
def _linear(
    x: Tensor,
    packed: Tensor,
    weight_scale: Tensor,
    weight_zero_point: Tensor | None,
    input_scale: Tensor | None,
    input_zero_point: Tensor | None,
    bias: Tensor | None,
    part: str,
) -> Tensor:
    """See `reference.linear`; `part` as JSON."""
    return _run_linear(x, packed, weight_scale, weight_zero_point, input_scale, input_zero_point, bias, part)


def _run_linear(x: Tensor, packed: Tensor, *rest: Any) -> Tensor:
    text = rest[-1]
    part = part_of(text)
    checks.linear(x, packed, rest[:-1], part)
    module = dispatch.choose_linear(text, part, packed.shape[0], x)
    return module.linear(x, packed, *rest[:-1], part)


@_linear.register_fake
def _(
    x: Tensor,
    packed: Tensor,
    weight_scale: Tensor,
    weight_zero_point: Tensor | None,
    input_scale: Tensor | None,
    input_zero_point: Tensor | None,
    bias: Tensor | None,
    part: str,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], packed.shape[0]))


@torch.library.custom_op("difloat::conv2d", mutates_args=())
def _conv2d(
    x: Tensor,
    packed: Tensor,
    weight_scale: Tensor,
    weight_zero_point: Tensor | None,
    input_scale: Tensor | None,
    input_zero_point: Tensor | None,
    bias: Tensor | None,
    part: str,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """See `reference.conv2d`; `part` as JSON. Channels last if the input or the packed weight is."""
    found = part_of(part)
    vectors = (weight_scale, weight_zero_point, input_scale, input_zero_point, bias)
    checks.conv2d(x, packed, vectors, found, (stride, padding, dilation), groups)
    module = dispatch.choose(found, (packed.shape[0], found.channels, *packed.shape[2:]), x)
    tensors = (x, packed, weight_scale, weight_zero_point, input_scale, input_zero_point, bias)
    result: Tensor = module.conv2d(*tensors, found, stride, padding, dilation, groups)
    return result.contiguous(memory_format=memory_format(x, packed))


@_conv2d.register_fake
def _(
    x: Tensor,
    packed: Tensor,
    weight_scale: Tensor,
    weight_zero_point: Tensor | None,
    input_scale: Tensor | None,
    input_zero_point: Tensor | None,
    bias: Tensor | None,
    part: str,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    size = reference.conv_output_size(x.shape[2:], packed.shape[2:], stride, padding, dilation)
    shape = (x.shape[0], packed.shape[0], *size)
    return x.new_empty(shape).contiguous(memory_format=memory_format(x, packed))


def memory_format(*tensors: Tensor) -> torch.memory_format:
    """Channels last if one of the tensors is."""
    last = torch.channels_last
    for tensor in tensors:
        if tensor.is_contiguous(memory_format=last) and not tensor.is_contiguous():
            return last
    return torch.contiguous_format


@cache
def part_text(part: Part) -> str:
    """A part as the string that the operators take."""
    return json.dumps(part.to_json())


@cache
def part_of(text: str) -> Part:
    """Inverse of `part_text`."""
    return Part.from_json(json.loads(text))


def _keep_for_gradient(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, packed, weight_scale, weight_zero_point, input_scale, input_zero_point, bias, part = inputs[:8]
    ctx.part = part_of(part)
    inside = keep_facts(ctx, x, input_scale, input_zero_point, bias, ctx.part, inputs[8:])
    ctx.save_for_backward(packed, weight_scale, weight_zero_point, inside)


def keep_facts(
    ctx: Any,
    x: Tensor,
    scale: Tensor | None,
    zero_point: Tensor | None,
    bias: Tensor | None,
    part: Part,
    geometry: tuple[Any, ...],
) -> Tensor | None:
    """Note on `ctx` what `to_input_and_bias` needs; returns where the input lies inside its grid, None for everywhere."""
    ctx.geometry, ctx.x_shape, ctx.x_dtype = geometry, x.shape, x.dtype
    ctx.bias_dtype = None if bias is None else bias.dtype
    if part.activation is None or scale is None:  # an online scale clips nothing
        return None
    grid, format = (x if zero_point is None else x - zero_point) / scale, part.activation.format
    return (grid >= format.min) & (grid <= format.max)


def _gradients(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
    """Clipped straight-through to the input, and to the bias; what is packed gets none."""
    packed, scale, zero_point, inside = ctx.saved_tensors
    to_x, to_bias = to_input_and_bias(
        ctx, gradient, inside, lambda: reference.decode_weight(packed, scale, zero_point, ctx.part), 6
    )
    return (to_x, None, None, None, None, None, to_bias, *[None] * (1 + len(ctx.geometry)))


def to_input_and_bias(
    ctx: Any, gradient: Tensor, inside: Tensor | None, decode: Callable[[], Tensor], bias_position: int
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients to an operator's input (its first argument) and bias; `decode` gives the float weight."""
    to_x = to_bias = None
    if ctx.needs_input_grad[0]:
        weight = decode().to(ctx.x_dtype)
        if ctx.geometry:
            stride, padding, dilation, groups = ctx.geometry
            to_x = conv2d_input(ctx.x_shape, weight, gradient, stride, padding, dilation, groups)
        else:
            to_x = gradient @ weight
        to_x = to_x if inside is None else to_x * inside
    if ctx.bias_dtype is not None and ctx.needs_input_grad[bias_position]:
        axes = [0, 2, 3] if ctx.geometry else list(range(gradient.dim() - 1))
        to_bias = gradient.sum(axes).to(ctx.bias_dtype) if axes else gradient.to(ctx.bias_dtype)
    return to_x, to_bias


_linear.register_autograd(_gradients, setup_context=_keep_for_gradient)
_conv2d.register_autograd(_gradients, setup_context=_keep_for_gradient)


def linear(
    x: Tensor,
    packed: Tensor,
    weight_scale: Tensor,
    weight_zero_point: Tensor | None,
    input_scale: Tensor | None,
    input_zero_point: Tensor | None,
    bias: Tensor | None,
    part: str,
) -> Tensor:
    """See `reference.linear`: computed by the chosen backend, with straight-through gradients to `x` and `bias`.

    `part` is a string that `part_text` made.
    """
    tensors = (x, packed, weight_scale, weight_zero_point, input_scale, input_zero_point, bias)
    if needs_operator(x, bias):
        return torch.ops.difloat.linear(*tensors, part)
    return _run_linear(*tensors, part)


def conv2d(
    x: Tensor,
    packed: Tensor,
    weight_scale: Tensor,
    weight_zero_point: Tensor | None,
    input_scale: Tensor | None,
    input_zero_point: Tensor | None,
    bias: Tensor | None,
    part: str,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """See `reference.conv2d`, and `linear`."""
    tensors = (x, packed, weight_scale, weight_zero_point, input_scale, input_zero_point, bias)
    return torch.ops.difloat.conv2d(*tensors, part, list(stride), list(padding), list(dilation), groups)


def needs_operator(x: Tensor, bias: Tensor | None) -> bool:
    """Whether autograd, a compiler or another kind of tensor must see an operator; else the way through it is saved."""
    if torch.compiler.is_compiling() or type(x) is not Tensor:
        return True
    return torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad))
