"""Layers of random shapes and formats through every backend, and inputs that do not fit; also under a memory sanitizer.

python tests/fuzz_kernels.py --count 2000

cmake -S . -B build/asan -DCMAKE_BUILD_TYPE=RelWithDebInfo -DCMAKE_CXX_FLAGS="-fsanitize=address -fno-omit-frame-pointer"
cmake --build build/asan
export LD_PRELOAD="$(g++ -print-file-name=libasan.so) $(g++ -print-file-name=libstdc++.so)"
ASAN_OPTIONS=detect_leaks=0 DIFLOAT_NATIVE=build/asan python tests/fuzz_kernels.py --count 2000

Every good input must give the reference's numbers up to float32's order of sums; every bad one a ValueError. Prints the counts;
exit code 1 where something else happened, and the sanitizer's own where memory outside of a tensor was touched.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
from collections import Counter
from typing import Any

import torch
from torch import Tensor

from difloat.kernels import dispatch, native_library
from difloat.kernels.dispatch import use_backend
from difloat.numbers.formats import parse
from difloat.plan.specs import Part, QuantSpec
from test_backends import case

_WEIGHTS = (
    "int2",
    "int3",
    "int4",
    "e2m1",
    "uint4",
    "uint2",
    "int8",
    "uint8",
    "e2m3",
    "e3m0",
    "e1m4",
    "e3m2",
    "int6",
)
_INPUTS = ("int8", "uint8", "int4", "uint4", "e2m1", "ue1m7", "ue2m2", "e4m3")
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def random_part(draw: random.Random, channels: int, picture: bool) -> Part:
    """A random kind of weight and input."""
    format = parse(draw.choice(_WEIGHTS))
    granularity = draw.choice(("tensor", "channel") if picture else ("tensor", "channel", "group"))
    size = draw.choice((16, 32, 64)) if granularity == "group" else None
    weight = QuantSpec(format, granularity, size, zero_point=not format.signed and draw.random() < 0.7)
    grid = parse(draw.choice(_INPUTS))
    kind = draw.choice(("static", "token", "tensor", "none"))
    if kind == "none":
        return Part(channels, weight)
    if kind == "static":
        return Part(channels, weight, QuantSpec(grid, zero_point=not grid.signed and draw.random() < 0.5))
    signed = grid if grid.signed else parse("int8")
    return Part(channels, weight, QuantSpec(signed, kind, online=True))


def random_layout(draw: random.Random, x: Tensor) -> Tensor:
    """The same numbers in another layout."""
    kind = draw.choice(("plain", "spread", "inside", "repeated", "permuted"))
    if kind == "spread":
        return torch.stack([x, x], -1)[..., 0]
    if kind == "inside":
        return torch.nn.functional.pad(x, (3, 5))[..., 3:-5]
    if kind == "repeated":
        return x[:1].expand(x.shape)
    if kind == "permuted":
        order = draw.sample(range(x.dim()), x.dim())
        inverse = [order.index(n) for n in range(x.dim())]
        return x.permute(order).contiguous().permute(inverse)
    return x


def bad_inputs(draw: random.Random, x: Tensor, axis: int) -> list[Tensor]:
    """Inputs that do not fit the layer of `x`."""
    width = draw.randint(1, 3 * x.shape[axis])
    shape = [*x.shape]
    shape[axis] = width if width != x.shape[axis] else width + 1
    return [torch.randn(shape), x.long(), x.to(torch.float8_e5m2), x.flatten()[: max(0, x.shape[axis] - 1)]]


def one_round(draw: random.Random, generator: torch.Generator, counts: Counter[str]) -> None:
    """One layer in every backend."""
    picture = draw.random() < 0.4
    channels = draw.choice((1, 2, 3, 5, 7, 8, 15, 16, 17, 31, 33, 48, 64, 65, 96, 127, 130, 192))
    rows, kernel = draw.randint(1, 70), draw.choice((1, 2, 3))
    part = random_part(draw, channels, picture)
    shape: tuple[int, ...] = (rows, channels, kernel, kernel) if picture else (rows, channels)
    layer = case(shape, part, generator, bias=draw.random() < 0.6)
    geometry: tuple[Any, ...] = ()
    if picture:
        size = [draw.randint(0, 3), channels, draw.randint(3, 9), draw.randint(3, 9)]
        geometry = ((draw.randint(1, 2),) * 2, (draw.randint(0, 2),) * 2, (1, 1), 1)
    else:
        size = [*(draw.randint(0, 9) for _ in range(draw.randint(0, 2))), draw.randint(1, 40), channels]
    x = torch.randn(size, generator=generator)
    if part.activation is not None and part.activation.format.min >= 0 and not part.activation.zero_point:
        x = x.abs()
    x = random_layout(draw, x.to(draw.choice(_DTYPES)))
    with use_backend("reference"):
        expected = layer.call(x, *geometry).double()
    for name in dispatch.available():
        if name in ("reference", "triton"):
            continue
        with use_backend(name):
            result = layer.call(x, *geometry).double()
            limit = {torch.float32: 1e-4, torch.bfloat16: 0.02, torch.float16: 3e-3}[x.dtype]
            far = expected.numel() and (result - expected).abs().max() > limit * (1 + expected.abs().max())
            counts["wrong numbers" if far else "equal"] += 1
            if far:
                print(f"{name} {part} {tuple(x.shape)} {x.dtype} {x.stride()} {geometry}", file=sys.stderr)
            for bad in bad_inputs(draw, x, 1 if picture else x.dim() - 1):
                try:
                    layer.call(bad, *geometry)
                    counts["not refused"] += 1
                    print(f"not refused: {name} {part} {tuple(bad.shape)} {bad.dtype}", file=sys.stderr)
                except ValueError:
                    counts["refused"] += 1


def main() -> None:
    """Fuzz, print the counts."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=500, help="layers")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    draw, generator = random.Random(options.seed), torch.Generator().manual_seed(options.seed)
    counts: Counter[str] = Counter()
    with torch.no_grad():
        for _ in range(options.count):
            one_round(draw, generator, counts)
    unit = f"unit {native_library.unit()}, {os.environ.get('DIFLOAT_NATIVE', 'the installed library')}"
    print(f"{options.count} layers, {unit}: {dict(counts)}")
    raise SystemExit(counts["wrong numbers"] + counts["not refused"] > 0)


if __name__ == "__main__":
    main()
