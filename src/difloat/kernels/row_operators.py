"""Operators on layers whose rows (output channels) have several widths; `ops` has those on layers whose rows are alike.

The weight of one part comes as one tensor per band of rows. Results are in the order of the float layer's rows, which
`row_band` restores: it holds the band of every output channel, and the rows of a band keep their order.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from difloat.kernels import checks, dispatch, operators, reference
from difloat.kernels.weight import Rows
from difloat.plan.specs import Part


@cache
def parts_text(parts: tuple[Part, ...]) -> str:
    """One part of a layer in all bands of rows, as the string that the operators take."""
    return json.dumps([part.to_json() for part in parts])


@cache
def _parts(text: str) -> tuple[Part, ...]:
    return tuple(Part.from_json(data) for data in json.loads(text))


@torch.library.custom_op("difloat::linear_rows", mutates_args=())
def _linear(
    x: Tensor,
    packed: Sequence[Tensor],
    weight_scale: Sequence[Tensor],
    weight_zero_point: Sequence[Tensor],
    input_scale: Tensor | None,
    input_zero_point: Tensor | None,
    row_band: Tensor,
    bias: Tensor | None,
    parts: str,
) -> Tensor:
    """See `linear`."""
    weight = _weight(packed, weight_scale, weight_zero_point, row_band, parts)
    return _run_linear(x, weight, input_scale, input_zero_point, bias)


def _run_linear(x: Tensor, weight: Rows, *rest: Any) -> Tensor:
    checks.linear_rows(x, weight, rest)
    return dispatch.choose_rows(weight.parts, weight.shapes(), x).linear_rows(x, weight, *rest)


@_linear.register_fake
def _(
    x: Tensor,
    packed: Sequence[Tensor],
    weight_scale: Sequence[Tensor],
    weight_zero_point: Sequence[Tensor],
    input_scale: Tensor | None,
    input_zero_point: Tensor | None,
    row_band: Tensor,
    bias: Tensor | None,
    parts: str,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], row_band.shape[0]))


@torch.library.custom_op("difloat::conv2d_rows", mutates_args=())
def _conv2d(
    x: Tensor,
    packed: Sequence[Tensor],
    weight_scale: Sequence[Tensor],
    weight_zero_point: Sequence[Tensor],
    input_scale: Tensor | None,
    input_zero_point: Tensor | None,
    row_band: Tensor,
    bias: Tensor | None,
    parts: str,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """See `conv2d`. Channels last if the input is."""
    weight = _weight(packed, weight_scale, weight_zero_point, row_band, parts)
    checks.conv2d_rows(x, weight, (input_scale, input_zero_point, bias), (stride, padding, dilation), groups)
    module = dispatch.choose_rows(weight.parts, weight.shapes(), x)
    tensors = (x, weight, input_scale, input_zero_point, bias)
    result: Tensor = module.conv2d_rows(*tensors, stride, padding, dilation, groups)
    return result.contiguous(memory_format=operators.memory_format(x))


@_conv2d.register_fake
def _(
    x: Tensor,
    packed: Sequence[Tensor],
    weight_scale: Sequence[Tensor],
    weight_zero_point: Sequence[Tensor],
    input_scale: Tensor | None,
    input_zero_point: Tensor | None,
    row_band: Tensor,
    bias: Tensor | None,
    parts: str,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    size = reference.conv_output_size(x.shape[2:], packed[0].shape[2:], stride, padding, dilation)
    shape = (x.shape[0], row_band.shape[0], *size)
    return x.new_empty(shape).contiguous(memory_format=operators.memory_format(x))


def _weight(
    packed: Sequence[Tensor],
    weight_scale: Sequence[Tensor],
    weight_zero_point: Sequence[Tensor],
    row_band: Tensor,
    parts: str,
) -> Rows:
    found, zeros = _parts(parts), iter(weight_zero_point)
    zero_points = tuple(next(zeros) if part.weight.zero_point else None for part in found)
    return Rows(tuple(packed), tuple(weight_scale), zero_points, row_band, found)


def dequantize(
    packed: Sequence[Tensor],
    weight_scale: Sequence[Tensor],
    weight_zero_point: Sequence[Tensor],
    row_band: Tensor,
    parts: str,
) -> Tensor:
    """The float32 weight [o, i, *k] of one part, in the order of the float layer's rows; arguments as in `linear`."""
    return reference.decode_rows(_weight(packed, weight_scale, weight_zero_point, row_band, parts))


def _keep_for_gradient(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, packed, scales, zeros, input_scale, input_zero_point, row_band, bias, parts = inputs[:9]
    ctx.parts, ctx.counts = parts, [len(packed), len(scales), len(zeros)]
    inside = operators.keep_facts(ctx, x, input_scale, input_zero_point, bias, _parts(parts)[0], inputs[9:])
    ctx.save_for_backward(row_band, inside, *packed, *scales, *zeros)


def _gradients(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
    """Clipped straight-through to the input, and to the bias; what is packed gets none."""
    row_band, inside, *stored = ctx.saved_tensors
    packed, scales, zeros = ctx.counts
    lists = (stored[:packed], stored[packed : packed + scales], stored[packed + scales :])
    to_x, to_bias = operators.to_input_and_bias(
        ctx, gradient, inside, lambda: reference.decode_rows(_weight(*lists, row_band, ctx.parts)), 7
    )
    none = [[None] * n for n in (packed, scales, zeros)]
    return (to_x, *none, None, None, None, to_bias, *[None] * (1 + len(ctx.geometry)))


_linear.register_autograd(_gradients, setup_context=_keep_for_gradient)
_conv2d.register_autograd(_gradients, setup_context=_keep_for_gradient)


def linear(
    x: Tensor,
    packed: Sequence[Tensor],
    weight_scale: Sequence[Tensor],
    weight_zero_point: Sequence[Tensor],
    input_scale: Tensor | None,
    input_zero_point: Tensor | None,
    row_band: Tensor,
    bias: Tensor | None,
    parts: str,
) -> Tensor:
    """`ops.linear` with rows of several widths.

    Args:
        x: [..., i].
        packed: Per band uint8 [rows, bytes].
        weight_scale: Per band.
        weight_zero_point: Of the bands that have one.
        input_scale: As in `ops.linear`, like the next.
        input_zero_point: See there.
        row_band: uint8 [o], the band of every output channel.
        bias: [o] or None, in the order of the output channels.
        parts: A string that `parts_text` made.
    """
    if operators.needs_operator(x, bias):
        lists = (list(packed), list(weight_scale), list(weight_zero_point))
        return torch.ops.difloat.linear_rows(x, *lists, input_scale, input_zero_point, row_band, bias, parts)
    weight = _weight(packed, weight_scale, weight_zero_point, row_band, parts)
    return _run_linear(x, weight, input_scale, input_zero_point, bias)


def conv2d(
    x: Tensor,
    packed: Sequence[Tensor],
    weight_scale: Sequence[Tensor],
    weight_zero_point: Sequence[Tensor],
    input_scale: Tensor | None,
    input_zero_point: Tensor | None,
    row_band: Tensor,
    bias: Tensor | None,
    parts: str,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """`ops.conv2d` with rows of several widths; arguments as in `linear`."""
    lists = (list(packed), list(weight_scale), list(weight_zero_point))
    geometry = (list(stride), list(padding), list(dilation), groups)
    return torch.ops.difloat.conv2d_rows(
        x, *lists, input_scale, input_zero_point, row_band, bias, parts, *geometry
    )
