"""Launch the Triton kernels for a CUDA architecture that is not there: `python tests/compile_triton.py 90`.

Everything happens as on a GPU, from the call of a layer to the compiled kernel, but for the launch itself. Run by
test_triton.py in a process of its own, since there kernels are defined for the interpreter.
"""

from __future__ import annotations

import re
import sys
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from difloat.kernels.geometry import Geometry
from difloat.kernels.triton import backend, tiles
from difloat.numbers.formats import parse
from difloat.plan.specs import Part, QuantSpec, layer_tensor_shapes
from difloat.plan.weight import Branch, Inputs, PackedWeight, Weight

COMPILED: list[tuple[str, Any]] = []


class AbsentDevice:
    """What Triton asks its driver before it launches."""

    def __init__(self, target: int) -> None:
        self.target = GPUTarget("cuda", target, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self.target


def compile_instead_of_launching(target: int) -> None:
    """From here on a launch compiles for `target` and computes nothing."""
    driver.set_active(AbsentDevice(target))
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        COMPILED.append((self.__name__, kernel))
        return kernel

    JITFunction.run = compile_only
    shared = 227 << 10 if target == 90 else 99 << 10
    tiles.device_of = lambda index: tiles.Device("absent", 132, shared)
    backend.available = lambda device: True
    backend.capability = lambda device: (target // 10, target % 10)


def call(
    weight: QuantSpec,
    activation: QuantSpec | None,
    shape: tuple[int, ...],
    x: tuple[int, ...],
    dtype: torch.dtype = torch.bfloat16,
    adapter: bool = False,
) -> None:
    """One call of a layer with tensors of the right shapes."""
    part = Part(shape[1], weight, activation)
    shapes = layer_tensor_shapes(shape, [part])
    names = ("weight_scale", "weight_zero_point", "input_scale", "input_zero_point")
    tensors = [torch.ones(shapes[name]) if name in shapes else None for name in names]
    packed = torch.zeros(shapes["weight"], dtype=torch.uint8)
    piece, stored = PackedWeight(packed, *tensors[:2], part), Inputs(*tensors[2:])
    inputs, bias = torch.zeros(x, dtype=dtype), torch.zeros(shape[0], dtype=dtype)
    assert backend.supports(part, shape, inputs)
    if len(shape) == 4:
        backend.conv2d(inputs, Weight(((piece,),)), stored, bias, Geometry(padding=(1, 1)))
    else:
        low_rank = Branch(torch.zeros(32, shape[1], dtype=dtype), torch.zeros(shape[0], 32, dtype=dtype))
        weight_beside = Weight(((piece,),), branch=low_rank if adapter else None)
        backend.linear(inputs, weight_beside, stored, bias)


def main(target: int) -> None:
    """Compile a selection; print what became of it."""
    compile_instead_of_launching(target)

    def spec(name: str, **options: Any) -> QuantSpec:
        return QuantSpec(parse(name), **({"granularity": "channel"} | options))

    def token(name: str) -> QuantSpec:
        return QuantSpec(parse(name), "token", online=True)

    call(spec("e2m1"), token("e2m1"), (1152, 1152), (4096, 1152))
    ptx = COMPILED[-1][1].asm["ptx"]
    if re.search(r"wgmma\.mma_async[^;]*e4m3\.e4m3 \{[^}]*\}, \{", ptx) and "cp.async.cg" in ptx:
        sys.stdout.write("wgmma e4m3 from registers, pipelined\n")
    before = len({id(kernel) for _, kernel in COMPILED})
    call(spec("e2m1"), token("e2m1"), (1152, 1152), (4095, 1152))
    if len({id(kernel) for _, kernel in COMPILED}) == before:
        sys.stdout.write("another number of tokens compiles nothing\n")
    call(spec("e2m1"), None, (1152, 1152), (1, 1152))
    call(spec("iq4nl"), token("int8"), (1152, 1152), (4096, 1152))
    call(spec("t3g"), None, (1152, 1152), (1, 1152))
    call(spec("int3"), token("int8"), (1152, 1151), (70, 1151), torch.float32)
    groups = spec("uint4", granularity="group", group_size=64, zero_point=True)
    call(groups, QuantSpec(parse("ue2m2"), zero_point=True), (128, 512), (300, 512), torch.float16)
    call(spec("e2m1"), token("e4m3fn" if target >= 89 else "int8"), (128, 512), (300, 512), adapter=True)
    call(spec("e2m3"), token("e2m3"), (320, 320, 3, 3), (2, 320, 16, 16))
    names = [name for name, _ in COMPILED]
    sys.stdout.write(f"{len(names)} launches: {' '.join(sorted(set(names)))}\n")


if __name__ == "__main__":
    main(int(sys.argv[1]))
