r"""Speed of single packed layers as a model calls them, against torch's bfloat16, in CPU time of one thread.

`kernels.py` calls operators by their names, which costs tens of microseconds of Python; layers of a model prepare their calls
once, and so does this script. It counts CPU time and takes the lower quartile, so that it can run on a machine that other work
shares. Every shape is one interleaved run. Pin it to a core::

    OMP_NUM_THREADS=1 taskset -c 1 python benchmarks/layers_alone.py
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

import harness
import torch
from kernels import layer
from torch import Tensor
from torch.nn import functional

from difloat.kernels import native_library, native_prepared
from difloat.kernels.geometry import Geometry
from difloat.plan.weight import Weight

LINEAR = [  # tokens, in, out
    *((tokens, width, width) for width in (320, 640, 1280) for tokens in (64, 256, 1024, 4096)),
    (120, 1152, 1152),
    (1024, 1152, 1152),
    (256, 1152, 4608),
    (256, 4608, 1152),
    (1024, 3072, 3072),
]
CONV = [  # in, out, side, kernel; one picture
    (320, 320, 64, 3),
    (640, 640, 32, 3),
    (1280, 1280, 16, 3),
    (1280, 1280, 8, 3),
    (320, 320, 64, 1),
    (640, 640, 32, 1),
    (1280, 1280, 16, 1),
]
BANDS = ("int8", "int4", "int3")
Calls = dict[str, Callable[[], Any]]


def banded(shape: tuple[int, ...]) -> Weight:
    """A weight whose output channels have 8, 4 and 3 bits by turns, as recipe `auto` mixes them."""
    rows = torch.arange(shape[0]) % len(BANDS)
    counts = torch.bincount(rows).tolist()
    made = [layer((count, *shape[1:]), name, "int8") for count, name in zip(counts, BANDS, strict=True)]
    return Weight((tuple(arguments[0].bands[0] for arguments in made),), rows.to(torch.uint8))


def weights(shape: tuple[int, ...]) -> dict[str, Weight]:
    """The kinds of weights that are measured, all with int8 inputs."""
    kinds = {"w4": layer(shape, "e2m1", "int8")[0], "w8": layer(shape, "int8", "int8")[0]}
    kinds["w8, w4 and w3"] = banded(shape)
    if len(shape) == 2:
        kinds["w4 groups of 64"] = layer(shape, "e2m1", "int8", 64)[0]
    return kinds


def linear(tokens: int, channels: int, out: int) -> Calls:
    """Contestants of one linear layer."""
    x, float_weight = torch.randn(tokens, channels).bfloat16(), (torch.randn(out, channels) * 0.02).bfloat16()
    found: Calls = {"torch bf16": lambda: functional.linear(x, float_weight)}
    for name, weight in weights((out, channels)).items():
        call = native_prepared.linear(weight, torch.bfloat16)
        found[name] = lambda call=call, kept=weight: (call(x, None, None, None), kept)  # type: ignore[misc]
    return found


def conv(channels: int, out: int, side: int, kernel: int) -> Calls:
    """Contestants of one convolution of one picture, channels last."""
    last, padding = torch.channels_last, kernel // 2

    def laid_out(x: Tensor) -> Tensor:
        return x.bfloat16().to(memory_format=last)

    x = laid_out(torch.randn(1, channels, side, side))
    float_weight = laid_out(torch.randn(out, channels, kernel, kernel) * 0.02)
    found: Calls = {"torch bf16": lambda: functional.conv2d(x, float_weight, None, 1, padding)}
    for name, weight in weights((out, channels, kernel, kernel)).items():
        call = native_prepared.conv2d(weight, torch.bfloat16, Geometry(padding=(padding, padding)))
        found[name] = lambda call=call, kept=weight: (call(x, None, None, None), kept)  # type: ignore[misc]
    return found


def quartiles(calls: Calls, repeats: int) -> dict[str, float]:
    """Milliseconds of CPU time of every call: the lower quartile of interleaved repetitions, each after one not timed."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            call()
            start = time.thread_time()
            call()
            times[name].append(1000 * (time.thread_time() - start))
    return {name: sorted(found)[len(found) // 4] for name, found in times.items()}


def main() -> None:
    """Measure, print a table and write."""
    out = harness.RESULTS / f"layers-alone-{native_library.unit()}.json"
    options = harness.arguments(harness.parser(__doc__, threads=1, repeats=15, out=out))
    rows = []
    for kind, shapes, contestants in (("linear", LINEAR, linear), ("conv2d", CONV, conv)):
        for shape in shapes:
            with torch.no_grad():
                times = quartiles(contestants(*shape), options.repeats)
            base = times["torch bf16"]
            rows.append({"kind": kind, "shape": list(shape), "cpu_ms": times})
            cells = [f"{base / found:.2f}" for name, found in times.items() if name != "torch bf16"]
            text = " | ".join([f"{kind} {'x'.join(map(str, shape))}", f"{base:.3g}", *cells])
            sys.stdout.write(f"| {text} |\n")
            sys.stdout.flush()
    harness.write(options.out, {"unit": native_library.unit(), "rows": rows})


if __name__ == "__main__":
    main()
