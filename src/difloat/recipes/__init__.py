"""Recipes: one page per paper. Each turns a `Task` into an `Outcome`; `plan` wraps it for users.

To add one: a file here, a row in `RECIPES`, a page in docs/papers (see CONTRIBUTING.md). All contract tests then run on it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, get_type_hints

from difloat.methods.posttraining import Outcome, Task
from difloat.quantizer import Plan
from difloat.recipes import baselines, lbfp


@dataclass(frozen=True)
class Recipe:
    """A row of the table: the function, its options, and one line for people who choose."""

    plan: Callable[[Task, Any], Outcome]
    options: type[Any]
    summary: str


RECIPES: dict[str, Recipe] = {
    "lbfp": Recipe(
        lbfp.plan,
        lbfp.Options,
        "floating point, encoding searched per tensor, learned rounding (arXiv:2408.06995)",
    ),
    "qdiffusion": Recipe(
        baselines.qdiffusion,
        baselines.QDiffusionOptions,
        "integers, AdaRound block by block (arXiv:2302.04304)",
    ),
    "rtn": Recipe(
        baselines.rtn, baselines.NearestOptions, "rounding to nearest, floating point or integer, no learning"
    ),
}


def lookup(name: str) -> Recipe:
    """The recipe called `name`; ValueError that lists the known ones otherwise."""
    if name not in RECIPES:
        raise ValueError(f"recipe must be one of {', '.join(RECIPES)}, got {name!r}")
    return RECIPES[name]


def make_options(recipe: Recipe, values: Mapping[str, Any]) -> Any:
    """Options of a recipe from user values; strings are converted to the field's type.

    Raises:
        ValueError: on an unknown option, or a value that is not of the option's type or choices.
    """
    fields = {field.name for field in dataclasses.fields(recipe.options)}
    unknown = sorted(set(values) - fields)
    if unknown:
        raise ValueError(f"options must be among {', '.join(sorted(fields))}, got {', '.join(unknown)}")
    hints = get_type_hints(recipe.options)
    return recipe.options(**{name: _converted(name, value, hints[name]) for name, value in values.items()})


def _converted(name: str, value: Any, hint: Any) -> Any:
    choices = getattr(hint, "__args__", ()) if "Literal" in str(hint) else ()
    if choices:
        if value not in choices:
            raise ValueError(f"option {name} must be one of {', '.join(map(str, choices))}, got {value!r}")
        return value
    if str(hint).startswith("tuple"):
        items = [item.strip() for item in value.split(",")] if isinstance(value, str) else list(value)
        return tuple(item for item in items if item)
    if hint is bool and isinstance(value, str):
        words = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
        if value.lower() not in words:
            raise ValueError(f"option {name} must be true or false, got {value!r}")
        return words[value.lower()]
    try:
        converted = hint(value)
    except (TypeError, ValueError):
        raise ValueError(f"option {name} must be a {hint.__name__}, got {value!r}") from None
    if hint in (int, float) and converted < 0:
        raise ValueError(f"option {name} must not be negative, got {value!r}")
    return converted


def plan(task: Task, recipe: str, bits: str, options: Mapping[str, Any]) -> Plan:
    """Decide everything about the task's model; the model stays untouched."""
    row = lookup(recipe)
    chosen = make_options(row, options)
    outcome = row.plan(task, chosen)
    stored = {**dataclasses.asdict(chosen), "seed": task.seed, "calibration_rows": len(task.calibration)}
    if task.target != "any":
        stored["target"] = task.target
    return Plan(recipe, bits, outcome.layers, outcome.skipped, stored, outcome.measured)
