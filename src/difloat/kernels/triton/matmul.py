"""The product: packed weights, unpacked in registers, times quantized inputs, for linear layers and convolutions.

One kernel does both. A linear layer is a convolution with one tap. A convolution is a product whose k axis runs over the taps
of the kernel and, within a tap, over channels. Rows of the input are gathered by position, so no patch is ever stored.

The product is computed transposed, with weights on the left. On Hopper the left operand of the tensor cores may stay in
registers, which is where unpacked weights are. FP8 sums leave the tensor core every 128 k, since it keeps about 14 bits.

A weight ``s_w n + z_w`` and an input ``s_x m + z_x``, on grids n and m, have the product
``sum w x = s_w s_x sum n m + z_w s_x sum m + z_x sum w``. The quantizer delivers ``sum m``, and `weight_sums` the last sum.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl

from difloat.kernels.triton.decode import INTERPRET, decode, decode_value

VARYING = ("tokens", "splits", "height", "width", "out_height", "out_width")  # no reason to compile again
PROMOTE = tl.constexpr(128)  # k that FP8 tensor cores may add up before the sum moves to a float32 register


@dataclass(frozen=True)
class Geometry:
    """The shape of a convolution, which is a compile-time constant of the kernels."""

    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]

    @property
    def taps(self) -> int:
        """Positions of the kernel."""
        return self.kernel[0] * self.kernel[1]


@triton.jit
def sources(
    token: tl.tensor,
    tap: tl.tensor,
    tokens: tl.tensor,
    height: tl.tensor,
    width: tl.tensor,
    out_height: tl.tensor,
    out_width: tl.tensor,
    GEOMETRY: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """The input token (pixel) that every output token meets at a tap of the kernel, and whether it exists."""
    if GEOMETRY is None:
        return token, token < tokens
    else:
        image = token // (out_height * out_width)  # [t]
        at = token % (out_height * out_width)  # the output pixel within its picture
        row = at // out_width * GEOMETRY.stride[0] - GEOMETRY.padding[0]
        row += tap // GEOMETRY.kernel[1] * GEOMETRY.dilation[0]
        column = at % out_width * GEOMETRY.stride[1] - GEOMETRY.padding[1]
        column += tap % GEOMETRY.kernel[1] * GEOMETRY.dilation[1]
        inside = (row >= 0) & (row < height) & (column >= 0) & (column < width) & (token < tokens)
        return (image * height + row) * width + column, inside


@triton.jit
def multiply(a: tl.tensor, b: tl.tensor, sum: tl.tensor, OPERANDS: tl.constexpr) -> tl.tensor:
    """``sum + a @ b`` on tensor cores."""
    if OPERANDS.kind == "e4m3":
        DEPTH: tl.constexpr = a.shape[1]
        return tl.dot(a, b, sum, max_num_imprecise_acc=DEPTH if DEPTH < PROMOTE else PROMOTE)
    elif OPERANDS.kind == "int8":
        return tl.dot(a, b, sum, out_dtype=tl.int32)
    elif INTERPRET:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), sum)
    else:
        return tl.dot(a, b, sum)


@triton.jit
def zeros(ROWS: tl.constexpr, TOKENS: tl.constexpr, OPERANDS: tl.constexpr) -> tl.tensor:
    """An empty accumulator."""
    return tl.zeros((ROWS, TOKENS), tl.int32 if OPERANDS.kind == "int8" else tl.float32)


@triton.jit
def accumulate(
    sum: tl.tensor, x: tl.tensor, weight: tl.tensor, word: tl.tensor, plane_stride: tl.tensor, row_bytes: tl.tensor,
    words: tl.tensor, has_token: tl.tensor, has_row: tl.tensor, OPERANDS: tl.constexpr, PAIRED: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Add the products of one run of words. `x` points at rows of tokens, and `weight` at rows of the packed weight.

    With `PAIRED`, words of `x` are int32 that hold the inputs of two planes.
    """
    BITS: tl.constexpr = OPERANDS.weight.bits
    PLANES: tl.constexpr = OPERANDS.planes
    byte = word * OPERANDS.word_bytes  # [words], the first byte of every word
    inputs = x[:, None] + word[None, :]  # [t, words]
    bytes = weight[:, None] + byte[None, :]  # [rows, words]
    has_input = has_token[:, None] & (word < words)[None, :]
    if PAIRED:  # two planes of 16 bits lie as pairs in one word of 32
        pairs = tl.load(inputs, has_input, 0)
    raw = tl.load(bytes, has_row[:, None] & (byte < row_bytes)[None, :], 0)
    for plane in tl.static_range(PLANES):
        # The codes of this plane begin a byte of their own, which no earlier plane has loaded.
        if plane * BITS % 8 == 0 and plane > 0:
            at = byte + plane * BITS // 8
            raw = tl.load(weight[:, None] + at[None, :], has_row[:, None] & (at < row_bytes)[None, :], 0)
        if PAIRED:
            half = (pairs >> (16 * plane)).to(tl.int16)
            right = tl.trans(half.to(tl.float16 if OPERANDS.kind == "fp16" else tl.bfloat16, bitcast=True))
        else:
            right = tl.trans(tl.load(inputs + plane * plane_stride, has_input, 0.0))
        if plane * BITS % 8 + BITS <= 8:
            sum = multiply(decode(raw, plane * BITS % 8, OPERANDS), right, sum, OPERANDS)
        else:  # the code straddles two bytes
            at = byte + (plane * BITS // 8 + 1)
            following = tl.load(
                weight[:, None] + at[None, :], has_row[:, None] & (at < row_bytes)[None, :], 0
            )
            straddling = (raw >> (plane * BITS % 8)) | (following << (8 - plane * BITS % 8))
            sum = multiply(decode(straddling, 0, OPERANDS), right, sum, OPERANDS)
            raw = following
    return sum


@triton.jit
def share(
    x: tl.tensor, weight: tl.tensor, token_sum: tl.tensor, weight_scale: tl.tensor, weight_zero: tl.tensor,
    token: tl.tensor, row: tl.tensor, tokens: tl.tensor, rows: tl.tensor, scale_stride: tl.tensor, words: tl.tensor,
    row_bytes: tl.tensor, x_stride: tl.tensor, plane_stride: tl.tensor, row_stride: tl.tensor,
    tap_stride: tl.tensor, height: tl.tensor, width: tl.tensor, out_height: tl.tensor, out_width: tl.tensor,
    splits: tl.tensor, OPERANDS: tl.constexpr, GEOMETRY: tl.constexpr, WORDS: tl.constexpr, PAIRED: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """The products summed over this program's share of the k axis. Scales of groups are applied, those of rows are not."""
    has_row = row < rows
    blocks = tl.cdiv(words, WORDS)
    steps = blocks if GEOMETRY is None else blocks * GEOMETRY.taps
    each = tl.cdiv(steps, splits)
    first = tl.program_id(1) * each
    GROUPS: tl.constexpr = OPERANDS.group_words > 0
    if GROUPS:
        total = tl.zeros((row.shape[0], token.shape[0]), tl.float32)
    else:
        total = zeros(row.shape[0], token.shape[0], OPERANDS)
    # Offsets into large weights exceed int32.
    weight_rows = weight + row.to(tl.int64) * row_stride
    for step in range(first, tl.minimum(first + each, steps)):
        tap = 0 if GEOMETRY is None else step // blocks
        start = (step - tap * blocks) * WORDS
        source, inside = sources(token, tap, tokens, height, width, out_height, out_width, GEOMETRY)
        # Sums of a group start at zero, since each group has a scale of its own.
        part = zeros(row.shape[0], token.shape[0], OPERANDS) if GROUPS else total
        part = accumulate(
            part, x + source.to(tl.int64) * x_stride, weight_rows + tap * tap_stride, start + tl.arange(0, WORDS),
            plane_stride, row_bytes, words, inside, has_row, OPERANDS, PAIRED,
        )  # fmt: skip
        if GROUPS:
            group = start // OPERANDS.group_words
            at = row * scale_stride + group
            total += (
                part.to(tl.float32) * (tl.load(weight_scale + at, has_row, 0.0) * OPERANDS.factor)[:, None]
            )
            # A group may take several steps; its zero point counts once.
            if weight_zero is not None and start % OPERANDS.group_words == 0:
                sums = tl.load(token_sum + source * scale_stride + group, inside, 0.0)
                total += tl.load(weight_zero + at, has_row, 0.0)[:, None] * sums[None, :]
        else:
            total = part
    return total


@triton.jit
def finish(
    sum: tl.tensor, token: tl.tensor, row: tl.tensor, out: tl.tensor, token_scale: tl.tensor, token_sum: tl.tensor,
    weight_scale: tl.tensor, weight_zero: tl.tensor, input_zero: tl.tensor, weight_sum: tl.tensor, bias: tl.tensor,
    low: tl.tensor, up: tl.tensor, tokens: tl.tensor, rows: tl.tensor, rank: tl.tensor, scale_stride: tl.tensor,
    out_stride: tl.tensor, height: tl.tensor, width: tl.tensor, out_height: tl.tensor, out_width: tl.tensor,
    OPERANDS: tl.constexpr, GEOMETRY: tl.constexpr, RANK: tl.constexpr,
) -> None:  # fmt: skip
    """Apply scales, zero points, bias and the low-rank branch to the sums [rows, tokens], and store them transposed."""
    has_row, has_token = row < rows, token < tokens  # [rows], [t]
    PER_ROW: tl.constexpr = OPERANDS.group_words == 0
    if PER_ROW:
        scale = tl.load(weight_scale + row * scale_stride, has_row, 0.0) * OPERANDS.factor
        sum = sum.to(tl.float32) * scale[:, None]
        if weight_zero is not None:
            zero = tl.load(weight_zero + row * scale_stride, has_row, 0.0)
    TAPS: tl.constexpr = 1 if GEOMETRY is None else GEOMETRY.taps
    edge = tl.zeros_like(sum)  # [rows, t], sums of the weight over the taps inside the picture
    bits = tl.zeros((token.shape[0],), tl.int32)  # [t], the token's scale as bits
    for tap in range(TAPS):
        source, inside = sources(token, tap, tokens, height, width, out_height, out_width, GEOMETRY)
        if PER_ROW and weight_zero is not None:
            sum += zero[:, None] * tl.load(token_sum + source, inside, 0.0)[None, :]
        if input_zero is not None:
            edge += tl.load(weight_sum + tap * rows + row, has_row, 0.0)[:, None] * inside[None, :]
        if token_scale is not None:  # equal where a pixel meets several, but NaN stands above all numbers
            scales = tl.load(token_scale + source, inside, 0.0)
            bits = tl.maximum(bits, scales.to(tl.int32, bitcast=True) & 0x7FFFFFFF)
    if token_scale is not None:
        sum *= bits.to(tl.float32, bitcast=True)[None, :]
    if input_zero is not None:
        sum += edge * tl.load(input_zero)
    if bias is not None:
        sum += tl.load(bias + row, has_row, 0.0).to(tl.float32)[:, None]
    if low is not None:
        r = tl.arange(0, RANK)
        left = tl.load(up + row[:, None] * rank + r[None, :], has_row[:, None] & (r < rank)[None, :], 0.0)
        # The branch's narrow product of these tokens, [t, r].
        right = tl.load(
            low + token[:, None] * rank + r[None, :], has_token[:, None] & (r < rank)[None, :], 0.0
        )
        sum += multiply_floats(left, tl.trans(right))  # [rows, t]
    at = out + token.to(tl.int64)[:, None] * out_stride + row[None, :]
    tl.store(at, tl.trans(sum).to(out.dtype.element_ty), has_token[:, None] & has_row[None, :])


@triton.jit
def multiply_floats(a: tl.tensor, b: tl.tensor) -> tl.tensor:
    """``a @ b`` in float32, without rounding float32 operands to fewer bits."""
    if INTERPRET:
        return tl.dot(a.to(tl.float32), b.to(tl.float32))
    else:
        return tl.dot(a, b, input_precision="ieee")


@triton.jit(do_not_specialize=VARYING)
def matmul(
    x: tl.tensor, weight: tl.tensor, out: tl.tensor, token_scale: tl.tensor, token_sum: tl.tensor,
    weight_scale: tl.tensor, weight_zero: tl.tensor, input_zero: tl.tensor, weight_sum: tl.tensor, bias: tl.tensor,
    low: tl.tensor, up: tl.tensor, tokens: tl.tensor, rows: tl.tensor, rank: tl.tensor, scale_stride: tl.tensor,
    out_stride: tl.tensor, height: tl.tensor, width: tl.tensor, out_height: tl.tensor, out_width: tl.tensor,
    words: tl.tensor, row_bytes: tl.tensor, x_stride: tl.tensor, plane_stride: tl.tensor, row_stride: tl.tensor,
    tap_stride: tl.tensor, splits: tl.tensor, OPERANDS: tl.constexpr, GEOMETRY: tl.constexpr, RANK: tl.constexpr,
    SHARED: tl.constexpr, ROWS: tl.constexpr, TOKENS: tl.constexpr, WORDS: tl.constexpr, TOGETHER: tl.constexpr,
) -> None:  # fmt: skip
    """Compute one tile of the output, or with `SHARED` a float32 share of its k axis, ``out[split, token, row]``."""
    row_tile, token_tile = tile_of(tl.program_id(0), tl.cdiv(rows, ROWS), tl.cdiv(tokens, TOKENS), TOGETHER)
    row = row_tile * ROWS + tl.arange(0, ROWS)
    token = token_tile * TOKENS + tl.arange(0, TOKENS)
    sum = share(
        x, weight, token_sum, weight_scale, weight_zero, token, row, tokens, rows, scale_stride, words, row_bytes,
        x_stride, plane_stride, row_stride, tap_stride, height, width, out_height, out_width, splits,
        OPERANDS, GEOMETRY, WORDS, x.dtype.element_ty == tl.int32,
    )  # fmt: skip
    if SHARED:
        at = out + (tl.program_id(1) * tokens + token).to(tl.int64)[:, None] * rows + row[None, :]
        tl.store(at, tl.trans(sum).to(tl.float32), (token < tokens)[:, None] & (row < rows)[None, :])
    else:
        finish(
            sum, token, row, out, token_scale, token_sum, weight_scale, weight_zero, input_zero, weight_sum, bias,
            low, up, tokens, rows, rank, scale_stride, out_stride, height, width, out_height, out_width,
            OPERANDS, GEOMETRY, RANK,
        )  # fmt: skip


@triton.jit
def tile_of(
    program: tl.tensor, row_tiles: tl.tensor, token_tiles: tl.tensor, TOGETHER: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """The tile of a program. Tiles go in bands of `TOGETHER` rows, so that programs that run at once share what they read."""
    band = program // (TOGETHER * token_tiles)
    height = tl.minimum(row_tiles - band * TOGETHER, TOGETHER)
    within = program % (TOGETHER * token_tiles)
    return band * TOGETHER + within % height, within // height


@triton.jit(do_not_specialize=VARYING)
def add_shares(
    shares: tl.tensor, out: tl.tensor, token_scale: tl.tensor, token_sum: tl.tensor, weight_scale: tl.tensor,
    weight_zero: tl.tensor, input_zero: tl.tensor, weight_sum: tl.tensor, bias: tl.tensor, low: tl.tensor,
    up: tl.tensor, tokens: tl.tensor, rows: tl.tensor, rank: tl.tensor, scale_stride: tl.tensor,
    out_stride: tl.tensor, height: tl.tensor, width: tl.tensor, out_height: tl.tensor, out_width: tl.tensor,
    splits: tl.tensor, OPERANDS: tl.constexpr, GEOMETRY: tl.constexpr, RANK: tl.constexpr, ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
) -> None:  # fmt: skip
    """Add the shares of a split k axis, always in the same order, and finish."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    token = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    exists = (row < rows)[:, None] & (token < tokens)[None, :]  # [rows, t]
    at = shares + token.to(tl.int64)[None, :] * rows + row[:, None]
    sum = tl.zeros((ROWS, TOKENS), tl.float32)
    for _ in range(splits):
        sum += tl.load(at, exists, 0.0)
        at += tokens.to(tl.int64) * rows
    finish(
        sum, token, row, out, token_scale, token_sum, weight_scale, weight_zero, input_zero, weight_sum, bias,
        low, up, tokens, rows, rank, scale_stride, out_stride, height, width, out_height, out_width,
        OPERANDS, GEOMETRY, RANK,
    )  # fmt: skip


@triton.jit
def weight_sums(
    weight: tl.tensor, weight_scale: tl.tensor, weight_zero: tl.tensor, out: tl.tensor, rows: tl.tensor,
    channels: tl.tensor, row_bytes: tl.tensor, row_stride: tl.tensor, tap_stride: tl.tensor,
    scale_stride: tl.tensor, group_size: tl.tensor, BITS: tl.constexpr, FORMAT: tl.constexpr, ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
) -> None:  # fmt: skip
    """Write the float32 sums of the weight over its channels to ``out[tap, row]``.

    Without groups `group_size` is `channels`.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    tap = tl.program_id(1)
    has_row = row < rows
    sum = tl.zeros((ROWS,), tl.float32)
    for start in range(0, channels, CHANNELS):
        channel = start + tl.arange(0, CHANNELS)
        exists = has_row[:, None] & (channel < channels)[None, :]
        byte, shift = channel * BITS // 8, channel * BITS % 8  # a code may reach into the next byte
        at = weight + row.to(tl.int64)[:, None] * row_stride + tap * tap_stride + byte[None, :]
        word = tl.load(at, exists, 0).to(tl.int32)
        word |= tl.load(at + 1, exists & (byte + 1 < row_bytes)[None, :], 0).to(tl.int32) << 8
        group = row[:, None] * scale_stride + (channel // group_size)[None, :]
        value = decode_value(word >> shift[None, :], FORMAT) * tl.load(weight_scale + group, exists, 0.0)
        if weight_zero is not None:
            value += tl.load(weight_zero + group, exists, 0.0)
        sum += tl.sum(value, 1)
    tl.store(out + tap * rows + row, sum, has_row)
