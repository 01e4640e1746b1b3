"""Attention on the CPU, in bfloat16, in float32 or on the grids of a plan.

The native library computes it where it has a unit. Elsewhere torch computes bfloat16 head by head. torch's own attention kernel
reaches a sixth of what the machine can do in bfloat16 (docs/kernels.md). One head at a time keeps the scores in the cache,
which alone is faster.
"""

from __future__ import annotations

import ctypes
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional

from difloat.kernels import checks, dispatch, native_library
from difloat.numbers import formats, integer_grids
from difloat.numbers.formats import Format
from difloat.plan.specs import AttentionPlan

_MAX_WIDTH = 1024  # dimensions of a head
_FASTER_IN_FLOAT32 = ("amx", "avx512", "avxvnni", "avx2")  # units, than torch's attention (docs/kernels.md)
_SCORES = 1 << 20  # of one head at a time without the native unit: 2 MiB in bfloat16


def supports(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> bool:
    """Whether `attend` computes attention of these tensors.

    They must be [b, h, t, d] on the CPU with equally many heads, and no gradient may be asked for. They must be bfloat16, or
    float32 where the native library runs. Where torch multiplies bfloat16 in tiles (AMX), its own attention is three times as
    fast, so bfloat16 is left to it unless a backend is named. So is float32 on units where torch was faster, or nothing was
    timed.
    """
    if dispatch.backend() == "auto":
        unit, tiles = look()
        if query.dtype == torch.bfloat16 and tiles:
            return False
        if query.dtype == torch.float32 and unit not in _FASTER_IN_FLOAT32:
            return False
    return _fits(query, key, value, mask)


_seen: tuple[str | None, bool] = (None, False)
_grids: dict[str, bool] = {}  # whether the library rounds to a format, by its name


def look(plan: AttentionPlan | None = None) -> tuple[str | None, bool]:
    """Find the unit in use, whether torch has tiles, and whether the library rounds to the grids of a plan.

    A compiler cannot look into the library, and works with what was seen before.

    Returns:
        The unit, or None without one, and whether torch has tiles.
    """
    global _seen
    if not torch.compiler.is_compiling():
        dispatch.backend()  # which reads the environment once
        _seen = native_library.unit(), torch_has_tiles()
        for format in () if plan is None else (plan.operand, plan.softmax):
            if format is not None:
                _is_rounded_to(format)
    return _seen


def _is_rounded_to(format: Format) -> bool:
    if not torch.compiler.is_compiling():
        _grids[format.name] = native_library.attention_grid(format) is not None
    return _grids.get(format.name, False)


@cache
def torch_has_tiles() -> bool:
    """Whether torch multiplies bfloat16 in the tiles of AMX here."""
    return bool(torch.backends.cpu.get_cpu_capability() == "AVX512" and torch.cpu._is_amx_tile_supported())


def _fits(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> bool:
    tensors = (query, key, value)
    return (
        all(x.dim() == 4 and x.dtype == query.dtype and x.device.type == "cpu" for x in tensors)
        and (query.dtype == torch.bfloat16 or (query.dtype == torch.float32 and _is_native(query)))
        and query.shape[:2] == key.shape[:2] == value.shape[:2]
        and key.shape[2] == value.shape[2]
        and query.shape[3] == key.shape[3] == value.shape[3] <= _MAX_WIDTH
        and min(query.numel(), key.numel()) > 0
        and not (torch.is_grad_enabled() and any(x.requires_grad for x in tensors))
        and (mask is None or not mask.requires_grad)
        and dispatch.backend() != "reference"
    )


def _is_native(query: Tensor) -> bool:
    here = look()[0] is not None and dispatch.backend() in ("auto", "cpu")
    return here and query.dtype in native_library.TYPES


@torch.library.custom_op("difloat::attention", mutates_args=())
def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """``softmax(query @ key.T * scale + mask) @ value`` of every head, as `scaled_dot_product_attention` defines it.

    Args:
        query: The queries, bfloat16 or float32 [b, h, q, d].
        key: The keys, of the same dtype [b, h, k, d].
        value: The values, of the same dtype [b, h, k, d].
        mask: A tensor that broadcasts to [b, h, q, k]. A boolean one says which keys take part, another is added to the
            scores. With None every key takes part. A query for which no key takes part gets the mean of the values.
        scale: The factor of the scores, usually ``d ** -0.5``.

    Returns:
        [b, h, q, d] in the dtype of the query, which lies in memory as [b, q, h, d], as the next layer reads it.
    """
    checks.attention(query, key, value, mask)
    bias = _bias(mask, (*query.shape[:3], key.shape[2]))
    if _is_native(query):
        return _native(query, key, value, bias, scale, "", "")
    return _by_head(query, key, value, bias, scale)


@attend.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    batch, heads, queries, width = query.shape
    return query.new_empty(batch, queries, heads, width).transpose(1, 2)


def carries_out(plan: AttentionPlan, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> bool:
    """Whether `attend_on_grids` computes this attention.

    Tensors must be such that `supports` holds, with tiles or without. The native library must run here and round to the grids
    of the plan.
    """
    grids = [format for format in (plan.operand, plan.softmax) if format is not None]
    return (
        _fits(query, key, value, mask)
        and _is_native(query)
        and all(_is_rounded_to(format) for format in grids)
        and (plan.operand is None or plan.operand.signed)
    )


@torch.library.custom_op("difloat::attention_on_grids", mutates_args=())
def attend_on_grids(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, operand: str, softmax: str
) -> Tensor:
    """`attend` with query, key, value and attention map rounded as an `AttentionPlan` says, where `carries_out` is true.

    Products of queries and keys are exact, in int8 where the grid of `operand` fits it. The rounded map is exact. Values are
    rounded to the dtype that they are multiplied in after their scales are multiplied in.

    Args:
        query: The queries, bfloat16 or float32 [b, h, q, d].
        key: The keys, of the same dtype [b, h, k, d].
        value: The values, of the same dtype [b, h, k, d].
        mask: A boolean mask or one that is added to the scores, as `attend` takes it.
        scale: The factor of the scores.
        operand: Name of the grid of query, key and value, which have one online scale per token and head. The empty name
            leaves them unrounded.
        softmax: Name of the unsigned grid of the attention map, whose largest value stands for 1. The empty name leaves the
            map unrounded.

    Returns:
        [b, h, q, d] in the dtype of the query and the memory order of `attend`.
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
    """The mask as float32 numbers to add, expanded to `shape`. Only its last axis is copied."""
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
    """How the unit rounds its operands, and the grid. 0 stands for no rounding, 1 for int8, 2 for integers in bfloat16."""
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
    # The unit reads whole vectors along the last axis, so only that one must be dense.
    query, key, value = (x if x.stride(3) == 1 else x.contiguous() for x in (query, key, value))
    batch, heads, queries, width = query.shape
    out = query.new_empty(batch, queries, heads, width).transpose(1, 2)
    triple = ctypes.c_int64 * 3  # strides of batch, head and token
    # Strides of an absent mask are passed on too, so they must be numbers.
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
        native_library.TYPES[query.dtype],
    )
    library = native_library.attention_library(query.dtype)
    native_library.check(library.difloat_attend(call, native_library.threads()))
    return out


def _by_head(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """Attention with the scores of one head, or of some of its queries, at a time. The softmax is taken in float32."""
    batch, heads, queries, width = query.shape
    out = query.new_empty(batch, queries, heads, width).transpose(1, 2)
    at_once = max(1, _SCORES // key.shape[2])
    for b in range(batch):
        for h in range(heads):
            transposed, values = key[b, h].t(), value[b, h]
            for start in range(0, queries, at_once):
                rows = slice(start, start + at_once)
                scores = (query[b, h, rows] @ transposed).float().mul_(scale)  # [rows, k]
                if bias is not None:
                    # A finite floor instead of -inf gives a query without any key the mean of the values, not NaN.
                    scores = scores.add_(bias[b, h, rows]).clamp_min_(-1e30)
                out[b, h, rows] = functional.softmax(scores, -1).to(values.dtype) @ values
    return out
