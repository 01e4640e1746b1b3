"""Launching the Triton kernels: shapes, strides, grids and the memory between the launches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from difloat.kernels.triton import matmul as kernels
from difloat.kernels.triton import quantize
from difloat.kernels.triton import tiles as triton_tiles
from difloat.kernels.triton.matmul import Geometry
from difloat.kernels.triton.operands import DTYPES, Operands
from difloat.kernels.triton.tiles import Problem, Tile
from difloat.plan.specs import Part, QuantSpec

_ALIGNED_WORDS = 16  # rows of operands start at multiples of 16 bytes, so that a thread loads 16 at once
_FEW_TOKENS = (
    64  # up to here an input that keeps its type is read where it lies, without a pass that lays it out
)
_STEP_VALUES = 4096  # values that one step of the quantizer holds
_STEP_CHANNELS = 2048  # of one token that a step of the quantizer holds at most
_OPTIONS = {"enable_fp_fusion": True}  # named because Triton's default is about to change
_SCAN_VALUES = 8192
_SUM_ROWS, _SUM_CHANNELS = 16, 256


@dataclass(frozen=True)
class Adapter:
    """A low-rank branch, which adds ``x @ down.T @ up.T``. `down` [r, i] and `up` [o, r] have the dtype of x."""

    down: Tensor
    up: Tensor


@dataclass(frozen=True)
class Weight:
    """A packed weight [o, bytes] or [o, kh, kw, bytes] with its scales."""

    packed: Tensor
    scale: Tensor
    zero_point: Tensor | None
    spec: QuantSpec

    @property
    def scale_stride(self) -> int:
        """How many scales an output channel has, or 0 where one scale serves all channels."""
        return 0 if self.spec.granularity == "tensor" else self.scale.numel() // self.packed.shape[0]


@dataclass(frozen=True)
class Source:
    """An input as it lies in memory: tokens `token_stride` values apart, in spans of `span` tokens.

    A span is a picture, whose pixels are the tokens, or the whole input of a linear layer.
    """

    x: Tensor
    tokens: int
    channels: int
    span: int
    span_stride: int
    token_stride: int
    channel_stride: int


@dataclass(frozen=True)
class Input:
    """The quantized input of a product. Strides count values.

    Attributes:
        values: The operands [tokens, planes, words].
        words: Words of a token, whose last ones may be padding.
        token_stride: Values between the first operands of neighbouring tokens.
        plane_stride: Values between the planes of a token.
        token_scale: The scale of every token, or None where values keep their type.
        token_sum: Sums of the grid values per token and group, where zero points of the weight ask for them.
        low: The product [tokens, r] with the down-projection of a branch.
    """

    values: Tensor
    words: int
    token_stride: int
    plane_stride: int
    token_scale: Tensor | None = None
    token_sum: Tensor | None = None
    low: Tensor | None = None


@dataclass(frozen=True)
class Picture:
    """The sizes of a convolution's input and output, with its kernel. A linear layer has no geometry."""

    height: int = 1
    width: int = 1
    out_height: int = 1
    out_width: int = 1
    geometry: Geometry | None = None


def rows_source(x: Tensor) -> Source:
    """The source of a linear layer's tokens [t, i]."""
    x = x if x.stride(1) == 1 else x.contiguous()
    return Source(x, x.shape[0], x.shape[1], x.shape[0], 0, x.stride(0), 1)


def picture_source(x: Tensor) -> Source:
    """The source of the pixels of pictures [b, i, h, w], which are copied unless rows of pixels follow each other."""
    batch, channels, height, width = x.shape
    if x.stride(2) != width * x.stride(3):
        x = x.contiguous(memory_format=torch.channels_last)
    tokens = height * width
    return Source(x, batch * tokens, channels, tokens, x.stride(0), x.stride(3), x.stride(1))


def picture_of(
    x: Tensor, packed: Tensor, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> Picture:
    """The sizes of a convolution of `x` [b, i, h, w] with a packed weight [o, bytes, kh, kw]."""
    kernel = tuple(packed.shape[2:])
    out = [
        (size + 2 * pad - reach * (k - 1) - 1) // step + 1
        for size, k, step, pad, reach in zip(x.shape[2:], kernel, stride, padding, dilation, strict=True)
    ]
    pairs = [(int(pair[0]), int(pair[1])) for pair in (kernel, stride, padding, dilation)]
    return Picture(x.shape[2], x.shape[3], out[0], out[1], Geometry(*pairs))


def as_it_lies(source: Source, operands: Operands) -> Input:
    """An input that is not quantized, without a copy. Where a word has two codes, its two values are read as one int32."""
    if operands.planes == 1:
        return Input(source.x, source.channels, source.token_stride, 0)
    return Input(source.x.view(torch.int32), source.channels // 2, source.token_stride // 2, 0)


def lies_well(source: Source, operands: Operands, weight: Weight, adapter: Adapter | None) -> bool:
    """Whether `as_it_lies` will do: few tokens, nothing to compute on the way, and whole words at whole addresses."""
    plain = operands.activation is None and weight.zero_point is None and adapter is None
    even = source.channels % 2 == source.token_stride % 2 == source.x.storage_offset() % 2 == 0
    few = source.tokens <= _FEW_TOKENS
    return plain and few and (operands.planes == 1 or (operands.planes == 2 and even))


def quantized(
    source: Source,
    operands: Operands,
    activation: QuantSpec | None,
    scale: Tensor | None,
    zero_point: Tensor | None,
    sum_groups: int,
    adapter: Adapter | None,
) -> Input:
    """The input as operands in planes.

    Args:
        source: The input as it lies in memory.
        operands: The type that carries its numbers.
        activation: The spec of the input's grid and scales. None leaves its values as they are.
        scale: A stored scale [1], or None.
        zero_point: A stored zero point [1], or None.
        sum_groups: How many groups of channels get a sum of their grid values, or 0 where no sum is needed.
        adapter: A branch whose down-projection is computed on the way, or None.
    """
    x, planes = source.x, operands.planes
    # Padded words hold the operand 0, so products run over whole vectors without a mask.
    words = -(-source.channels // (planes * _ALIGNED_WORDS)) * _ALIGNED_WORDS
    dtype = DTYPES[operands.kind] if activation is not None else x.dtype
    values = torch.empty((source.tokens, planes, words), dtype=dtype, device=x.device)
    token_scale = None if activation is None else x.new_empty(source.tokens, dtype=torch.float32)
    token_sum = x.new_empty((source.tokens, sum_groups), dtype=torch.float32) if sum_groups else None
    low = None if adapter is None else x.new_empty((source.tokens, adapter.down.shape[0]))
    found, kind, scale_span = _scale_source(source, activation, scale)
    rank = 0 if adapter is None else adapter.down.shape[0]
    block = min(_power_of_two(words), _STEP_CHANNELS // planes)
    if sum_groups > 1:
        # A step of the quantizer then holds exactly one group, whose sum it writes.
        block = operands.group_words
    # The product with the down-projection needs the 16 rows of the smallest tile of a tensor core.
    tokens = 16 if adapter is not None else max(1, min(16, _STEP_VALUES // (block * planes)))
    quantize.quantize[(-(-source.tokens // tokens),)](
        x, _bits(values), token_scale, token_sum, found, zero_point,
        None if adapter is None else adapter.down.contiguous(), low,
        source.tokens, source.channels, rank, source.span, source.span_stride, source.token_stride,
        source.channel_stride, scale_span, words, sum_groups,
        operands, kind, max(16, _power_of_two(rank)), tokens, block,
        num_warps=4, **_OPTIONS,
    )  # fmt: skip
    return Input(values, words, planes * words, words, token_scale, token_sum, low)


def _bits(values: Tensor) -> Tensor:
    return values.view(torch.uint8) if values.dtype == torch.float8_e4m3fn else values


def _scale_source(
    source: Source, activation: QuantSpec | None, scale: Tensor | None
) -> tuple[Tensor | None, str, int]:
    if activation is None or not activation.online:
        return scale, "stored", source.tokens
    per_picture = activation.granularity == "token" and source.span != source.tokens
    if activation.granularity == "token" and source.x.dim() == 2:
        return None, "own", 1
    spans = source.tokens // source.span if activation.granularity == "token" else 1
    dense = source.x if _dense(source.x) else source.x.contiguous()
    values = dense.numel() // spans
    largest = torch.zeros(spans, dtype=torch.int32, device=dense.device)
    quantize.largest_magnitude[(-(-values // _SCAN_VALUES), spans)](
        dense, largest, values, dense.stride(0) if per_picture else 0, _SCAN_VALUES, num_warps=8, **_OPTIONS
    )
    return largest, "largest", source.span if per_picture else source.tokens


def _dense(x: Tensor) -> bool:
    return x.is_contiguous() or (x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last))


def _power_of_two(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


def weight_sums(weight: Weight, channels: int) -> Tensor:
    """The sums of the weight over its input channels, float32 [taps, o]."""
    packed = weight.packed
    rows, taps = packed.shape[0], packed[0].numel() // packed.shape[-1]
    sums = torch.empty((taps, rows), dtype=torch.float32, device=packed.device)
    kernels.weight_sums[(-(-rows // _SUM_ROWS), taps)](
        packed, weight.scale, weight.zero_point, sums, rows, channels, packed.shape[-1], packed.stride(0),
        packed.stride(-2) if packed.dim() == 4 else 0, weight.scale_stride, weight.spec.group_size or channels,
        weight.spec.format.bits, weight.spec.format, _SUM_ROWS, _SUM_CHANNELS, **_OPTIONS,
    )  # fmt: skip
    return sums


def multiply(
    inputs: Input,
    operands: Operands,
    weight: Weight,
    part: Part,
    input_zero_point: Tensor | None,
    bias: Tensor | None,
    out: Tensor,
    adapter: Adapter | None = None,
    picture: Picture = Picture(),  # noqa: B008 (frozen)
) -> None:
    """Write the product into `out` [tokens, o], which may be a run of the columns of a wider tensor."""
    geometry = picture.geometry
    tokens, rows = out.shape
    taps = 1 if geometry is None else geometry.taps
    sums = None if input_zero_point is None else weight_sums(weight, part.channels)
    rank = 0 if adapter is None else adapter.up.shape[1]
    tail = (
        inputs.token_scale, inputs.token_sum, weight.scale, weight.zero_point, input_zero_point, sums, bias,
        inputs.low, None if adapter is None else adapter.up.contiguous(),
        tokens, rows, rank, weight.scale_stride, out.stride(0),
        picture.height, picture.width, picture.out_height, picture.out_width,
    )  # fmt: skip
    packed = weight.packed
    strides = (
        inputs.words, packed.shape[-1], inputs.token_stride, inputs.plane_stride,
        packed.stride(0), packed.stride(-2) if geometry is not None else 0,
    )  # fmt: skip
    problem = Problem(operands, rows, tokens, inputs.words, taps)
    run = _runner(inputs.values, packed, out, tail, strides, operands, geometry, max(16, _power_of_two(rank)))
    index = out.device.index if out.is_cuda else None
    run(triton_tiles.choose(problem, index, run))


def _runner(
    values: Tensor,
    packed: Tensor,
    out: Tensor,
    tail: tuple[Any, ...],
    strides: tuple[int, ...],
    operands: Operands,
    geometry: Geometry | None,
    rank_block: int,
) -> Callable[[Tile], None]:
    tokens, rows = out.shape
    constants = (operands, geometry, rank_block)

    def run(tile: Tile) -> None:
        tiles = -(-rows // tile.rows) * -(-tokens // tile.tokens)
        split = tile.splits > 1
        # Shares stay float32 until they are added, so that splitting costs no accuracy.
        target = out.new_empty((tile.splits, tokens, rows), dtype=torch.float32) if split else out
        kernels.matmul[(tiles, tile.splits)](
            values, packed, target, *tail, *strides, tile.splits, *constants,
            split, tile.rows, tile.tokens, tile.words, tile.together,
            num_warps=tile.warps, num_stages=tile.stages, **_OPTIONS,
        )  # fmt: skip
        if split:
            block = min(tile.tokens, 32)
            kernels.add_shares[(-(-rows // 64), -(-tokens // block))](
                target, out, *tail, tile.splits, *constants, 64, block, num_warps=4, **_OPTIONS
            )

    return run
