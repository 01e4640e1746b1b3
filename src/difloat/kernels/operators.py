"""The operators `torch.ops.difloat.*` with their shape functions and gradients, which `torch.compile` sees through."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_input

from difloat.kernels import checks, dispatch, reference
from difloat.kernels.geometry import Geometry, geometry_of, memory_format
from difloat.numbers import formats
from difloat.plan.weight import Branch, Inputs, PackedWeight, Weight, parts_of

_GEOMETRY_NUMBERS = len(Geometry().numbers())


@torch.library.custom_op("difloat::dequantize", mutates_args=())
def dequantize(
    packed: Tensor, scale: Tensor, zero_point: Tensor | None, format_name: str, channels: int, group_size: int
) -> Tensor:
    """The operator that `reference.dequantize` defines."""
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
    """The operator that `reference.fake_quantize_input` defines, with the clipped straight-through gradient."""
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
    codes: Sequence[Tensor],
    scales: Sequence[Tensor],
    vectors: Sequence[Tensor],
    row_band: Tensor | None,
    bias: Tensor | None,
    branch: Sequence[Tensor],
    parts: str,
) -> Tensor:
    """The operator that `reference.linear` defines, on the tensors of `_lists`. `branch` holds the pair or nothing."""
    weight, inputs = _weight(codes, scales, vectors, row_band, parts)
    pair = Branch(*branch) if branch else None
    return run_linear(x, Weight(weight.columns, row_band, pair, weight.texts), inputs, bias)


def run_linear(x: Tensor, weight: Weight, inputs: Inputs, bias: Tensor | None) -> Tensor:
    """The checked linear layer of one part, with its branch, past torch's dispatcher: no gradients, compiler or tracer."""
    checks.linear(x, weight, inputs, bias)
    module = dispatch.choose_for(weight, x)
    branch = weight.branch
    if branch is None:
        return module.linear(x, weight, inputs, bias)
    if module is dispatch.BACKENDS["triton"]:  # the one that fuses a branch
        pair = Branch(branch.down.to(x.dtype), branch.up.to(x.dtype))
        return module.linear(x, Weight(weight.columns, weight.row_band, pair, weight.texts), inputs, bias)
    out: Tensor = module.linear(x, weight, inputs, bias)
    return out + branch_product(x, branch.down, branch.up)


@_linear.register_fake
def _(
    x: Tensor,
    codes: Sequence[Tensor],
    scales: Sequence[Tensor],
    vectors: Sequence[Tensor],
    row_band: Tensor | None,
    bias: Tensor | None,
    branch: Sequence[Tensor],
    parts: str,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], sum([piece.shape[0] for piece in codes])))


@torch.library.custom_op("difloat::conv2d", mutates_args=())
def _conv2d(
    x: Tensor,
    codes: Sequence[Tensor],
    scales: Sequence[Tensor],
    vectors: Sequence[Tensor],
    row_band: Tensor | None,
    bias: Tensor | None,
    geometry: Sequence[int],
    parts: str,
) -> Tensor:
    """The operator that `reference.conv2d` defines, on the tensors of `_lists`.

    The result is channels last if the input or the packed weight is.
    """
    weight, inputs = _weight(codes, scales, vectors, row_band, parts)
    return run_conv2d(x, weight, inputs, bias, geometry_of(geometry))


def run_conv2d(x: Tensor, weight: Weight, inputs: Inputs, bias: Tensor | None, geometry: Geometry) -> Tensor:
    """The checked convolution of one part, past torch's dispatcher: no gradients, compiler or tracer."""
    checks.conv2d(x, weight, inputs, bias, geometry)
    result: Tensor = dispatch.choose_for(weight, x).conv2d(x, weight, inputs, bias, geometry)
    return result.contiguous(memory_format=_layout(x, [piece.codes for piece in weight.bands]))


@_conv2d.register_fake
def _(
    x: Tensor,
    codes: Sequence[Tensor],
    scales: Sequence[Tensor],
    vectors: Sequence[Tensor],
    row_band: Tensor | None,
    bias: Tensor | None,
    geometry: Sequence[int],
    parts: str,
) -> Tensor:
    size = geometry_of(geometry).size(x.shape[2:], codes[0].shape[2:])
    shape = (x.shape[0], sum([piece.shape[0] for piece in codes]), *size)
    return x.new_empty(shape).contiguous(memory_format=_layout(x, codes))


def _layout(x: Tensor, codes: Sequence[Tensor]) -> torch.memory_format:
    """The memory format of a convolution's result.

    Pieces of several bands are cut out of one row of bytes, so only those of a single band have a layout that tells.
    """
    return memory_format(x, *codes) if len(codes) == 1 else memory_format(x)


def _lists(weight: Weight, inputs: Inputs) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """The tensors of a weight of one part for an operator: its codes, its scales, and all other vectors in a fixed order."""
    zeros = [piece.zero_point for piece in weight.bands]
    vectors = [t for t in (*zeros, inputs.scale, inputs.zero_point) if t is not None]
    return [piece.codes for piece in weight.bands], [piece.scale for piece in weight.bands], vectors


def _weight(
    codes: Sequence[Tensor],
    scales: Sequence[Tensor],
    vectors: Sequence[Tensor],
    row_band: Tensor | None,
    text: str,
) -> tuple[Weight, Inputs]:
    """The inverse of `_lists`. A vector that a list lacks becomes None, which the checks refuse."""
    parts, left = parts_of(text), list(vectors)
    zeros = [left.pop(0) if part.weight.zero_point and left else None for part in parts]
    pieces = [PackedWeight(*fields) for fields in zip(codes, scales, zeros, parts, strict=True)]
    scale, zero = (left.pop(0) if left else None for _ in range(2))
    if left:
        raise ValueError(
            f"zero points and input scales must be as many as the parts ask for, got {len(left)} more"
        )
    return Weight((tuple(pieces),), row_band, None, (text,)), Inputs(scale, zero)


def _keep_for_gradient(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, codes, scales, vectors, row_band, bias, last, text = inputs
    picture = len(last) == _GEOMETRY_NUMBERS
    ctx.text, ctx.geometry = text, geometry_of(last) if picture else None
    ctx.x_shape, ctx.x_dtype = x.shape, x.dtype
    ctx.bias_dtype = None if bias is None else bias.dtype
    weight, stored = _weight(codes, scales, vectors, row_band, text)
    inside, spec = None, weight.part.activation
    if spec is not None and stored.scale is not None:  # an online scale clips nothing
        shifted = x if stored.zero_point is None else x - stored.zero_point
        grid = shifted / stored.scale
        inside = (grid >= spec.format.min) & (grid <= spec.format.max)
    branch = [] if picture else list(last)
    # save_for_backward takes one flat list, so the lengths of the lists go along.
    ctx.counts = [len(codes), len(scales), len(vectors), len(branch)]
    ctx.save_for_backward(row_band, inside, *codes, *scales, *vectors, *branch, *([x] if branch else []))


def _gradients(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
    """The clipped straight-through gradient to the input, and those to bias and branch. Packed tensors get none."""
    row_band, inside, *saved = ctx.saved_tensors
    lists = []
    for count in ctx.counts:
        lists.append(saved[:count])
        saved = saved[count:]
    codes, scales, vectors, branch = lists
    to_x = to_bias = None
    if ctx.needs_input_grad[0]:
        weight, _ = _weight(codes, scales, vectors, row_band, ctx.text)
        values = reference.decode_weight(weight).to(ctx.x_dtype)  # [o, i, *k]
        if ctx.geometry is None:
            to_x = gradient @ values
        else:
            pairs = ctx.geometry.stride, ctx.geometry.padding, ctx.geometry.dilation
            to_x = conv2d_input(ctx.x_shape, values, gradient, *pairs, ctx.geometry.groups)
        to_x = to_x if inside is None else to_x * inside
    if ctx.bias_dtype is not None and ctx.needs_input_grad[5]:
        axes = list(range(gradient.dim() - 1)) if ctx.geometry is None else [0, 2, 3]
        to_bias = gradient.sum(axes).to(ctx.bias_dtype) if axes else gradient.to(ctx.bias_dtype)
    none = [[None] * count for count in ctx.counts[:3]]
    last: Any = None
    if ctx.geometry is None:
        to_x, last = _through_branch(gradient, saved, branch, to_x)
    return (to_x, *none, None, to_bias, last, None)


def _through_branch(
    gradient: Tensor, x: list[Tensor], branch: list[Tensor], to_x: Tensor | None
) -> tuple[Tensor | None, list[Tensor]]:
    """The gradient to the input with the branch's share, and the gradients to the branch."""
    if not branch:
        return to_x, []
    (down, up), rows, upstream = branch, x[0].flatten(0, -2), gradient.flatten(0, -2)
    narrow = upstream @ up.to(x[0].dtype)  # [t, r]
    share = (narrow @ down.to(x[0].dtype)).reshape(x[0].shape)  # [..., i]
    to_up = upstream.mT @ (rows @ down.to(x[0].dtype).mT)  # [o, r]
    to_pair = [(narrow.mT @ rows).to(down.dtype), to_up.to(up.dtype)]  # [r, i]
    return (None if to_x is None else to_x + share), to_pair


_linear.register_autograd(_gradients, setup_context=_keep_for_gradient)
_conv2d.register_autograd(_gradients, setup_context=_keep_for_gradient)


def linear(x: Tensor, weight: Weight, inputs: Sequence[Inputs], bias: Tensor | None = None) -> Tensor:
    """A linear layer: the sum over its parts, computed by the chosen backend.

    Args:
        x: The input, floating point [..., i].
        weight: The weight, whose parts' channels add up to i. A branch adds ``x @ down.T @ up.T`` of the unrounded input.
        inputs: The scale and zero point of the input, one entry per part.
        bias: The bias [o], or None.

    Returns:
        [..., o] in the dtype of the input, with straight-through gradients to input and bias.

    Raises:
        ValueError: if a tensor has another shape, dtype, layout or device than the parts ask for.
    """
    through = needs_operator(x, bias)
    branch = weight.branch
    # A pair beside several parts reads all of the input; for gradients two operators are simpler than one.
    apart = branch is not None and (len(weight.columns) > 1 or (through and torch.is_grad_enabled()))
    if branch is not None and not apart:
        if not through:
            return run_linear(x, weight, inputs[0], bias)
        lists = _lists(weight, inputs[0])
        pair = [branch.down, branch.up]
        return torch.ops.difloat.linear(x, *lists, weight.row_band, bias, pair, weight.text)
    terms = []
    for number, (piece, part, stored) in enumerate(_split(x, weight, inputs, x.dim() - 1)):
        shift = None if number else bias
        if through:
            lists = _lists(part, stored)
            term = torch.ops.difloat.linear(piece, *lists, part.row_band, shift, [], part.text)
        else:
            term = run_linear(piece, part, stored, shift)
        terms.append(term)
    out = sum(terms[1:], terms[0])
    return out if branch is None else out + branch_product(x, branch.down, branch.up)


def conv2d(
    x: Tensor, weight: Weight, inputs: Sequence[Inputs], bias: Tensor | None, geometry: Geometry
) -> Tensor:
    """A convolution: the sum over its parts, computed by the chosen backend.

    Args:
        x: The input, floating point [b, i, h, w].
        weight: The weight without a branch, which `layers.low_rank_branch` adds to the result.
        inputs: The scale and zero point of the input, one entry per part.
        bias: The bias [o], or None.
        geometry: Stride, padding, dilation and groups.

    Returns:
        [b, o, h', w'] in the dtype of the input, with straight-through gradients to input and bias.

    Raises:
        ValueError: if the weight has a branch, or a tensor has another shape, dtype, layout or device than the parts ask for.
    """
    if weight.branch is not None:
        raise ValueError("weight of a convolution must have no branch, got one; add it to the result")
    through, terms = needs_operator(x, bias), []
    for number, (piece, part, stored) in enumerate(_split(x, weight, inputs, 1, geometry.groups)):
        shift = None if number else bias
        if through:
            lists = _lists(part, stored)
            term = torch.ops.difloat.conv2d(
                piece, *lists, part.row_band, shift, geometry.numbers(), part.text
            )
        else:
            term = run_conv2d(piece, part, stored, shift, geometry)
        terms.append(term)
    return sum(terms[1:], terms[0])


def _split(
    x: Tensor, weight: Weight, inputs: Sequence[Inputs], axis: int, groups: int = 1
) -> list[tuple[Tensor, Weight, Inputs]]:
    """The channels of the input that belong to every part, with the part's weight and stored scales."""
    channels = [column[0].part.channels for column in weight.columns]
    if len(channels) == 1:
        return [(x, weight.parts()[0], inputs[0])]
    checks.width(x, axis, sum(channels) * groups)  # pieces fall short without a word
    pieces = x.split(channels, dim=axis)
    return list(zip(pieces, weight.parts(), inputs, strict=True))


def branch_product(x: Tensor, down: Tensor, up: Tensor) -> Tensor:
    """``x @ down.T @ up.T`` in the dtype of `x` [..., i], where `down` [r, i] and `up` [o, r] may have another one."""
    return F.linear(F.linear(x, down.to(x.dtype)), up.to(x.dtype))


def decode(weight: Weight) -> Tensor:
    """The float32 weight [o, i, *k] of all parts, in the order of the float layer's rows."""
    pieces = []
    for part in weight.parts():
        if part.row_band is not None:
            pieces.append(reference.decode_weight(part))
            continue
        piece, spec = part.bands[0], part.bands[0].spec
        channels, group_size = piece.part.channels, spec.group_size or 0
        pieces.append(
            dequantize(piece.codes, piece.scale, piece.zero_point, spec.format.name, channels, group_size)
        )
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=1)


def needs_operator(x: Tensor, bias: Tensor | None) -> bool:
    """Whether autograd, a compiler, a tracer or a subclass of tensors must see an operator.

    Everywhere else layers call the backend directly, which saves the time of torch's dispatcher.
    """
    if torch.compiler.is_compiling() or type(x) is not Tensor:
        return True
    if torch._C._get_tracing_state() is not None or torch._C._len_torch_dispatch_stack():
        return True
    if torch._C._is_torch_function_mode_enabled() or torch._C._functorch.peek_interpreter_stack() is not None:
        return True
    return torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad))
