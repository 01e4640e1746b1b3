"""Learned rounding that goes on from the codes of a finished outcome, block by block, and is taken only where it helps.

A quarter of the trajectories is held out. Blocks learn from the others towards the outputs of full precision, and each keeps
the best of several states on rows that it does not learn from. At the end `methods.judge` compares the guided outputs on the
held-out trajectories, and the start comes back unless they are better. So the result is never worse than its start there.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch

from difloat import distributed
from difloat.layers import install, packed
from difloat.layers.packed import QuantizedLayer
from difloat.methods.blockwise import learn_blocks
from difloat.methods.cost import Cost
from difloat.methods.judge import JUDGED, apart, judge
from difloat.methods.learned_rounding import RoundingSettings
from difloat.methods.post_training import Outcome, timed
from difloat.methods.task import Sequencing, Task
from difloat.methods.training.timestep_weights import loss_weights
from difloat.plan.coded import Coded, startable
from difloat.plan.options import FEW_BITS, NotNegative, Positive, Whole
from difloat.plan.plan import LayerPlan, Plan
from difloat.plan.validation import record

_OF_BLOCKS = 0.125  # of the rows that are learned from judge the states of a block
_CHECKS = 4  # states of a block that are judged


@record("settings of polish")
class PolishSettings:
    """How rounding is learned from codes. A recipe's options are these and its own.

    Attributes:
        polish: Updates per block of learned rounding that starts at the codes; 0: none. It is kept where held-out trajectories
            come out better.
        polish_minutes: Blocks that are not begun after so many minutes keep their codes, as after Ctrl-C; 0: no limit.
        polish_rate: The rate of the rounding variables.
        polish_rows: Calibration rows, of which most are learned from and a quarter judges.
        judge: Keep polish, and a recipe's other optional parts, only where the 95 % interval of what held-out trajectories gain
            from it lies above zero.
    """

    polish: Whole = 0
    polish_minutes: NotNegative = 0.0
    polish_rate: NotNegative = RoundingSettings.learning_rate
    polish_rows: Positive = Sequencing.rounding_rows
    judge: bool = False


def polished(
    task: Task,
    outcome: Outcome,
    settings: PolishSettings,
    guidance: float,
    factor_power: float,
) -> Outcome:
    """The outcome with learned codes, or itself if held-out trajectories do not come out better; what was tried is noted.

    Args:
        task: Model and data.
        outcome: Layers with codes. Those with factors, several weights or a low-rank pair stay as they are, and so do those
            with more than 4 bits in all rows.
        settings: How rounding is learned.
        guidance: The sampler's guidance scale.
        factor_power: Power of the sampler's factors that weighs timesteps. Without a sampler all weigh alike.

    Raises:
        ValueError: if the rows are of too few trajectories to hold some out.
    """
    if not settings.polish:
        return outcome
    return distributed.on_main(lambda: _learned(task, outcome, settings, guidance, factor_power))


def _learned(
    task: Task,
    outcome: Outcome,
    settings: PolishSettings,
    guidance: float,
    factor_power: float,
) -> Outcome:
    starts = {
        name: Coded(packed.weight_of(task.model, name).detach(), layer)
        for name, layer in outcome.layers.items()
        if startable(layer) and _narrow(layer)
    }
    learned_from, held = apart(task.calibration, task.seed)
    weights = loss_weights(task, factor_power if task.scheduler is not None else 0.0)
    rounding = RoundingSettings(
        iterations=settings.polish, learning_rate=settings.polish_rate, held_out=_OF_BLOCKS, checks=_CHECKS
    )
    sequencing = Sequencing(
        rounding=rounding,
        rounding_rows=settings.polish_rows,
        minutes=settings.polish_minutes or math.inf,
    )
    measured: dict[str, Any] = {
        **outcome.measured,
        "seconds": dict(outcome.measured["seconds"]),
        "blocks": {},
    }
    few = replace(task, calibration=task.calibration.some(learned_from))
    with timed(measured, "polish"):
        layers = dict(outcome.layers)
        generator = torch.Generator().manual_seed(task.seed)
        layers |= learn_blocks(
            few, _twin(task, outcome), starts, outcome.seen, sequencing, generator, measured
        )
    after = replace(outcome, layers=layers, measured=measured)
    with timed(measured, "judge"):
        verdict = judge(
            task, held, "polish", outcome, after, guidance=guidance, weights=weights, strict=settings.judge
        )
    measured["tried"] = [*outcome.measured.get("tried", []), verdict.report()]
    return after if verdict.kept else replace(after, layers=outcome.layers)


def polish_cost(cost: Cost, settings: PolishSettings) -> Cost:
    """A cost with polish and its judgement added."""
    if not settings.polish:
        return cost
    held = math.ceil(settings.polish_rows / 4)
    return replace(
        cost,
        iterations=settings.polish,
        rounding_rows=settings.polish_rows,
        passes=(*cost.passes, JUDGED * held),
    )


def _narrow(layer: LayerPlan) -> bool:
    specs = [part.weight for part in layer.parts] + [spec for band in layer.bands for spec in band.weights]
    return min(spec.format.bits for spec in specs) <= FEW_BITS


def _twin(task: Task, outcome: Outcome) -> torch.nn.Module:
    """The model with the layers of an outcome, which share nothing with it that learning changes."""
    plan = Plan("", str(task.bits), outcome.layers, attention=outcome.attention, timesteps=outcome.timesteps)
    twin = install.apply(install.shadow(task.model), plan)
    assert all(isinstance(twin.get_submodule(name), QuantizedLayer) for name in outcome.layers)
    return twin
