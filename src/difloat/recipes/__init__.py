"""Recipes, one page per paper. Each turns a `Task` into an `Outcome`, and `plan` wraps it for users."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from difloat import torch_modes
from difloat.layers import quantizable
from difloat.methods.cost import Cost
from difloat.methods.post_training import Bits, Outcome, Task
from difloat.methods.sparsity import mostly_zero
from difloat.plan import options
from difloat.plan.plan import Plan
from difloat.recipes import (
    auto,
    efficientdm,
    fp4dit,
    gptq,
    guided,
    hsvd,
    integer_transformers,
    lbfp,
    mpqdm,
    msfp,
    orbitquant,
    qdiffusion,
    rtn,
    svdquant,
)


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A row: the function, its options, a line for people who choose, its cost, whether it needs data, takes w3.5."""

    plan: Callable[[Task, Any], Outcome]
    options: type[Any]
    summary: str
    cost: Callable[[Any, Bits], Cost]
    needs_data: Callable[[Any, Bits], bool] = lambda options, bits: True
    averages: bool = False
    trajectories: int | None = None  # of calibration, of small models


# To add one: a file here, a row, a page in docs/papers (see CONTRIBUTING.md). All contract tests then run on it.
RECIPES: dict[str, Recipe] = {
    "lbfp": Recipe(lbfp.plan, lbfp.Options, lbfp.SUMMARY, lbfp.cost),
    "fp4dit": Recipe(fp4dit.plan, fp4dit.Options, fp4dit.SUMMARY, fp4dit.cost),
    "msfp": Recipe(
        msfp.plan,
        msfp.Options,
        "4-bit weights and activations: mixup-sign formats, adapters by timestep, fine-tuned (arXiv:2505.21591)",
        msfp.cost,
    ),
    "mpqdm": Recipe(mpqdm.plan, mpqdm.Options, mpqdm.SUMMARY, mpqdm.cost),
    "guided": Recipe(guided.plan, guided.Options, guided.SUMMARY, guided.cost),
    "efficientdm": Recipe(efficientdm.plan, efficientdm.Options, efficientdm.SUMMARY, efficientdm.cost),
    "qdiffusion": Recipe(qdiffusion.plan, qdiffusion.Options, qdiffusion.SUMMARY, qdiffusion.cost),
    "viditq": Recipe(
        integer_transformers.viditq,
        integer_transformers.ViDiTQOptions,
        "integers, online activations per token, smoothing by timestep (arXiv:2406.02540)",
        integer_transformers.viditq_cost,
    ),
    "qdit": Recipe(
        integer_transformers.qdit,
        integer_transformers.QDiTOptions,
        "integers in groups, online activations per token and group (arXiv:2406.17343)",
        integer_transformers.qdit_cost,
    ),
    "auto": Recipe(auto.plan, auto.Options, auto.SUMMARY, auto.cost, averages=True, trajectories=64),
    "gptq": Recipe(gptq.plan, gptq.Options, gptq.SUMMARY, gptq.cost),
    "orbitquant": Recipe(
        orbitquant.plan, orbitquant.Options, orbitquant.SUMMARY, orbitquant.cost, orbitquant.needs_data
    ),
    "svdquant": Recipe(svdquant.plan, svdquant.Options, svdquant.SUMMARY, svdquant.cost),
    "hsvd": Recipe(hsvd.plan, hsvd.Options, hsvd.SUMMARY, hsvd.cost),
    "rtn": Recipe(rtn.rtn, rtn.NearestOptions, rtn.SUMMARY, rtn.cost, rtn.needs_data),
}

UNTOLD = ("auto", "mpqdm", "viditq", "qdit")  # do not take `Task.layer_bits`


def lookup(name: str) -> Recipe:
    """The recipe called `name`. ValueError that lists the known ones if there is none."""
    if name not in RECIPES:
        raise ValueError(f"recipe must be one of {', '.join(RECIPES)}, got {name!r}")
    return RECIPES[name]


def make_options(recipe: Recipe, values: Mapping[str, Any], bits: str) -> Any:
    """Options of a recipe from user values. ValueError as from `options.make_options` and `options.checked`."""
    return options.checked(options.make_options(recipe.options, values), Bits.parse(bits), recipe.averages)


def plan(task: Task, recipe: str, bits: str, chosen: Mapping[str, Any]) -> Plan:
    """`decide` for a task that nothing was checked of: its weights are looked at, and options made of what a user chose."""
    quantizable.check_weights(task.model)
    return decide(task, recipe, make_options(lookup(recipe), chosen, bits))


@torch_modes.plain()
def decide(task: Task, recipe: str, settings: Any) -> Plan:
    """Decide everything about the task's model, with the recipe's options as made. The model stays untouched."""
    outcome = lookup(recipe).plan(task, settings)
    said = {"seed": task.seed, "calibration_rows": len(task.calibration)}
    stored = {**dataclasses.asdict(settings), **outcome.used, **said}
    stored |= {"target": task.target} if task.target != "any" else {}
    stored |= {"layer_bits": "of another plan"} if task.layer_bits else {}
    stored |= {"exclude": list(task.exclude.patterns)} if task.exclude.patterns else {}
    skipped = {**outcome.skipped, **quantizable.staying_float(task.model)}
    measured = {**outcome.measured, "mostly_zero": mostly_zero(task.model, outcome.layers)}
    decided = recipe, str(task.bits), outcome.layers, skipped, stored, measured
    return Plan(*decided, outcome.attention, outcome.timesteps)
