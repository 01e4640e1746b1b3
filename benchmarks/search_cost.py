"""What the search over formats costs and loses against trying every candidate on every row.

    python benchmarks/search_cost.py                # both embedded models, and random rows of 576 x 1152 weights

For every layer of the models the formats of a width are searched per output channel and in groups: by `Rule.search`, where a
sample of rows rules out formats and grids of few bits are searched coarse to fine, and exhaustively by `best_per_format` with
all `CLIPS`. Printed are seconds of one thread per million weights, how often both choose the same format, and how much
squared error the first loses.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

import harness
import torch
from torch import Tensor

from difloat import reference_models
from difloat.layers import packed
from difloat.numbers import formats
from difloat.numbers.search import best_per_format
from difloat.pipelines import denoiser_of
from difloat.plan.rules import Rule

_BITS, _GROUPS = (3, 4, 6, 8), (0, 128, 32)


def main() -> None:
    """Measure, write and print one JSON object."""
    parser = harness.parser(__doc__, threads=1, out=harness.RESULTS / "search_cost.json")
    parser.add_argument("--models", nargs="*", default=list(reference_models.NAMES))
    options = harness.arguments(parser)
    result = {
        f"{bits} bits, {f'groups of {size}' if size else 'per channel'}": compared(options.models, bits, size)
        for bits in _BITS
        for size in _GROUPS
    }
    harness.write(options.out, {"searches": result}, show=True)


def weights(models: list[str]) -> Iterator[Tensor]:
    """Weights of every layer, [o, i * k], and random ones of three shapes of distribution."""
    for name in models:
        for layer in packed.quantizable(denoiser_of(reference_models.load(name))[1]).values():
            yield layer.weight.detach().flatten(1)
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(576, 1152, generator=generator)
    uniform = torch.rand(576, 1152, generator=generator)
    yield from (normal, normal * normal.abs(), normal / uniform.clamp_min(0.05))


def compared(models: list[str], bits: int, group: int) -> dict[str, float]:
    """Both searches on all weights whose rows are cut into groups of `group` values; 0: whole rows."""
    seconds, lost, same, layers, values = [0.0, 0.0], [], 0, 0, 0
    for weight in weights(models):
        if group and weight.shape[1] % group:
            continue
        rows = weight.reshape(-1, group or weight.shape[1])
        start = time.process_time()
        quick = Rule(formats.candidates(bits)).search(rows)
        middle = time.process_time()
        found = best_per_format(rows, formats.candidates(bits))
        end = time.process_time()
        exact = min(found.values(), key=lambda one: float(one.error.sum()))
        seconds = [seconds[0] + middle - start, seconds[1] + end - middle]
        lost.append(float(quick.error.sum() / exact.error.sum().clamp_min(1e-300)) - 1)
        same, layers, values = same + (quick.format == exact.format), layers + 1, values + rows.numel()
    return {
        "layers": layers,
        "same format": same,
        "seconds per million weights": round(seconds[0] / values * 1e6, 3),
        "exhaustive": round(seconds[1] / values * 1e6, 3),
        "squared error lost at most, %": round(100 * max(lost), 3),
    }


if __name__ == "__main__":
    main()
