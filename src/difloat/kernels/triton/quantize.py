"""Inputs on their way into the product: one kernel finds their scales, rounds them and lays them out in planes.

The kernel reads the input once from memory, and a second time from cache where the scale is the token's largest magnitude. It
writes the operands, the sums that zero points ask for, and the low-rank product of an adapter.

An input with NaN must not become an output of plausible numbers. Operands have no NaN, so the scale carries it. The bits of
magnitudes are compared as integers, where NaN is larger than every number, and a token with NaN gets the scale NaN.
"""

from __future__ import annotations

import triton
import triton.language as tl

from difloat.kernels.triton.decode import encode, round_to_grid
from difloat.kernels.triton.matmul import multiply_floats

_INFINITY_BITS = tl.constexpr(0x7F800000)


@triton.jit
def magnitude_bits(x: tl.tensor) -> tl.tensor:
    """The bits of float32 magnitudes, which are integers in the same order, with NaN above infinity."""
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def online_scale(largest_bits: tl.tensor, FORMAT: tl.constexpr) -> tl.tensor:
    """The scale of `reference.online_scale` for the bits of the largest magnitude."""
    largest = largest_bits.to(tl.float32, bitcast=True)
    # div_rn takes tensors, so the constant is added to one.
    return tl.where(largest_bits > 0, tl.div_rn(largest, FORMAT.max + tl.zeros_like(largest)), 1.0)


@triton.jit
def largest_magnitude(
    x: tl.tensor,
    out: tl.tensor,
    values: tl.tensor,
    span_stride: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    """Raise ``out[span]`` (int32, zero at first) to the bits of the largest magnitude of `values` dense numbers."""
    span = tl.program_id(1)
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    numbers = tl.load(x + span.to(tl.int64) * span_stride + at, at < values, 0.0).to(tl.float32)
    tl.atomic_max(out + span, tl.max(magnitude_bits(numbers), 0))


@triton.jit
def project(
    x: tl.tensor, down: tl.tensor, low: tl.tensor, token: tl.tensor, offsets: tl.tensor, tokens: tl.tensor,
    channels: tl.tensor, rank: tl.tensor, RANK: tl.constexpr, CHANNELS: tl.constexpr,
) -> None:  # fmt: skip
    """Write the low-rank product of these tokens: ``low[token] = x[token] @ down.T``."""
    r = tl.arange(0, RANK)
    sum = tl.zeros((token.shape[0], RANK), tl.float32)
    for start in range(0, channels, CHANNELS):
        channel = start + tl.arange(0, CHANNELS)
        has = (channel < channels)[None, :]
        left = tl.load(x + offsets[:, None] + channel[None, :], (token < tokens)[:, None] & has, 0.0)
        right = tl.load(down + r[:, None] * channels + channel[None, :], (r < rank)[:, None] & has, 0.0)
        sum += multiply_floats(left, tl.trans(right))  # [t, r]
    at = low + token[:, None] * rank + r[None, :]  # [t, r]
    tl.store(at, sum.to(low.dtype.element_ty), (token < tokens)[:, None] & (r < rank)[None, :])


@triton.jit
def find_scale(
    x: tl.tensor, scale: tl.tensor, token: tl.tensor, offsets: tl.tensor, channel_stride: tl.tensor,
    tokens: tl.tensor, channels: tl.tensor, scale_span: tl.tensor, FORMAT: tl.constexpr, SOURCE: tl.constexpr,
    CHANNELS: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """The scale of every token: from its own magnitudes, from the bits of the largest one that is given, or as stored."""
    has_token = token < tokens
    if SOURCE == "stored":
        return tl.load(scale + token // scale_span, has_token, 1.0)
    elif SOURCE == "largest":
        return online_scale(tl.load(scale + token // scale_span, has_token, 0), FORMAT)
    else:
        bits = tl.zeros((token.shape[0],), tl.int32)
        for start in range(0, channels, CHANNELS):
            channel = start + tl.arange(0, CHANNELS)
            at = x + offsets[:, None] + (channel * channel_stride)[None, :]
            # Channels that do not exist are loaded as 0, which no magnitude is below.
            numbers = tl.load(at, has_token[:, None] & (channel < channels)[None, :], 0.0).to(tl.float32)
            bits = tl.maximum(bits, tl.max(magnitude_bits(numbers), 1))
        return online_scale(bits, FORMAT)


@triton.jit(do_not_specialize=("tokens", "span", "scale_span"))
def quantize(
    x: tl.tensor, out: tl.tensor, token_scale: tl.tensor, token_sum: tl.tensor, scale: tl.tensor,
    zero_point: tl.tensor, down: tl.tensor, low: tl.tensor, tokens: tl.tensor, channels: tl.tensor, rank: tl.tensor,
    span: tl.tensor, span_stride: tl.tensor, token_stride: tl.tensor, channel_stride: tl.tensor,
    scale_span: tl.tensor, words: tl.tensor, groups: tl.tensor, OPERANDS: tl.constexpr, SOURCE: tl.constexpr,
    RANK: tl.constexpr, TOKENS: tl.constexpr, WORDS: tl.constexpr,
) -> None:  # fmt: skip
    """Write the operands ``out[token, plane, word]`` of tokens that lie `token_stride` apart in spans of `span`.

    This also writes `token_scale` with one entry per token, `token_sum` with the grid values summed per token and group of
    `WORDS` words (or per token where `groups` is 1), and `low`. Without an activation format values are only laid out.
    Channels that do not exist are zero.
    """
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    has_token = token < tokens
    offsets = (token // span).to(tl.int64) * span_stride + (token % span).to(tl.int64) * token_stride
    PLANES: tl.constexpr = OPERANDS.planes
    CHANNELS: tl.constexpr = WORDS * PLANES
    FORMAT: tl.constexpr = OPERANDS.activation
    if low is not None:
        project(x, down, low, token, offsets, tokens, channels, rank, RANK, CHANNELS)
    if FORMAT is not None:
        s = find_scale(
            x, scale, token, offsets, channel_stride, tokens, channels, scale_span, FORMAT, SOURCE, CHANNELS
        )
    total = tl.zeros((TOKENS,), tl.float32)
    largest = tl.zeros((TOKENS,), tl.int32)
    plane = tl.arange(0, PLANES)[None, None, :]  # [1, 1, planes]
    for start in range(0, words, WORDS):
        word = (start + tl.arange(0, WORDS))[None, :, None]  # [1, words, 1]
        channel = word * PLANES + plane  # [1, words, planes]
        exists = has_token[:, None, None] & (channel < channels)  # [t, words, planes]
        value = tl.load(x + offsets[:, None, None] + channel * channel_stride, exists, 0.0)
        at = out + token.to(tl.int64)[:, None, None] * (words * PLANES) + plane * words + word
        inside = has_token[:, None, None] & (word < words)
        if FORMAT is None:
            grid = value.to(tl.float32)
            tl.store(at, value, inside)
        else:
            grid, bits = on_grid(value, exists, s, zero_point, FORMAT)
            largest = tl.maximum(largest, bits)
            tl.store(at, encode(grid, OPERANDS), inside)
        if token_sum is not None:
            sums = tl.sum(tl.sum(grid, 2), 1)  # [t]
            if groups > 1:
                tl.store(token_sum + token * groups + start // WORDS, sums, has_token)
            total += sums
    if token_sum is not None:
        if groups == 1:
            tl.store(token_sum + token, total, has_token)
    if FORMAT is not None:
        tl.store(token_scale + token, tl.where(largest > _INFINITY_BITS, float("nan"), s), has_token)


@triton.jit
def on_grid(
    value: tl.tensor, exists: tl.tensor, scale: tl.tensor, zero_point: tl.tensor, FORMAT: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """The values [token, word, plane] rounded to the grid, and the bits of the largest magnitude of each token.

    Values that do not exist become zero.
    """
    shifted = value.to(tl.float32)
    bits = tl.max(tl.max(magnitude_bits(shifted), 2), 1)
    if zero_point is not None:
        shifted -= tl.load(zero_point)
    # The correctly rounded quotient: a product with the inverse would differ from the reference at ties.
    divided = tl.div_rn(shifted, scale[:, None, None] + tl.zeros_like(shifted))
    return tl.where(exists, round_to_grid(divided, FORMAT), 0.0), bits
