"""How many rows of a layer want another width, and what that saves: the decisions of MPQ-DM before any training.

    python benchmarks/row_widths.py --model emoji-unet --bits 2 3 4

For every criterion that rows are sorted by, with searched ranges and with ranges from the smallest to the largest value: layers
whose best number of moved rows is not 0, and the mean over layers of the output error relative to all rows alike. And what the
search of ranges further inside brings at few bits, on Laplacian rows. Writes benchmarks/results/row-widths-<model>.json.
"""

from __future__ import annotations

import statistics
from dataclasses import replace
from typing import Any, get_args

import harness
import torch

from difloat import api, run
from difloat.methods.mixed_rows import AllocationSettings, Criterion, allocate
from difloat.methods.task import Task
from difloat.numbers import formats
from difloat.numbers.search import OFFSETS, SHRUNK
from difloat.plan.rules import MIN_MAX, Bits, Rule, asymmetric_integers
from difloat.reference_models import NAMES

ROW_VALUES = 1008
RANGES = {
    "searched": lambda bits: asymmetric_integers(bits, "channel"),
    "smallest to largest": lambda bits: replace(
        asymmetric_integers(bits, "channel"), clips=MIN_MAX, zero_points=MIN_MAX
    ),
}


def main() -> None:
    """Decide for every setting and write what came out."""
    parser = harness.parser(__doc__, threads=harness.all_threads())
    parser.add_argument("--model", choices=NAMES, default="emoji-unet")
    parser.add_argument("--bits", nargs="+", type=int, default=[2, 3, 4])
    parser.add_argument("--samples", type=int, default=256, help="calibration rows")
    arguments = harness.arguments(parser)
    pipeline = run.load_pipeline(arguments.model)
    guidance, call = run.call_of(arguments.model, None)
    data = api.calibrate(
        pipeline,
        prompts=run.prompts_of(pipeline, arguments.model, None),
        call_kwargs=call,
        samples=arguments.samples,
        steps=20,
        guidance_scale=guidance,
        progress=False,
    )
    decisions = {
        f"W{bits}, ranges {name}, {criterion}": decide(
            replace(api.task_of(pipeline, data, Bits(bits, None)), progress=False), criterion, rule_of
        )
        for bits in arguments.bits
        for name, rule_of in RANGES.items()
        for criterion in get_args(Criterion)
    }
    facts = {
        **vars(arguments),
        "rows_with_the_step_before": sum(before is not None for before in data.before) / len(data),
        "laplacian_rows": {f"uint{bits}": ranges(bits) for bits in (1, 2, 3, 4)},
        "decisions": decisions,
    }
    harness.write(harness.RESULTS / f"row-widths-{arguments.model}.json", facts, show=True)


def decide(task: Task, criterion: Criterion, rule_of: Any) -> dict[str, float]:
    """Layers in all, layers that move rows, and the mean relative output error."""
    found = allocate(task, rule_of, AllocationSettings(criterion)).values()
    return {
        "layers": len(found),
        "moving": sum(one.moved > 0 for one in found),
        "relative_error": statistics.mean(one.error for one in found),
    }


def ranges(bits: int) -> dict[str, float]:
    """Squared error over mean square with ranges near the ends, and with those that the recipes search."""
    noise = torch.rand(64, ROW_VALUES, generator=torch.Generator().manual_seed(0), dtype=torch.float64) - 0.5
    rows = (-noise.sign() * (1 - 2 * noise.abs()).clamp_min(1e-12).log()).float()
    near = Rule((formats.parse(f"uint{bits}"),), "channel", clips=SHRUNK, zero_points=OFFSETS)
    tried = {"near the ends": near, "as searched": asymmetric_integers(bits, "channel")}
    return {name: float(rule.search(rows).error.sum() / rows.square().sum()) for name, rule in tried.items()}


if __name__ == "__main__":
    main()
