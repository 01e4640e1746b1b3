"""How long it takes to find formats and scales: exact search against brute force, and over a whole large model.

Both parts use random weights, since the time depends on shapes alone:

1. One 1152 x 4608 weight, per tensor, 3 formats x 101 clips: `search` against fake quantization of every candidate.
2. All linear weights of a model with the shapes of PixArt-XL (28 blocks 1152 wide, 0.6 B parameters), all 4-bit
   floating-point formats, per tensor and per output channel, with the default refinement.

Writes ``benchmarks/results/quantization_time.json``.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from difloat.numbers.formats import Format, candidates
from difloat.numbers.rounding import round_to
from difloat.numbers.search import CLIPS, search

ROOT = Path(__file__).resolve().parent.parent
WIDTH, BLOCKS = 1152, 28
SHAPES = {  # out, in: how many of them in the whole model
    (WIDTH, WIDTH): 8 * BLOCKS + 1,  # q, k, v, out of self- and cross-attention; timestep embedding
    (4 * WIDTH, WIDTH): BLOCKS,
    (WIDTH, 4 * WIDTH): BLOCKS,
    (6 * WIDTH, WIDTH): 1,  # adaLN-single
    (WIDTH, 4096): 1,  # caption projection
}


def brute_force(weight: Tensor, formats: tuple[Format, ...]) -> dict[str, float]:
    """Lowest squared error of every format, by one pass over the weight per candidate."""
    absmax = float(weight.abs().max())
    lowest = {}
    for format in formats:
        scales = [clip * absmax / format.max for clip in CLIPS]
        errors = [
            float((round_to(weight / s, format) * s - weight).square().sum(dtype=torch.float64))
            for s in scales
        ]
        lowest[format.name] = min(errors)
    return lowest


def seconds(call: Callable[[], object]) -> float:
    """Wall-clock time of one call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def compare(repeats: int) -> dict[str, object]:
    """Part 1: medians of runs side by side, and how far the two results are apart."""
    formats = candidates(4)
    weight = torch.randn(WIDTH, 4 * WIDTH, generator=torch.Generator().manual_seed(0)) * 0.02
    row = weight.view(1, -1)
    exact: dict[str, float] = {}
    truth: dict[str, float] = {}

    def ours() -> None:
        exact.update(search(row, formats, refine=0).error_by_format)

    def theirs() -> None:
        truth.update(brute_force(weight, formats))

    times: dict[str, list[float]] = {"search": [], "brute_force": []}
    for _ in range(repeats):
        times["search"].append(seconds(ours))
        times["brute_force"].append(seconds(theirs))
    medians = {name: statistics.median(values) for name, values in times.items()}
    return {
        "shape": list(weight.shape),
        "candidates": len(formats) * len(CLIPS),
        "search_s": medians["search"],
        "brute_force_s": medians["brute_force"],
        "speedup": medians["brute_force"] / medians["search"],
        "largest_relative_difference": max(abs(exact[name] / truth[name] - 1) for name in truth),
    }


def whole_model(blocks: int) -> dict[str, object]:
    """Part 2, with the counts of `SHAPES` scaled to `blocks`; every weight is searched for real."""
    formats = candidates(4)
    generator = torch.Generator().manual_seed(0)
    names = [format.name for format in formats]
    spent = {"per_tensor_s": 0.0, "per_channel_s": 0.0}
    parameters = 0
    for shape, count in SHAPES.items():
        for _ in range(max(1, count * blocks // BLOCKS)):
            weight = torch.randn(shape, generator=generator) * 0.02
            parameters += weight.numel()
            spent["per_tensor_s"] += seconds(lambda weight=weight: search(weight.view(1, -1), formats))
            spent["per_channel_s"] += seconds(lambda weight=weight: search(weight, formats))
    return {
        "formats": names,
        "blocks": blocks,
        "parameters": parameters,
        **spent,
        "total_s": sum(spent.values()),
    }


def machine() -> dict[str, object]:
    """Where this was measured."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": names[0] if names else platform.processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def commit() -> str | None:
    """The commit with a plus sign if files differ from it; None before the first one."""
    found = subprocess.run(
        ["git", "describe", "--always", "--dirty=+", "--abbrev=12"], cwd=ROOT, capture_output=True, text=True
    )
    return found.stdout.strip() or None


def main() -> None:
    """Run both parts, write and show the result."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=2, help="threads of torch")
    parser.add_argument("--repeats", type=int, default=3, help="runs of part 1; the median counts")
    parser.add_argument(
        "--blocks", type=int, default=BLOCKS, help="blocks of the model; fewer for a quick look"
    )
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/quantization_time.json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    results = {"one_weight": compare(options.repeats), "whole_model": whole_model(options.blocks)}
    command = " ".join(["python", "benchmarks/quantization_time.py", *sys.argv[1:]])
    text = json.dumps({"commit": commit(), "command": command, "machine": machine(), **results}, indent=2)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(text + "\n")
    sys.stdout.write(text + "\n")


if __name__ == "__main__":
    main()
