"""Numbers inside Triton kernels: rounding to a grid, and codes to and from operands of a tensor core.

Formats are compile-time constants here, so every branch on them is taken by the compiler.

On a device most weights are decoded by inline PTX (`ptx`). The interpreter does not know PTX, so for it the same decoding is
written out in Triton.
"""

from __future__ import annotations

import triton
import triton.language as tl

# The interpreter knows neither PTX nor products of bfloat16; everything else is the same code.
INTERPRET = tl.constexpr(bool(triton.knobs.runtime.interpret))
ROUND_TO_INTEGER = tl.constexpr(1.5 * 2**23)  # adding it to a float32 of up to 2**22 leaves no bit below 1


@triton.jit
def shifted(code: tl.tensor, distance: tl.constexpr) -> tl.tensor:
    """`code` shifted to the left, or to the right where `distance` is negative."""
    if distance >= 0:
        return code << distance
    else:
        return code >> (-distance)


@triton.jit
def decode_value(code: tl.tensor, FORMAT: tl.constexpr) -> tl.tensor:
    """The float32 values of uint8 codes. Bits above the code are ignored."""
    code = code.to(tl.int32) & (2**FORMAT.bits - 1)
    if FORMAT.is_table:
        # Sixteen levels are the bytes of four words: the upper bits of the code name the word, the lower ones the byte.
        lower = tl.where(code < 4, FORMAT.level_words[0], FORMAT.level_words[1])
        upper = tl.where(code < 12, FORMAT.level_words[2], FORMAT.level_words[3])
        word = tl.where(code < 8, lower, upper)
        return ((word << (24 - 8 * (code & 3))) >> 24).to(tl.float32)
    elif FORMAT.integer:
        if FORMAT.signed:
            # The arithmetic shift back copies the sign bit of the code into all bits above it.
            code = (code << (32 - FORMAT.bits)) >> (32 - FORMAT.bits)
        return code.to(tl.float32)
    else:
        # The fields at their places in a float32, whose larger bias the factor makes good, subnormals included.
        magnitude = code & (2 ** (FORMAT.exponent_bits + FORMAT.mantissa_bits) - 1)
        value = (magnitude << (23 - FORMAT.mantissa_bits)).to(tl.float32, bitcast=True) * 2.0 ** (
            127 - FORMAT.bias
        )
        if FORMAT.signed:
            value = tl.where(code >> (FORMAT.bits - 1) == 1, -value, value)
        return value


@triton.jit
def decode(raw: tl.tensor, SHIFT: tl.constexpr, OPERANDS: tl.constexpr) -> tl.tensor:
    """The operands of the codes that start at bit `SHIFT` of uint8 bytes, which may hold other codes as well."""
    if OPERANDS.kind == "e4m3":
        return decode_bytes(raw, SHIFT, OPERANDS).to(tl.float8e4nv, bitcast=True)
    elif OPERANDS.kind == "int8":
        if OPERANDS.swift:
            return decode_bytes(raw, SHIFT, OPERANDS).to(tl.int8, bitcast=True)
        else:
            return (decode_value(raw >> SHIFT, OPERANDS.weight) * OPERANDS.unit).to(tl.int8)
    elif OPERANDS.kind == "bf16":
        if INTERPRET or not OPERANDS.swift:
            return decode_value(raw >> SHIFT, OPERANDS.weight).to(tl.bfloat16)
        else:
            return tl.inline_asm_elementwise(
                OPERANDS.ptx[SHIFT], "=r,=r,r", [raw], tl.bfloat16, is_pure=True, pack=4
            )
    else:
        if INTERPRET or not OPERANDS.swift:
            return decode_value(raw >> SHIFT, OPERANDS.weight).to(tl.float16)
        else:
            return tl.inline_asm_elementwise(
                OPERANDS.ptx[SHIFT], "=r,=r,r", [raw], tl.float16, is_pure=True, pack=4
            )


@triton.jit
def decode_bytes(raw: tl.tensor, SHIFT: tl.constexpr, OPERANDS: tl.constexpr) -> tl.tensor:
    """`decode` to operands of a byte whose fields are only moved, as uint8."""
    if INTERPRET:
        moved = shifted(raw, OPERANDS.fields[0] - SHIFT) & OPERANDS.fields[1]
        if OPERANDS.fields[3] != 0:
            moved = moved | (shifted(raw, OPERANDS.fields[2] - SHIFT) & OPERANDS.fields[3])
        return moved.to(tl.uint8)
    else:
        return tl.inline_asm_elementwise(OPERANDS.ptx[SHIFT], "=r,r", [raw], tl.uint8, is_pure=True, pack=4)


@triton.jit
def round_to_grid(x: tl.tensor, FORMAT: tl.constexpr) -> tl.tensor:
    """`rounding.round_` for float32: the nearest value, with ties to the even code and saturation. NaN becomes some value."""
    x = tl.minimum(tl.maximum(x, FORMAT.min), FORMAT.max)
    if FORMAT.uniform:
        return ((x * (1 / FORMAT.step) + ROUND_TO_INTEGER) - ROUND_TO_INTEGER) * FORMAT.step
    else:
        # The exponent field alone is the binade; one step of it is the last bit of the anchor, so adding rounds to steps.
        binade = (x.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
        binade = tl.maximum(binade, 2.0 ** (FORMAT.min_exponent))
        anchor = binade * (1.5 * 2.0 ** (23 - FORMAT.mantissa_bits))
        rounded = (x + anchor) - anchor
        if FORMAT.mantissa_bits == 0:
            # Half way is always the upper neighbour then, while the even code alternates.
            exponent = binade.to(tl.int32, bitcast=True) >> 23
            code_of_lower = exponent - (127 + FORMAT.min_exponent - 1)
            magnitude = tl.abs(x)
            tie_to_lower = (magnitude == 1.5 * binade) & (code_of_lower % 2 == 0)
            rounded = tl.where(tie_to_lower, tl.where(x < 0, -binade, binade), rounded)
        return rounded


@triton.jit
def encode(x: tl.tensor, OPERANDS: tl.constexpr) -> tl.tensor:
    """The operands of float32 values on the grid of the activation, as uint8 (the bits of e4m3), int8, or bfloat16."""
    FORMAT: tl.constexpr = OPERANDS.activation
    if OPERANDS.kind == "e4m3":
        bits = x.to(tl.int32, bitcast=True)
        magnitude = tl.abs(x)
        # In a binade the upper bits of a float32 number count the values of the grid.
        normal = ((bits & 0x7FFFFFFF) >> (23 - FORMAT.mantissa_bits)) - (
            (127 + FORMAT.min_exponent - 1) << FORMAT.mantissa_bits
        )
        subnormal = (magnitude * (1 / FORMAT.step)).to(tl.int32)
        code = tl.where(magnitude < 2.0 ** (FORMAT.min_exponent), subnormal, normal)
        # Fields are aligned to those of e4m3, whose sign is the highest bit of its byte.
        sign = (bits >> 24) & 0x80
        return ((code << (3 - FORMAT.mantissa_bits)) | sign).to(tl.uint8)
    elif OPERANDS.kind == "int8":
        return (x * (1 / FORMAT.step)).to(tl.int8)
    else:
        return x.to(tl.bfloat16)
