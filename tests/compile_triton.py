"""Compile the Triton kernels for a CUDA architecture, which needs no GPU: `python tests/compile_triton.py 90`.

Run by test_triton.py in a process of its own, since there kernels are defined for the interpreter.
"""

from __future__ import annotations

import re
import sys
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from difloat.formats import parse
from difloat.kernels import triton_matmul, triton_quantize, triton_tiles
from difloat.kernels.triton_matmul import Geometry
from difloat.kernels.triton_operands import DTYPES, Operands, choose

POINTERS = {
    torch.float8_e4m3fn: "*fp8e4nv",
    torch.int8: "*i8",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
}
UNALIGNED = (
    "tokens",
    "span",
    "rank",
    "height",
    "width",
    "out_height",
    "out_width",
    "groups",
    "scale_span",
    "splits",
)
KERNEL_3X3 = Geometry((3, 3), (1, 1), (1, 1), (1, 1))


def compiled(
    kernel: Any, target: int, pointers: dict[str, str | None], constants: dict[str, Any], **options: int
) -> Any:
    """What `triton.compile` makes of a kernel whose integers are multiples of 16, like sizes of real layers."""
    absent = {name: None for name, type in pointers.items() if type is None}
    constants = {k: v for k, v in (constants | absent).items() if k in kernel.arg_names}
    signature = {
        name: "constexpr" if name in constants else pointers.get(name) or "i32" for name in kernel.arg_names
    }
    aligned = [["tt.divisibility", 16]]
    attributes = {
        (n,): aligned
        for n, name in enumerate(kernel.arg_names)
        if signature[name] != "constexpr" and name not in UNALIGNED
    }
    source = ASTSource(kernel, signature, constants, attributes)
    return triton.compile(
        source, target=GPUTarget("cuda", target, 32), options={**options, "enable_fp_fusion": True}
    )


def product(
    operands: Operands, target: int, tokens: int = 4096, geometry: Geometry | None = None, zeros: bool = False
) -> Any:
    """The product with the tile that the rule takes."""
    problem = triton_tiles.Problem(operands, 1152, tokens, 576)
    shared = 227 << 10 if target == 90 else 99 << 10
    tile = triton_tiles.rule(problem, triton_tiles.Device("some GPU", 132, shared))
    number = "*fp32" if zeros else None
    quantized = operands.activation is not None
    pointers: dict[str, str | None] = {
        "x": POINTERS[DTYPES[operands.kind]] if quantized or operands.planes != 2 else "*i32",
        "weight": "*u8",
        "out": "*fp32" if tile.splits > 1 else "*bf16",
        "token_scale": "*fp32" if quantized else None,
        "token_sum": number,
        "weight_scale": "*fp32",
        "weight_zero": number,
        "input_zero": number,
        "weight_sum": number,
        "bias": "*bf16",
        "low": "*bf16" if not geometry else None,
        "up": "*bf16" if not geometry else None,
    }
    constants = {
        "scale_stride": 1, "OPERANDS": operands, "GEOMETRY": geometry, "RANK": 32, "SHARED": tile.splits > 1,
        "ROWS": tile.rows, "TOKENS": tile.tokens, "WORDS": tile.words, "TOGETHER": tile.together,
    }  # fmt: skip
    kernel = compiled(
        triton_matmul.matmul, target, pointers, constants, num_warps=tile.warps, num_stages=tile.stages
    )
    if tile.splits > 1:
        rest = {**pointers, "shares": "*fp32", "out": "*bf16"}
        compiled(triton_matmul.add_shares, target, rest, constants, num_warps=4)
    return kernel


def quantizer(operands: Operands, target: int, found: str) -> None:
    """The quantizer of a linear layer with an adapter, or of a picture."""
    kinds = {"own": None, "stored": "*fp32", "largest": "*i32"}
    values = "*u8" if operands.kind == "e4m3" else POINTERS[DTYPES[operands.kind]]
    low = "*bf16" if found == "own" else None
    pointers = {
        "x": "*bf16", "out": values, "token_scale": "*fp32", "token_sum": "*fp32", "scale": kinds[found],
        "zero_point": "*fp32" if found == "stored" else None, "down": low, "low": low,
    }  # fmt: skip
    constants = {"OPERANDS": operands, "SOURCE": found, "RANK": 32, "TOKENS": 16, "WORDS": 64}
    if found == "own":
        constants["channel_stride"] = 1
    compiled(triton_quantize.quantize, target, pointers, constants, num_warps=4)


def main(target: int) -> None:
    """Compile a selection; print what became of it."""
    capability = (target // 10, target % 10)

    def operands(weight: str, activation: str | None, group_size: int = 0) -> Operands:
        format = None if activation is None else parse(activation)
        found = choose(parse(weight), format, torch.bfloat16, capability, group_size=group_size)
        assert found is not None
        return found

    write = sys.stdout.write
    kernel = product(operands("e2m1", "e2m1"), target)
    ptx = kernel.asm["ptx"]
    if re.search(r"wgmma\.mma_async[^;]*e4m3\.e4m3 \{[^}]*\}, \{", ptx) and "cp.async.cg" in ptx:
        write("wgmma e4m3 from registers, pipelined; ")
    write("ok product\n")
    product(operands("e2m1", None), target, tokens=16)
    write("ok product of few tokens, weight-only\n")
    product(operands("uint4", "int8", group_size=128), target, zeros=True)
    write("ok product in groups with zero points\n")
    product(operands("e2m3", "e2m3"), target, geometry=KERNEL_3X3)
    write("ok convolution of 6-bit weights\n")
    quantizer(operands("e2m1", "e2m1"), target, "own")
    quantizer(operands("uint4", "int8"), target, "stored")
    quantizer(operands("e2m1", "e3m0"), target, "largest")
    write("ok quantizers\n")
    compiled(triton_quantize.largest_magnitude, target, {"x": "*bf16", "out": "*i32"}, {"BLOCK": 8192})
    sums = {"weight": "*u8", "weight_scale": "*fp32", "weight_zero": "*fp32", "out": "*fp32"}
    compiled(
        triton_matmul.weight_sums, target, sums,
        {"BITS": 3, "FORMAT": parse("int3"), "ROWS": 16, "CHANNELS": 256},
    )  # fmt: skip
    write("ok sums\n")


if __name__ == "__main__":
    main(int(sys.argv[1]))
