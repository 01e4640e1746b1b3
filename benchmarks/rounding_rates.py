"""Tunes the learning rate of learned rounding for floating-point and integer grids on a reference model.

    python benchmarks/rounding_rates.py --model emoji-pixart --blocks 4

For some blocks and every rate: relative output error after learning, over that of rounding to nearest, on rows that were
not used for learning. Writes benchmarks/results/rounding-rates-<model>.json; what is there already is kept.
"""

from __future__ import annotations

import statistics
import sys
from dataclasses import dataclass
from typing import Any

import harness
import torch

from difloat import api, run
from difloat.layers import packed
from difloat.methods import trace
from difloat.methods.learned_rounding import RoundingSettings, learn_rounding, relative_error
from difloat.methods.paused_forwards import Passes
from difloat.numbers import formats
from difloat.plan.encode import dequantize
from difloat.plan.rules import MIN_MAX, Draft, Rule, asymmetric_integers, draft_layer
from difloat.recipes import lbfp
from difloat.reference_models import NAMES

RATES = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
WEIGHT_RATES = (0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03)  # scale-aware variables are in units of the weight
GROUPS = Rule((formats.parse("e2m1"),), "group", 128, clips=MIN_MAX)
INTEGERS = asymmetric_integers(4, "channel")


@dataclass(frozen=True)
class Grid:
    """What is swept: a grid for the weights, the form of the rounding variables, and its rates."""

    rule: Rule
    scale_aware: bool = False
    rates: tuple[float, ...] = RATES


GRIDS = {
    "FP4, per tensor": Grid(Rule(lbfp.encodings(4))),
    "INT4 asymmetric, per channel": Grid(INTEGERS),
    "E2M1, groups of 128": Grid(GROUPS),
    "E2M1, groups of 128, scale-aware": Grid(GROUPS, True, WEIGHT_RATES),
}


def main() -> None:
    """Run the sweep and write the result."""
    parser = harness.parser(__doc__, threads=harness.all_threads())
    parser.add_argument("--model", choices=NAMES, default="emoji-pixart")
    parser.add_argument("--blocks", type=int, default=4, help="blocks of the model, evenly spaced")
    parser.add_argument("--iterations", type=int, default=RoundingSettings.iterations)
    parser.add_argument("--rows", type=int, default=192, help="calibration rows; a third is held out")
    arguments = harness.arguments(parser)
    torch.set_num_threads(arguments.threads)
    pipeline = run.load_pipeline(arguments.model)
    guidance, call = run.call_of(arguments.model, None)
    prompts = run.prompts_of(pipeline, arguments.model, None)
    data = api.calibrate(
        pipeline, prompts=prompts, call_kwargs=call, samples=arguments.rows, guidance_scale=guidance
    )
    model = api.denoiser(pipeline)
    units = {name: members for name, members in packed.blocks(model).items() if len(members) > 1}
    chosen = list(units)[:: max(1, len(units) // arguments.blocks)][: arguments.blocks]
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(0)).tolist()
    cut = 2 * len(order) // 3
    splits = [order[:cut], order[cut:]]
    out = harness.RESULTS / f"rounding-rates-{arguments.model}.json"
    known = harness.stored(out).get("held_out_error_over_nearest", {})
    results = {
        name: {
            str(rate): known.get(name, {}).get(str(rate))
            or sweep(model, units, chosen, data, splits, grid, rate, arguments.iterations)
            for rate in grid.rates
        }
        for name, grid in GRIDS.items()
    }
    harness.write(out, {**vars(arguments), "held_out_error_over_nearest": results}, show=True)


def sweep(
    model: Any,
    units: Any,
    chosen: list[str],
    data: Any,
    splits: list[list[int]],
    grid: Grid,
    rate: float,
    iterations: int,
) -> float:
    """Median over the blocks of the held-out error after learning over the one of rounding to nearest."""
    ratios = []
    for unit in chosen:
        drafts = {
            name.removeprefix(unit + "."): draft_layer(
                model.get_submodule(name).weight, [in_channels(model, name)], grid.rule
            )
            for name in units[unit]
        }
        calls = [[data.batch(rows[at : at + 32]) for at in range(0, len(rows), 32)] for rows in splits]
        inputs, targets = [], []
        for part in calls:
            with Passes(model, part) as passes:
                inputs.append(passes.enter(unit))
                targets.append(passes.leave(unit))
        settings = RoundingSettings(iterations=iterations, learning_rate=rate, scale_aware=grid.scale_aware)
        generator = torch.Generator().manual_seed(0)
        learned = learn_rounding(
            model.get_submodule(unit), drafts, inputs[0], targets[0], settings, generator
        )
        held_out = [
            error(model.get_submodule(unit), weights, inputs[1], targets[1])
            for weights in (learned.weights, nearest(drafts))
        ]
        ratios.append(held_out[0] / held_out[1])
        sys.stderr.write(f"{rule_name(grid)} rate {rate} {unit}: {ratios[-1]:.4f}\n")
    return statistics.median(ratios)


def rule_name(grid: Grid) -> str:
    """The name of a grid in the table."""
    return next(name for name, other in GRIDS.items() if other is grid)


def in_channels(model: Any, name: str) -> int:
    """Input channels of a layer."""
    return int(model.get_submodule(name).weight.shape[1])


def nearest(drafts: dict[str, Draft]) -> dict[str, torch.Tensor]:
    """Weights rounded to nearest."""
    return {name: dequantize(draft.plan()) for name, draft in drafts.items()}


@torch.no_grad()
def error(block: Any, weights: dict[str, torch.Tensor], inputs: Any, targets: list[torch.Tensor]) -> float:
    """Relative squared output error of a block under other weights."""
    parameters = {f"{name}.weight": weight for name, weight in weights.items()}
    outputs = torch.func.functional_call(block, parameters, *inputs)
    return relative_error(trace.tensors_of(outputs), targets)


if __name__ == "__main__":
    main()
