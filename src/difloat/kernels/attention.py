"""Attention on the CPU: the native unit where it runs, torch head by head elsewhere; in bfloat16, or on the grids of a plan.

torch's own attention kernel reaches a sixth of what the machine can do in bfloat16 (docs/kernels.md). One head at a time keeps
the scores in the cache, which alone is faster.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor
from torch.nn import functional

from difloat.kernels import checks, dispatch, native_library
from difloat.numbers import formats, integer_grids
from difloat.plan.specs import AttentionPlan

_MAX_WIDTH = 1024  # dimensions of a head
_SCORES = 1 << 20  # of one head at a time without the native unit: 2 MiB in bfloat16


def supports(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> bool:
    """Whether `attend` computes this: bfloat16 [b, h, t, d] on the CPU, as many heads everywhere, no gradient asked for."""
    tensors = (query, key, value)
    return (
        all(x.dim() == 4 and x.dtype == torch.bfloat16 and x.device.type == "cpu" for x in tensors)
        and query.shape[:2] == key.shape[:2] == value.shape[:2]
        and key.shape[2] == value.shape[2]
        and query.shape[3] == key.shape[3] == value.shape[3] <= _MAX_WIDTH
        and min(query.numel(), key.numel()) > 0
        and not (torch.is_grad_enabled() and any(x.requires_grad for x in tensors))
        and (mask is None or not mask.requires_grad)
        and dispatch.backend() != "reference"
    )


@torch.library.custom_op("difloat::attention", mutates_args=())
def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """``softmax(query @ key.T * scale + mask) @ value`` of every head, as `scaled_dot_product_attention` defines it.

    Args:
        query: bfloat16 [b, h, q, d].
        key: bfloat16 [b, h, k, d].
        value: bfloat16 [b, h, k, d].
        mask: Broadcasts to [b, h, q, k]; boolean (True: takes part) or added to the scores. None: everything takes part.
            A query for which nothing takes part gets the mean of the values.
        scale: Of the scores.

    Returns:
        bfloat16 [b, h, q, d], in memory [b, q, h, d], which is how the next layer wants it.
    """
    checks.attention(query, key, value, mask)
    bias = _bias(mask, (*query.shape[:3], key.shape[2]))
    if native_library.attention_unit() and dispatch.backend() in ("auto", "cpu"):
        return _native(query, key, value, bias, scale, "", "")
    return _by_head(query, key, value, bias, scale)


@attend.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    batch, heads, queries, width = query.shape
    return query.new_empty(batch, queries, heads, width).transpose(1, 2)


def carries_out(plan: AttentionPlan, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> bool:
    """Whether `attend_on_grids` computes this: what `supports` says, on the native unit, on grids that it rounds to."""
    grids = [format for format in (plan.operand, plan.softmax) if format is not None]
    return (
        supports(query, key, value, mask)
        and native_library.attention_unit()
        and dispatch.backend() in ("auto", "cpu")
        and all(native_library.attention_grid(format) is not None for format in grids)
        and (plan.operand is None or plan.operand.signed)
    )


@torch.library.custom_op("difloat::attention_on_grids", mutates_args=())
def attend_on_grids(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, operand: str, softmax: str
) -> Tensor:
    """`attend` with query, key, value and map rounded as an `AttentionPlan` says; only where `carries_out` is true.

    Products of queries and keys are exact, in int8 where the grid of `operand` fits it. The rounded map is exact in bfloat16;
    values are rounded to it after their scales are multiplied in.

    Args:
        query: As for `attend`, like the next four.
        key: See there.
        value: See there.
        mask: See there.
        scale: See there.
        operand: Grid of query, key and value, by name, one online scale per token and head; empty leaves them.
        softmax: Unsigned grid of the map, by name, whose largest value stands for 1; empty leaves it.
    """
    checks.attention(query, key, value, mask)
    bias = _bias(mask, (*query.shape[:3], key.shape[2]))
    return _native(query, key, value, bias, scale, operand, softmax)


@attend_on_grids.register_fake
def _(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, operand: str, softmax: str
) -> Tensor:
    batch, heads, queries, width = query.shape
    return query.new_empty(batch, queries, heads, width).transpose(1, 2)


def _bias(mask: Tensor | None, shape: tuple[int, ...]) -> Tensor | None:
    """The mask as float32 numbers to add, expanded to `shape` without copies but of its last axis."""
    if mask is None:
        return None
    if mask.dtype == torch.bool:
        bias = torch.zeros(mask.shape).masked_fill_(~mask, -torch.inf)
    else:
        bias = mask.float()
    if bias.shape[-1] != shape[-1] or bias.stride(-1) != 1:
        bias = bias.expand(*bias.shape[:-1], shape[-1]).contiguous()
    return bias.expand(shape)


def _grid(name: str) -> tuple[int, native_library.Grid]:
    """How the unit rounds its operands (0: not, 1: int8, 2: integers in bfloat16), and the grid."""
    if not name:
        return 0, native_library.Grid()
    format = formats.parse(name)
    grid, small = native_library.attention_grid(format), integer_grids.grid_of(format)
    assert grid is not None
    return (1, native_library.grid(format)) if small is not None and not small.shift else (2, grid)


def _native(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    scale: float,
    operand: str,
    softmax: str,
) -> Tensor:
    query, key, value = (x if x.stride(3) == 1 else x.contiguous() for x in (query, key, value))
    batch, heads, queries, width = query.shape
    out = query.new_empty(batch, queries, heads, width).transpose(1, 2)
    triple = ctypes.c_int64 * 3
    none = torch.zeros(0).expand(1, 1, 1, 0)
    call = native_library.Attention(
        query.data_ptr(),
        key.data_ptr(),
        value.data_ptr(),
        out.data_ptr(),
        None if bias is None else bias.data_ptr(),
        batch,
        heads,
        queries,
        key.shape[2],
        width,
        *(triple(*x.stride()[:3]) for x in (query, key, value, out, none if bias is None else bias)),
        scale,
        *_grid(operand),
        *_grid(softmax),
    )
    native_library.check(native_library.attention_library().difloat_attend(call, native_library.threads()))
    return out


def _by_head(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """Scores of one head, or of some of its queries, at a time; softmax in float32."""
    batch, heads, queries, width = query.shape
    out = query.new_empty(batch, queries, heads, width).transpose(1, 2)
    at_once = max(1, _SCORES // key.shape[2])
    for b in range(batch):
        for h in range(heads):
            transposed, values = key[b, h].t(), value[b, h]
            for start in range(0, queries, at_once):
                rows = slice(start, start + at_once)
                scores = (query[b, h, rows] @ transposed).float().mul_(scale)
                if bias is not None:
                    scores = scores.add_(bias[b, h, rows]).clamp_min_(-1e30)
                out[b, h, rows] = functional.softmax(scores, -1).to(values.dtype) @ values
    return out
