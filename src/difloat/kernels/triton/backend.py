"""The GPU backend: quantized linear layers and convolutions in Triton, exact on FP8 and int8 tensor cores.

Two launches per layer: the input is quantized and laid out by one kernel (`triton_quantize`), multiplied with the packed
weight by another (`triton_matmul`); a third adds up where few tokens make several programs share the k axis. What carries
the numbers is decided by `triton_operands`, tiles by `triton_tiles`.

Importing this module neither needs nor imports Triton; `available` says whether a device can use it.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

from difloat.kernels.triton import operands as triton_operands
from difloat.kernels.triton.operands import Operands
from difloat.kernels.weight import Rows
from difloat.plan.specs import Part

_MOST_PRODUCTS = 2**31 // 128**2  # of int8 numbers whose sum surely fits int32


@dataclass(frozen=True)
class RowGroup:
    """Consecutive output channels of one width in a layer of mixed widths.

    Attributes:
        packed: uint8 [o, bytes].
        weight_scale: float32, as many as the weight spec of `part` asks for.
        weight_zero_point: Likewise, or None.
        part: Formats; the activation is the same in all groups of a layer.
    """

    packed: Tensor
    weight_scale: Tensor
    weight_zero_point: Tensor | None
    part: Part


@cache
def interpreting() -> bool:
    """Whether kernels run in Triton's interpreter, on tensors of the CPU too (``TRITON_INTERPRET=1``)."""
    import triton

    return bool(triton.knobs.runtime.interpret)


def available(device: torch.device) -> bool:
    """Whether Triton is installed and computes on this device."""
    if find_spec("triton") is None:
        return False
    if device.type == "cuda" and torch.version.cuda is not None:
        return True
    return "TRITON_INTERPRET" in os.environ and interpreting()


def capability(device: torch.device) -> tuple[int, int]:
    """CUDA compute capability; the interpreter computes what Hopper can."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (9, 0)


def supports(part: Part, weight_shape: Sequence[int], x: Tensor) -> bool:
    """Whether `linear` or `conv2d` computes this part of a layer.

    Args:
        part: Formats and granularities.
        weight_shape: Of the float weight: [o, i] or [o, i, kh, kw].
        x: The input, [..., i] or [b, i, h, w].
    """
    if not available(x.device) or x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return False
    if math.prod(weight_shape[1:]) >= _MOST_PRODUCTS:
        return False
    channels = x.shape[1 if len(weight_shape) == 4 else -1]
    if not channels == part.channels == weight_shape[1]:
        return False  # a convolution in groups
    activation = part.activation
    if activation is not None and (
        activation.granularity not in ("tensor", "token") or (activation.online and activation.zero_point)
    ):
        return False
    operands = _operands(part, x)
    if operands is None:
        return False
    # Sums of an input per group are made step by step, and a step is a power of two.
    return not (part.weight.zero_point and operands.group_words & (operands.group_words - 1))


def _on(device: torch.device) -> AbstractContextManager[object]:
    """Launches go to the current device, which need not be the one of the tensors."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _operands(part: Part, x: Tensor, planes: int = 0) -> Operands | None:
    return triton_operands.choose(
        part.weight.format,
        None if part.activation is None else part.activation.format,
        x.dtype,
        capability(x.device),
        group_size=part.weight.group_size or 0,
        planes=planes,
    )


def _required(part: Part, x: Tensor, planes: int = 0) -> Operands:
    operands = _operands(part, x, planes)
    if operands is None:
        raise ValueError(
            f"formats must fit one type of tensor core operands, got {part.to_json()} for a {x.dtype} input on "
            f"{x.device}; ask supports() first"
        )
    return operands


def linear(
    x: Tensor,
    packed: Tensor,
    weight_scale: Tensor,
    weight_zero_point: Tensor | None,
    input_scale: Tensor | None,
    input_zero_point: Tensor | None,
    bias: Tensor | None,
    part: Part,
    *,
    adapter: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """One part of a linear layer.

    Args:
        x: [..., i], bfloat16, float16 or float32.
        packed: uint8 [o, bytes] as `packing.pack` lays it out; rows may be apart, as slices of a layer's weight are.
        weight_scale: float32, as many as `part.weight` asks for.
        weight_zero_point: Likewise, or None.
        input_scale: float32 [1], or None where it is found online or the input is not quantized.
        input_zero_point: float32 [1] or None.
        bias: [o] or None.
        part: Formats and granularities, such that `supports` holds.
        adapter: ``(down [r, i], up [o, r])`` in the dtype of `x`: adds ``x @ down.T @ up.T``, where x is the input before
            it is rounded, read in the same pass.

    Returns:
        [..., o] in the dtype of `x`.
    """
    group = RowGroup(packed, weight_scale, weight_zero_point, part)
    return linear_groups(x, [group], input_scale, input_zero_point, bias, adapter=adapter)


def linear_rows(
    x: Tensor, weight: Rows, input_scale: Tensor | None, input_zero_point: Tensor | None, bias: Tensor | None
) -> Tensor:
    """`linear` with rows of several widths: the input is quantized once for all of them."""
    groups = [RowGroup(*band) for band in weight.bands()]
    stored_bias = None if bias is None else bias.index_select(0, weight.order())
    return linear_groups(x, groups, input_scale, input_zero_point, stored_bias, weight.places())


def linear_groups(
    x: Tensor,
    groups: Sequence[RowGroup],
    input_scale: Tensor | None,
    input_zero_point: Tensor | None,
    bias: Tensor | None,
    order: Tensor | None = None,
    *,
    adapter: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """A linear layer whose output channels may have different widths: the input is quantized once for all of them.

    Args:
        x: [..., i].
        groups: Runs of output channels, in the order of their storage.
        input_scale: As in `linear`.
        input_zero_point: As in `linear`.
        bias: [o] in storage order, or None.
        order: int32 or int64 [o]: output channel j is row ``order[j]`` of the storage; None where that is j.
        adapter: As in `linear`, `up` in storage order.

    Returns:
        [..., o] in the dtype of `x`.
    """
    from difloat.kernels.triton import launch

    planes = max(triton_operands.least_planes(group.part.weight.format.bits) for group in groups)
    source = launch.rows_source(x.reshape(-1, x.shape[-1]))
    counts = [group.packed.shape[0] for group in groups]
    out = x.new_empty((source.tokens, sum(counts)))
    starts = [sum(counts[:n]) for n in range(len(counts))]
    inputs: dict[tuple[Operands | str, int], launch.Input] = {}
    with _on(x.device):
        for group, start, count in zip(groups, starts, counts, strict=True):
            run = slice(start, start + count)
            operands = _required(group.part, x, planes)
            weight = launch.Weight(
                group.packed, group.weight_scale, group.weight_zero_point, group.part.weight
            )
            branch = None if adapter is None else launch.Adapter(adapter[0], adapter[1][run])
            if source.tokens == 0:
                continue
            if launch.lies_well(source, operands, weight, branch):
                given = launch.as_it_lies(source, operands)
            else:
                sum_groups = max(1, weight.scale_stride) if group.weight_zero_point is not None else 0
                key = (operands.kind, sum_groups)
                if key not in inputs:
                    spec = group.part.activation
                    inputs[key] = launch.quantized(
                        source, operands, spec, input_scale, input_zero_point, sum_groups, branch
                    )
                given = inputs[key]
            own_bias = None if bias is None else bias[run]
            launch.multiply(
                given, operands, weight, group.part, input_zero_point, own_bias, out[:, run], branch
            )
    ordered = out if order is None else out.index_select(1, order)
    return ordered.reshape(*x.shape[:-1], out.shape[1])


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
    """One part of a convolution, as an implicit product: no patches are stored.

    Args:
        x: [b, i, h, w] in any memory format; channels last is the fastest.
        packed: uint8 [o, bytes, kh, kw]; channels last saves a copy in every call.
        weight_scale: As in `linear`.
        weight_zero_point: As in `linear`.
        input_scale: As in `linear`; an online scale "per token" is one per picture.
        input_zero_point: As in `linear`; padding is 0, not this.
        bias: [o] or None.
        part: Formats and granularities, such that `supports` holds.
        stride: Of the kernel, (h, w).
        padding: Likewise, zeros on both sides.
        dilation: Likewise.
        groups: Must be 1.

    Returns:
        [b, o, h', w'] in the dtype of `x`, channels last.
    """
    if groups != 1:
        raise ValueError(f"groups must be 1, got {groups}; ask supports() first")
    group = RowGroup(packed, weight_scale, weight_zero_point, part)
    out = _conv2d_groups(x, [group], input_scale, input_zero_point, bias, (stride, padding, dilation))
    return out.permute(0, 3, 1, 2)


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
    """`conv2d` with rows of several widths: the input is quantized once for all of them."""
    if groups != 1:
        raise ValueError(f"groups must be 1, got {groups}; ask supports() first")
    bands = [RowGroup(*band) for band in weight.bands()]
    stored_bias = None if bias is None else bias.index_select(0, weight.order())
    geometry = (stride, padding, dilation)
    out = _conv2d_groups(x, bands, input_scale, input_zero_point, stored_bias, geometry)
    return weight.restored(out, -1).permute(0, 3, 1, 2)


def _conv2d_groups(
    x: Tensor,
    groups: Sequence[RowGroup],
    input_scale: Tensor | None,
    input_zero_point: Tensor | None,
    bias: Tensor | None,
    geometry: tuple[Sequence[int], ...],
) -> Tensor:
    """[b, h', w', o] in the order of the storage, which `bias` has too."""
    from difloat.kernels.triton import launch

    planes = max(triton_operands.least_planes(group.part.weight.format.bits) for group in groups)
    picture = launch.picture_of(x, groups[0].packed, *geometry)
    counts = [group.packed.shape[0] for group in groups]
    out = x.new_empty((x.shape[0], picture.out_height, picture.out_width, sum(counts)))
    if out.numel() == 0:
        return out
    flat, start = out.view(-1, sum(counts)), 0
    inputs: dict[tuple[Operands | str, int], launch.Input] = {}
    with _on(x.device):
        for group, count in zip(groups, counts, strict=True):
            run, start = slice(start, start + count), start + count
            operands = _required(group.part, x, planes)
            taps_first = group.packed.permute(0, 2, 3, 1).contiguous()
            weight = launch.Weight(taps_first, group.weight_scale, group.weight_zero_point, group.part.weight)
            sum_groups = max(1, weight.scale_stride) if group.weight_zero_point is not None else 0
            key = (operands.kind, sum_groups)
            if key not in inputs:
                spec, source = group.part.activation, launch.picture_source(x)
                inputs[key] = launch.quantized(
                    source, operands, spec, input_scale, input_zero_point, sum_groups, None
                )
            own_bias = None if bias is None else bias[run]
            launch.multiply(
                inputs[key],
                operands,
                weight,
                group.part,
                input_zero_point,
                own_bias,
                flat[:, run],
                None,
                picture,
            )
    return out
