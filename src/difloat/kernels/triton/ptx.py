"""Decoding of four codes at a time, as inline PTX.

A compiler decodes one code after the other, at five to ten instructions each. A register holds four bytes, so masked shifts
decode four codes at once. That takes one instruction per code for operands of a byte, and three for those of 16 bits. It
decides whether unpacking hides behind the product or not. `decode` has the same in Triton's own words, for the interpreter.
"""

from __future__ import annotations

from difloat.numbers.formats import Format

_FOUR, _TWO = 0x01010101, 0x00010001
SIXTEEN_BITS = {"bf16": (7, 127), "fp16": (10, 15)}  # fraction bits and exponent bias


def fields(format: Format, kind: str) -> tuple[int, int, int, int]:
    """The two masked shifts that turn a code in the low bits of a byte into an operand byte.

    The operand is ``(code << first) & first_mask | (code << second) & second_mask``.

    Args:
        format: The format of the codes.
        kind: The operand type "e4m3", or "int8" for an integer format.
    """
    if kind == "int8":
        shift = 8 - format.bits if format.signed else 0
        return shift, ((1 << format.bits) - 1) << shift, 0, 0
    up = 3 - format.mantissa_bits
    sign = (8 - format.bits, 0x80) if format.signed else (0, 0)
    return up, _magnitude_mask(format) << up, *sign


def _magnitude_mask(format: Format) -> int:
    return (1 << (format.exponent_bits + format.mantissa_bits)) - 1


def bytes_ptx(format: Format, kind: str, start: int) -> str:
    """The assembly of `fields` for codes that start at bit `start` of the bytes of ``$1``, into the bytes of ``$0``."""
    first, first_mask, second, second_mask = fields(format, kind)
    text = _masked_shift("$0", "$1", first - start, first_mask * _FOUR)
    if second_mask:
        text += f" {_masked_shift('a', '$1', second - start, second_mask * _FOUR)} or.b32 $0, $0, a;"
    return f"{{ .reg .b32 a; {text} }}"


def halves_ptx(format: Format, kind: str, start: int) -> str:
    """The assembly that turns the codes in the bytes of ``$2`` into four numbers of 16 bits in ``$0`` and ``$1``.

    Fields are moved to where the type has them, which is right up to the exponent bias, subnormal numbers included. A product
    with a power of two corrects the bias. An integer becomes the last bits of a number whose last bit weighs one.
    """
    fraction_bits, bias = SIXTEEN_BITS[kind]
    low = 8 + start  # bytes are spread to the high ends of the halves
    if format.integer:
        # Flipping the sign bit of two's complement adds half the range, which the offset takes off again.
        half_range = 1 << (format.bits - 1) if format.signed else 0
        moves = [(-low, (1 << format.bits) - 1)]
        flip = (fraction_bits + bias) << fraction_bits | half_range
        factor, offset = _power(0, kind), 0x8000 | flip
    else:
        up = fraction_bits - format.mantissa_bits
        moves = [(up - low, _magnitude_mask(format) << up)]
        moves += [(16 - low - format.bits, 0x8000)] if format.signed else []
        flip, factor, offset = 0, _power(bias - format.bias, kind), 0x8000
    lines = [f".reg .b32 a, b, f, o; mov.b32 f, {factor * _TWO:#010x}; mov.b32 o, {offset * _TWO:#010x};"]
    # prmt spreads bytes 0 and 1, then 2 and 3, to the high ends of the two halves of a register.
    for word, select in (("$0", 0x1404), ("$1", 0x3424)):
        lines.append(f"prmt.b32 a, $2, 0, {select:#06x}; mov.b32 {word}, {flip * _TWO:#010x};")
        for shift, mask in moves:
            lines.append(f"{_masked_shift('b', 'a', shift, mask * _TWO)} xor.b32 {word}, {word}, b;")
        # One fused multiply-add corrects the bias, or takes off what stood above the integer's bits.
        lines.append(f"fma.rn.{'bf16x2' if kind == 'bf16' else 'f16x2'} {word}, {word}, f, o;")
    return f"{{ {' '.join(lines)} }}"


def _power(exponent: int, kind: str) -> int:
    """The bits of two to the power of `exponent` in a type of 16 bits."""
    fraction_bits, bias = SIXTEEN_BITS[kind]
    return (exponent + bias) << fraction_bits


def _masked_shift(to: str, of: str, shift: int, mask: int) -> str:
    move = f"shl.b32 {to}, {of}, {shift};" if shift >= 0 else f"shr.u32 {to}, {of}, {-shift};"
    return f"{move} and.b32 {to}, {to}, {mask:#010x};"
