"""Is a binary residual (after MPQ-DMv2, arXiv:2507.04290, inferred) worth its bit? Weight errors at the same number of bits.

    python benchmarks/binary_residual.py

Rows of every layer of a reference model, first and last left out, three ways: N bits plus one bit per weight that says the
sign of what rounding left, times a size of the row's own (the best one is the mean magnitude of the rest); the same with the
N-bit range chosen anew for the sum; N + 1 bits. All grids are unsigned integers with a real zero point whose range is searched
by squared error. Prints and writes benchmarks/results/binary-residual.json.
"""

from __future__ import annotations

import harness
import torch
from torch import Tensor

from difloat import api, run
from difloat.layers import packed
from difloat.numbers import formats
from difloat.numbers.rounding import round_to
from difloat.numbers.search import search
from difloat.plan.rules import asymmetric_integers
from difloat.reference_models import NAMES


def searched(rows: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Scale, zero point and error of rows at so many bits."""
    rule = asymmetric_integers(bits, "channel")
    found = search(rows, rule.formats, clips=rule.clips, zero_points=rule.zero_points)
    return found.scale, found.zero_point, found.error


def with_residual(rows: Tensor, bits: int, scale: Tensor, zero_point: Tensor) -> Tensor:
    """Error [r] of N bits and a sign of the row's own size; `scale` and `zero_point` [r]."""
    grid = formats.parse(f"uint{bits}")
    scale, zero_point = scale[:, None], zero_point[:, None]
    rest = (rows - round_to((rows - zero_point) / scale, grid) * scale - zero_point).double()
    return rest.square().sum(1) - rows.shape[1] * rest.abs().mean(1).square()


def range_for_the_sum(rows: Tensor, bits: int) -> Tensor:
    """Lowest error [r] of N bits and a sign, over the ranges that the search tries."""
    rule, best = asymmetric_integers(bits, "channel"), None
    top = 2**bits - 1
    for zero in rule.zero_points or ():
        zero_point = zero * rows.amin(1)
        for clip in rule.clips:
            scale = (clip * (rows.amax(1) - zero_point) / top).clamp_min(1e-30)
            error = with_residual(rows, bits, scale, zero_point)
            best = error if best is None else torch.minimum(best, error)
    assert best is not None
    return best


def main() -> None:
    """Measure both models."""
    options = harness.arguments(harness.parser(__doc__, out=harness.RESULTS / "binary-residual.json"))
    results = {}
    for model in NAMES:
        module = api.denoiser(run.load_pipeline(model))
        weights = [layer.weight.detach().flatten(1) for layer in packed.quantizable(module).values()][1:-1]
        for bits in (1, 2, 3):
            sums = torch.zeros(3, dtype=torch.float64)
            for rows in weights:
                scale, zero_point, _ = searched(rows, bits)
                beside = with_residual(rows, bits, scale, zero_point)
                wider = searched(rows, bits + 1)[2]
                sums += torch.stack([beside.sum(), range_for_the_sum(rows, bits).sum(), wider.sum()])
            kept, anew, wider_sum = (float(value) for value in sums)
            results[f"{model}, {bits} + 1 bits"] = {
                "residual_over_wider": kept / wider_sum,
                "residual_with_its_own_range_over_wider": anew / wider_sum,
            }
            print(model, bits, results[f"{model}, {bits} + 1 bits"])
    harness.write(options.out, {"errors": results})


if __name__ == "__main__":
    main()
