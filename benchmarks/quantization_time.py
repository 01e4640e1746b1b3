"""How long it takes to find formats and scales: exact search against brute force, and over a whole large model.

Both parts use random weights, since the time depends on shapes alone:

1. One 1152 x 4608 weight, per tensor, 3 formats x 101 clips: `search` against fake quantization of every candidate.
2. All linear weights of a model with the shapes of PixArt-XL (28 blocks 1152 wide, 0.6 B parameters), all 4-bit
   floating-point formats, per tensor and per output channel, with the default refinement.

Writes ``benchmarks/results/quantization_time.json``.
"""

from __future__ import annotations

import harness
import torch
from torch import Tensor

from difloat.numbers.formats import Format, candidates
from difloat.numbers.rounding import round_to
from difloat.numbers.search import CLIPS, search

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

    medians = harness.medians(harness.interleaved({"search": ours, "brute_force": theirs}, repeats))
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
            spent["per_tensor_s"] += harness.seconds(
                lambda weight=weight: search(weight.view(1, -1), formats)
            )
            spent["per_channel_s"] += harness.seconds(lambda weight=weight: search(weight, formats))
    return {
        "formats": names,
        "blocks": blocks,
        "parameters": parameters,
        **spent,
        "total_s": sum(spent.values()),
    }


def main() -> None:
    """Run both parts, write and show the result."""
    parser = harness.parser(__doc__, threads=2, repeats=3, out=harness.RESULTS / "quantization_time.json")
    parser.add_argument(
        "--blocks", type=int, default=BLOCKS, help="blocks of the model; fewer for a quick look"
    )
    options = harness.arguments(parser)
    results = {"one_weight": compare(options.repeats), "whole_model": whole_model(options.blocks)}
    harness.write(options.out, results, show=True)


if __name__ == "__main__":
    main()
