"""Backend "torch": int8 products by `torch._int_mm`, which runs wherever torch does and needs no native code of our own.

Weights are kept as int8, one byte each. Tokens go through in chunks, because a temporary of more than a few MiB is given back
to the system after every use, and getting its pages again costs more than the product (docs/kernels.md).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional

from difloat.kernels import integer_operands
from difloat.kernels.derived import derived
from difloat.kernels.geometry import Geometry
from difloat.kernels.pieces import part_key, restored
from difloat.kernels.reference import online_scale
from difloat.numbers import integer_grids
from difloat.numbers.formats import Format
from difloat.numbers.packing import unpack
from difloat.plan.scales import expand_scale
from difloat.plan.specs import Part, QuantSpec
from difloat.plan.weight import Inputs, PackedWeight, Weight

_CHUNK_ROWS = 256
_CHUNK_ROWS_OF_GPU = 4096  # it has no cache to stay in, but its temporaries should stay small
_SATURATES_BEYOND = 64  # weights up to here are safe on every CPU: 2 * 255 * 64 < 2**15


def supports(part: Part, weight_shape: Sequence[int], x: Tensor) -> bool:
    """Whether this backend computes a part of a layer whose weight, of this part, has `weight_shape` [o, i, *k]."""
    return x.device.type == "cpu" and computes(part, weight_shape, x)


def computes(part: Part, weight_shape: Sequence[int], x: Tensor) -> bool:
    """`supports` on any device, by the int8 product that torch has there."""
    return (
        (len(weight_shape) == 2 or x.shape[1] == weight_shape[1])  # no groups of channels
        and x.is_floating_point()
        and x.dtype != torch.float64
        and part.weight.granularity in ("tensor", "channel")
        and integer_operands.reason_against(part) is None
        and part.activation is not None
        and integer_operands.is_plain(part.activation)
        and integer_operands.sums_fit(part, math.prod(weight_shape[1:]))
        and _reach(part.weight.format) <= _largest_exact(x.device)
    )


@cache
def _reach(format: Format) -> int:
    """The largest magnitude that an operand of this format has."""
    return int(integer_operands.operand_table(format).int().abs().max())


@cache
def _largest_exact(device: torch.device) -> int:
    """The magnitude up to which weights multiply exactly on a device, or 0 where torch has no int8 product there.

    Found by asking for small products, of odd sizes too. On a CPU with AVX2 but no VNNI, sums of two products are cut off at 16
    bits. Elsewhere a product that is not exact is not used.
    """
    ends = torch.full((64, 256), 127, dtype=torch.int8, device=device)
    try:
        products = [
            torch._int_mm(a, b.t()) for a, b in ((ends, ends), (ends[:3, :5].clone(), ends[:7, :5].clone()))
        ]
    except (RuntimeError, TypeError):  # no kernel for this device, or not for these sizes
        return 0
    exact = all(
        bool((found == found_of * 127**2).all()) for found, found_of in zip(products, (256, 5), strict=True)
    )
    return 128 if exact else _SATURATES_BEYOND if device.type == "cpu" else 0


def _rows_at_once(x: Tensor) -> int:
    return _CHUNK_ROWS if x.device.type == "cpu" else _CHUNK_ROWS_OF_GPU


def linear(x: Tensor, weight: Weight, inputs: Inputs, bias: Tensor | None) -> Tensor:
    """The linear layer of `reference.linear`. As int8 operands rows of all widths are alike, so it takes one product."""
    spec, channels, operands = weight.part.activation, weight.part.channels, _operands(weight)
    assert spec is not None
    rows, out_channels = x.reshape(-1, channels), operands.operand.shape[0]  # [t, i], o
    out, scale = x.new_empty(rows.shape[0], out_channels), inputs.scale  # [t, o]
    if spec.online and spec.granularity == "tensor" and x.numel():
        scale = online_scale(rows.float(), spec.format, per_token=False)
    at_once = _rows_at_once(x)
    for chunk, target in zip(rows.split(at_once), out.split(at_once), strict=True):
        if chunk.numel():
            target.copy_(
                operands.product(integer_operands.quantize_rows(chunk, spec, scale, inputs.zero_point), bias)
            )
    return out.reshape(*x.shape[:-1], out_channels)


def conv2d(x: Tensor, weight: Weight, inputs: Inputs, bias: Tensor | None, geometry: Geometry) -> Tensor:
    """The convolution of `reference.conv2d`, computed picture by picture as a product over patches."""
    spec, operands = weight.part.activation, _operands(weight)
    taps = _Taps(weight.kernel, geometry, x.shape[2:])
    assert spec is not None
    out = x.new_empty(x.shape[0], *taps.out, operands.operand.shape[0])  # [b, h', w', o]
    scale = inputs.scale
    if spec.online and x.numel():
        axes = (1, 2, 3) if spec.granularity == "token" else (0, 1, 2, 3)
        largest = x.abs().amax(axes, keepdim=True).float()  # exact in any dtype, so no copy in float32
        scale = online_scale(largest, spec.format, per_token=True).expand(x.shape[0], 1, 1, 1)  # [b, 1, 1, 1]
    for index, (picture, target) in enumerate(zip(x, out, strict=True)):
        own = scale if scale is None or not spec.online else scale[index].reshape(1, 1)
        of_picture = Inputs(own, inputs.zero_point)
        pixels = picture.permute(1, 2, 0).reshape(-1, weight.part.channels)  # [h * w, i]
        if taps.single:
            _conv_pixels(pixels, of_picture, spec, operands, bias, target.view(len(pixels), -1))
            continue
        rows = integer_operands.quantize_rows(pixels, spec, own, inputs.zero_point)
        _conv_picture(rows, operands, taps, bias, target)
    return out.permute(0, 3, 1, 2)


def _conv_pixels(
    pixels: Tensor,
    inputs: Inputs,
    spec: QuantSpec,
    weight: _Operands,
    bias: Tensor | None,
    out: Tensor,
) -> None:
    """Fill `out` [h * w, o] where the kernel is one pixel, which is a linear layer on the pixels, in chunks."""
    broken = torch.zeros((), dtype=torch.bool, device=pixels.device)
    at_once = _rows_at_once(pixels)
    for chunk, target in zip(pixels.split(at_once), out.split(at_once), strict=True):
        rows = integer_operands.quantize_rows(chunk, spec, inputs.scale, inputs.zero_point)
        target.copy_(weight.product(rows, bias))
        broken |= rows.scale.isnan().any()
    out.masked_fill_(broken, math.nan)  # a NaN spoils its picture, whatever the kernel's size


def _conv_picture(
    pixels: integer_operands.Operand, weight: _Operands, taps: _Taps, bias: Tensor | None, out: Tensor
) -> None:
    """Fill `out` [h', w', o] from the pixels [h * w, i] of one picture."""
    patches = taps.patches(pixels.values, -pixels.shift)  # [h', w', kh, kw, i]
    shift = None
    if pixels.zero_point is not None:  # padding is the value 0, not the zero point: only taps inside count
        shift = (
            taps.sums_inside(weight.tap_sums(taps.kernel)).flatten(1).t() * pixels.zero_point
        )  # [h' * w', o]
    scale = pixels.scale.amax().reshape(1, 1)  # NaN if one of them is
    # Only one chunk of the patches is ever written out: all of them would take kh * kw times the picture.
    lines = max(1, _rows_at_once(pixels.values) // taps.out[1])
    for start in range(0, taps.out[0], lines):
        # Where results are one pixel wide the reshaped view has rows that overlap, which torch's product does not expect.
        rows = patches[start : start + lines].reshape(-1, weight.operand.shape[1]).contiguous()
        result = weight.product(integer_operands.Operand(rows, scale, None, pixels.shift), bias)
        if shift is not None:
            result += shift[start * taps.out[1] :][: len(rows)]
        target = out[start : start + lines]
        target.copy_(result.view(target.shape))


@dataclass(frozen=True)
class _Taps:
    """The positions that a convolution's kernel meets on pictures of one size. Pairs are (vertical, horizontal)."""

    kernel: Sequence[int]
    geometry: Geometry
    size: Sequence[int]

    @property
    def out(self) -> tuple[int, int]:
        """Height and width of the result."""
        return self.geometry.size(self.size, self.kernel)

    @property
    def single(self) -> bool:
        """Whether every result sees the one pixel in its place."""
        geometry = self.geometry
        return math.prod(self.kernel) == 1 and set(geometry.stride) == {1} and set(geometry.padding) == {0}

    def patches(self, pixels: Tensor, zero: int) -> Tensor:
        """A view [h', w', kh, kw, i] of the pixels [h * w, i], padded by `zero`, with what every output pixel sees."""
        vertical, horizontal = self.geometry.padding
        picture = pixels.view(*self.size, -1)
        picture = functional.pad(
            picture, (0, 0, horizontal, horizontal, vertical, vertical), value=zero
        )  # [h + 2p, w + 2p, i]
        line, pixel, channel = picture.stride()
        return picture.as_strided(
            (*self.out, *self.kernel, picture.shape[2]),
            (
                self.geometry.stride[0] * line,
                self.geometry.stride[1] * pixel,
                self.geometry.dilation[0] * line,
                self.geometry.dilation[1] * pixel,
                channel,
            ),
        )

    def sums_inside(self, taps: Tensor) -> Tensor:
        """Sums [o, h', w'] of the taps [o, 1, kh, kw] that fall inside the picture."""
        ones = taps.new_ones(1, 1, *self.size)
        return self.geometry.convolve(ones, taps)[0]


@dataclass(frozen=True)
class _Operands:
    """Weights as int8 operands with their scales.

    Attributes:
        operand: The int8 operands [o, i * k].
        scale: float32 [1, o], or [1, 1] where all rows share one. It is the value of an operand of 1.
        zero: The value of an operand of 0 in the shape of the scale, or None if it is 0.
    """

    operand: Tensor
    scale: Tensor
    zero: Tensor | None

    def product(self, rows: integer_operands.Operand, bias: Tensor | None) -> Tensor:
        """The float32 product [t, o] of quantized rows [t, i * k] with the weight."""
        operands = (rows.values, self.operand)
        if rows.values.shape[1] == 1:  # the products of torch 2.13 are wrong there
            operands = (functional.pad(rows.values, (0, 1)), functional.pad(self.operand, (0, 1)))
        sums = torch._int_mm(operands[0], operands[1].t())  # [t, o], exact
        if rows.shift:  # in integers, where zeros stay exactly zero
            sums += rows.shift * self.operand.sum(1, dtype=torch.int32)
        out = sums.float().mul_(self.scale)  # [t, o]
        if self.zero is not None:
            row_sums = (
                rows.values.sum(-1, keepdim=True, dtype=torch.int32) + rows.shift * rows.values.shape[1]
            )
            out += row_sums * self.zero  # [t, 1] * [1, o]
        out *= rows.scale  # [t, 1], or [1, 1] where the range is static
        if rows.zero_point is not None:
            out += rows.zero_point * self.value_sums()
        return out if bias is None else out.add_(bias)

    def value_sums(self) -> Tensor:
        """The sums [1, o] of the weight's values over its inputs."""
        sums = self.operand.sum(1, dtype=torch.int32) * self.scale  # [1, o]
        return sums if self.zero is None else sums + self.operand.shape[1] * self.zero

    def tap_sums(self, kernel: Sequence[int]) -> Tensor:
        """The sums of the weight's values over input channels, float32 [o, 1, kh, kw]."""
        taps = self.operand.unflatten(1, (*kernel, -1))  # [o, kh, kw, i]
        sums = taps.sum(-1, dtype=torch.int32) * self.scale.reshape(-1, 1, 1)  # [o, kh, kw]
        if self.zero is not None:
            sums = sums + taps.shape[-1] * self.zero.reshape(-1, 1, 1)
        return sums[:, None]


def _operands(weight: Weight) -> _Operands:
    """The int8 operands of all bands, in the order of the float layer's rows."""
    if weight.row_band is None:
        (piece,) = weight.bands
        operand = derived(("int8", piece.part), (piece.codes,), lambda: _decode(piece))
        return _Operands(operand, *_steps(piece))

    def decoded() -> Tensor:
        return restored(weight, torch.cat([_decode(piece) for piece in weight.bands]))

    sources = (*[piece.codes for piece in weight.bands], weight.row_band)
    operand = derived(("int8 rows", part_key(weight.bands)), sources, decoded)
    steps = [_steps(piece) for piece in weight.bands]
    scale = torch.cat([one.expand(1, p.rows) for p, (one, _) in zip(weight.bands, steps, strict=True)], 1)
    zero = None
    if any(one is not None for _, one in steps):
        zeros = [scale.new_zeros(1, 1) if one is None else one for _, one in steps]
        stored = [one.expand(1, p.rows) for p, one in zip(weight.bands, zeros, strict=True)]
        zero = restored(weight, torch.cat(stored, 1), 1)
    return _Operands(operand, restored(weight, scale, 1), zero)


def _steps(piece: PackedWeight) -> tuple[Tensor, Tensor | None]:
    """The scale and zero of the operands of rows that have one width."""
    grid = integer_grids.grid_of(piece.spec.format)
    assert grid is not None
    # [1, o], or [1, 1] with one scale per tensor. A value is a whole number of steps of scale / multiplier.
    step = expand_scale(piece.scale, piece.spec, piece.codes.shape[:2]).reshape(1, -1) / grid.multiplier
    zero = None if piece.zero_point is None else piece.zero_point.reshape(1, -1)
    if grid.shift:
        # The shift of unsigned operands becomes part of the value of the operand 0.
        zero = step * grid.shift if zero is None else zero + step * grid.shift
    return step, zero


def _decode(piece: PackedWeight) -> Tensor:
    """The int8 operands of a piece, [o, i] or [o, kh * kw * i]."""
    codes = unpack(piece.codes, piece.spec.format.bits, piece.part.channels).movedim(1, -1)  # [o, *k, i]
    table = integer_operands.operand_table(piece.spec.format).to(codes.device)  # int8 [codes]
    return functional.embedding(codes.int(), table[:, None]).squeeze(-1).flatten(1).contiguous()
