"""Optional parts of a recipe, each kept only where held-out trajectories gain from it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, TypeVar

from difloat.methods.cost import Cost
from difloat.methods.judge import JUDGED, apart, judge
from difloat.methods.post_training import Outcome, timed
from difloat.methods.task import Task
from difloat.methods.training.timestep_weights import loss_weights

WITHOUT: Mapping[str, Any] = {"rotate": "none", "branch": 0}
"""The parts in the order in which they are tried, by the option and its value that leaves the part out."""

_Options = TypeVar("_Options", bound=Any)


def worth_having(task: Task, options: _Options, outcome_of: Callable[[Task, _Options], Outcome]) -> Outcome:
    """The outcome with those parts of `WITHOUT` that are asked for, or if `options.judge` is true, with those that pay.

    To judge, three quarters of the trajectories make an outcome without any of the parts, and then one with each in turn beside
    those that were kept. A part stays if the whole 95 % interval of what the other trajectories gain from it lies above zero.
    All rows make the outcome that is returned, and its measurements say under "tried" what was judged.

    Args:
        task: Model and data.
        options: A recipe's options, with `judge`, `guidance`, `factor_power` and those of `WITHOUT`.
        outcome_of: Makes the outcome of a task and options.

    Raises:
        ValueError: if the rows are of too few trajectories to hold some out.
    """
    asked = _asked(options)
    if not asked:
        return outcome_of(task, options)
    learned_from, held = apart(task.calibration, task.seed)
    weights = loss_weights(task, options.factor_power if task.scheduler is not None else 0.0)
    few = replace(task, calibration=task.calibration.some(learned_from))
    best = replace(options, **WITHOUT)
    seconds: dict[str, Any] = {"seconds": {}}
    verdicts = []
    with timed(seconds, "try parts"):
        before = outcome_of(few, best)
        for name, value in asked.items():
            trial = replace(best, **{name: value})
            after = outcome_of(few, trial)
            verdict = judge(
                task, held, name, before, after, guidance=options.guidance, weights=weights, strict=True
            )
            verdicts.append(verdict.report())
            if verdict.kept:
                best, before = trial, after
    made = outcome_of(task, best)
    spent = {**made.measured["seconds"], **seconds["seconds"]}
    used = {**made.used, **{name: getattr(best, name) for name in asked}}
    return replace(made, measured={**made.measured, "seconds": spent, "tried": verdicts}, used=used)


def cost_of_trials(cost: Cost, options: Any, rows: int) -> Cost:
    """A cost with the trials of `worth_having` added.

    Args:
        cost: What one outcome by these options costs.
        options: The recipe's options.
        rows: Calibration rows, of which a quarter judges.
    """
    count = len(_asked(options))
    verdicts = (JUDGED * math.ceil(rows / 4),) * count
    return replace(cost, passes=(*cost.passes * (2 + count), *verdicts)) if count else cost


def _asked(options: Any) -> dict[str, Any]:
    """The parts that are asked for and must prove themselves, with the values of their options."""
    if not options.judge:
        return {}
    return {name: own for name, none in WITHOUT.items() if (own := getattr(options, name)) != none}
