"""Tunes the rates of fine-tuning on a reference model: error on held-out rows after a short run, for every rate.

    python benchmarks/tuning_rates.py --model emoji-unet --bits w4a4
    python benchmarks/tuning_rates.py --model emoji-unet --bits w2a4 --recipe mpqdm

Every run starts from the same post-training plan (MSFP's, or MPQ-DM's with input ranges by timestep; one adapter, plain
loss). The measure is the squared error of the denoiser's output on calibration rows that were not trained on, over that before
training. Writes benchmarks/results/tuning-rates-<model>.json; what is there already is kept.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

import harness
import torch

from difloat import api
from difloat import run as study
from difloat.calibration.rows import first_tensor
from difloat.layers import install
from difloat.methods.post_training import Outcome
from difloat.methods.task import Task
from difloat.methods.training.fine_tune import Tuning, tune
from difloat.methods.training.student import Adapters
from difloat.methods.training.train import TrainingSettings
from difloat.plan.plan import Plan
from difloat.plan.rules import Bits
from difloat.recipes import mpqdm, msfp
from difloat.reference_models import NAMES

RUNS: list[dict[str, Any]] = [
    *({"adapter_rate": rate} for rate in (0.0004, 0.004, 0.01, 0.03, 0.1, 0.3)),
    *({"range_rate": rate} for rate in (0.0, 2e-3, 1e-2)),
    *({"scale_rate": rate} for rate in (0.0, 3e-4, 3e-3)),
    *({"by_timestep": True, "range_rate": rate} for rate in (5e-4, 2e-3, 1e-2)),
]
STARTS: dict[str, Callable[[Task], Outcome]] = {
    "msfp": lambda task: msfp.plan(task, msfp.Options(adapters=0)),
    "mpqdm": lambda task: mpqdm.plan(task, mpqdm.Options(epochs=0, relation="off")),
}


def main() -> None:
    """Run what is missing and write the result."""
    parser = harness.parser(__doc__, threads=harness.all_threads())
    parser.add_argument("--model", choices=NAMES, default="emoji-unet")
    parser.add_argument("--bits", default="w4a4")
    parser.add_argument("--recipe", choices=STARTS, default="msfp", help="whose plan is tuned")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--rows", type=int, default=384, help="calibration rows; a third is held out")
    parser.add_argument("--runs", nargs="+", type=int, help="only these runs, counted from 0")
    arguments = harness.arguments(parser)
    out = harness.RESULTS / f"tuning-rates-{arguments.model}.json"
    results = harness.stored(out)
    train, held_out = split(arguments)
    model = train.model
    outcome = STARTS[arguments.recipe](train)
    before = error(model, outcome, held_out)
    alike = dict.fromkeys(train.calibration.timesteps, 1.0)
    for number, run in enumerate(RUNS):
        start = {} if arguments.recipe == "msfp" else {"recipe": arguments.recipe}
        name = json.dumps({**start, "bits": arguments.bits, "epochs": arguments.epochs, **run})
        if name in results or (arguments.runs and number not in arguments.runs):
            continue
        rates = dict(run)
        by_timestep = rates.pop("by_timestep", arguments.recipe == "mpqdm")
        settings = replace(TrainingSettings(epochs=arguments.epochs), **rates)
        eight = (n for n, plan in outcome.layers.items() if plan.parts[0].weight.format.bits == 8)
        kept = tuple(outcome.measured.get("kept_8bit", eight))
        tuned = tune(train, outcome, Tuning(settings, Adapters(1, 32, kept, by_timestep), alike))
        result = {
            "held_out_error_over_untrained": error(model, tuned, held_out) / before,
            "losses": tuned.measured["losses"],
            "seconds": tuned.measured["seconds"]["fine-tune"],
            "settings": asdict(settings),
            **harness.facts(),
        }
        harness.add(out, {name: result})  # another process may run other rates
        sys.stderr.write(f"{name}: {result['held_out_error_over_untrained']:.4f}\n")


def split(arguments: argparse.Namespace) -> tuple[Task, Task]:
    """The task on two thirds of the rows, and on the rest; every timestep is in both."""
    pipeline = study.load_pipeline(arguments.model)
    guidance, call = study.call_of(arguments.model, None)
    prompts = study.prompts_of(pipeline, arguments.model, None)
    tasks = []
    for rows, seed in ((2 * arguments.rows // 3, 0), (arguments.rows // 3, 1)):
        data = api.calibrate(
            pipeline,
            prompts=prompts,
            call_kwargs=call,
            samples=rows,
            steps=20,
            guidance_scale=guidance,
            seed=seed,
        )
        tasks.append(api.task_of(pipeline, data, Bits.parse(arguments.bits)))
    return tasks[0], tasks[1]


@torch.no_grad()
def error(model: Any, outcome: Outcome, task: Task) -> float:
    """Squared error of the quantized denoiser's outputs over that of the full-precision ones."""
    plan = Plan("msfp", "", outcome.layers, outcome.skipped, {}, {}, outcome.attention, outcome.timesteps)
    twin = install.apply(install.shadow(model), plan)
    wrong = power = 0.0
    by_timestep: dict[float, list[int]] = {}
    for row, timestep in enumerate(task.calibration.timesteps):
        by_timestep.setdefault(timestep, []).append(row)
    for rows in by_timestep.values():
        args, kwargs = task.calibration.batch(rows)
        wanted = first_tensor(model(*args, **kwargs))
        wrong += float((first_tensor(twin(*args, **kwargs)) - wanted).square().sum())
        power += float(wanted.square().sum())
    return wrong / power


if __name__ == "__main__":
    main()
