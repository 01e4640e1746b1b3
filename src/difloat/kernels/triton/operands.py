"""How the numbers of two formats meet in a tensor core: which operand type carries both exactly.

Tensor cores multiply a few types only. A number of a low-bit format becomes one of them without rounding:

* ``e4m3`` carries any ExMy with x <= 4 and y <= 3, whose fields are moved to where e4m3 has them. Subnormal numbers stay right,
  and the different exponent bias is a constant factor.
* ``int8`` carries integers as they are (signed ones left-aligned, which is one shift), and other grids in units of their step.
* ``bf16`` carries every value of every format of up to 8 bits. ``fp16`` is used where the input is fp16 and stays as it is.

The all-finite ``e4m3`` (largest value 480) has a number where hardware has NaN, so it takes bf16. Plans made for these GPUs use
``e4m3fn``. Nothing here imports Triton.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch

from difloat.kernels.triton import ptx as triton_ptx
from difloat.numbers.formats import Format

Kind = Literal["e4m3", "int8", "bf16", "fp16"]

_FP8_CAPABILITY = (8, 9)  # Ada and Hopper brought FP8 tensor cores
_INT8_CAPABILITY = (8, 0)  # Ampere is the oldest generation that Triton compiles int8 and bf16 products for
# The depth of the smallest product of a tensor core.
_LEAST_WORDS = {"e4m3": 32, "int8": 32, "bf16": 16, "fp16": 16}
_E4M3_BIAS = 7
DTYPES = {"e4m3": torch.float8_e4m3fn, "int8": torch.int8, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Operands:
    """The numbers that one product computes with. It is hashable, as a compile-time constant of the kernels must be.

    Attributes:
        kind: The type of both operands.
        weight: The format of the weight.
        activation: The format of the input, or None where it stays in its own type.
        planes: How many codes a word has. A word is the fewest whole bytes that hold whole codes, or a multiple of that. Code p
            of every word together are plane p. Kernels multiply plane by plane, so unpacking moves no data between threads.
        group_words: How many words share a weight scale, or 0 where a whole row does.
    """

    kind: Kind
    weight: Format
    activation: Format | None
    planes: int
    group_words: int

    @property
    def word_bytes(self) -> int:
        """Bytes of a word."""
        return self.planes * self.weight.bits // 8

    @property
    def factor(self) -> float:
        """The factor that turns an accumulated product of operands into one of grid values."""
        activation = 1.0 if self.activation is None else _factor(self.activation, self.kind, weight=False)
        return activation * _factor(self.weight, self.kind, weight=True)

    @property
    def unit(self) -> float:
        """What values of the weight are multiplied by to be int8: levels of a table are, of others the smallest becomes 1."""
        return 1.0 if self.weight.is_table else 1 / self.weight.step

    @property
    def fields(self) -> tuple[int, int, int, int]:
        """The masked shifts of `ptx.fields` that turn a code of the weight into an operand."""
        return triton_ptx.fields(self.weight, self.kind)

    @property
    def swift(self) -> bool:
        """Whether `ptx` decodes the weight. Otherwise the compiler does, code by code."""
        if self.weight.levels:  # they have no fields to be moved
            return False
        if self.kind == "int8":
            return self.weight.integer
        short = self.weight.mantissa_bits <= 7 and not (self.weight.integer and self.weight.bits == 8)
        return self.kind == "e4m3" or short

    @property
    def ptx(self) -> tuple[str, ...]:
        """The assembly that decodes four codes, for codes that start at bit 0, 1, ... 7 of their bytes."""
        decoding = triton_ptx.bytes_ptx if self.kind in ("e4m3", "int8") else triton_ptx.halves_ptx
        return tuple(decoding(self.weight, self.kind, start) for start in range(8))


def _factor(format: Format, kind: Kind, weight: bool) -> float:
    if kind == "e4m3":
        return math.ldexp(1.0, _E4M3_BIAS - format.bias)
    if kind == "int8":
        if format.levels:
            return 1.0
        left_aligned = weight and format.integer and format.signed
        return format.step / 2 ** (8 - format.bits if left_aligned else 0)
    return 1.0


def least_planes(bits: int) -> int:
    """How many codes the shortest word has: the fewest codes of `bits` bits that fill whole bytes."""
    return 8 // math.gcd(8, bits)


def fits(format: Format, kind: Kind) -> bool:
    """Whether every finite value of the format, times a constant, is a number of the operand type."""
    if kind == "e4m3":
        overflows = (format.exponent_bits, format.mantissa_bits, format.specials) == (4, 3, "")
        return format.embeds_in_e4m3() and not overflows
    if kind == "int8":
        multiplier = format.int8_multiplier()
        return multiplier is not None and format.max * multiplier <= 127
    if kind == "fp16":
        return format.max <= 65504 and format.step >= math.ldexp(1.0, -24)
    return True


def choose(
    weight: Format,
    activation: Format | None,
    dtype: torch.dtype,
    capability: tuple[int, int],
    *,
    group_size: int = 0,
    planes: int = 0,
) -> Operands | None:
    """The fastest operand type that is exact for both formats on a device, or None where there is none.

    Args:
        weight: The format of the weight.
        activation: The format of the input, or None for an input that stays in its dtype.
        dtype: The dtype of the input.
        capability: The CUDA compute capability of the device.
        group_size: How many input channels share a weight scale, or 0 without groups.
        planes: How many codes a word has, a multiple of `least_planes`, or 0 for the fewest.
    """
    planes = planes or least_planes(weight.bits)
    if group_size % planes:
        return None
    for kind in _preference(weight, activation, dtype, capability):
        formats = [weight] if activation is None else [weight, activation]
        whole = (group_size // planes) % _LEAST_WORDS[kind] == 0
        if whole and all(fits(format, kind) for format in formats):
            return Operands(kind, weight, activation, planes, group_size // planes)
    return None


def _preference(
    weight: Format, activation: Format | None, dtype: torch.dtype, capability: tuple[int, int]
) -> tuple[Kind, ...]:
    if capability < _INT8_CAPABILITY:
        return ()
    if activation is None:
        kinds: dict[torch.dtype, tuple[Kind, ...]] = {torch.bfloat16: ("bf16",), torch.float16: ("fp16",)}
        return kinds.get(dtype, ())
    if capability < _FP8_CAPABILITY:
        return "int8", "bf16"
    # Integers need no fields taken apart and their sums no promotion; for the rest e4m3 is the cheaper decoding.
    return "e4m3", "int8", "bf16"


def step_words(operands: Operands, most: int) -> int:
    """How many words one step along k takes: a power of two, at most `most`, that no border of a group falls into."""
    words = most
    while operands.group_words % words:
        words //= 2
    return max(words, _LEAST_WORDS[operands.kind])
