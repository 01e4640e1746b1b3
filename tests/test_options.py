"""No option is ignored without a word: nonsense is refused at all widths, and so is what would change nothing."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, get_type_hints

import pytest
import torch

from difloat import recipes
from difloat.calibration.collect import Calibration, CalibrationSettings, collect
from difloat.methods.task import Task
from difloat.plan.rules import Bits
from difloat.recipes import RECIPES
from tiny import PROMPTS, tiny_pixart

WIDTHS = [f"w{weight}a{activation}" for weight in (2, 4, 8) for activation in (4, 8, 16)]
NONSENSE: dict[Any, list[Any]] = {
    int: ["many", -1, 1.5, None, [3]],
    float: ["much", -0.5, float("nan"), float("inf"), None],
    bool: ["maybe"],
    str: ["banana", "e9m9", "e2", ""],
    tuple: [3, "no_such_layer", ["first", "nowhere"]],
}


@functools.cache
def calibrated() -> tuple[Any, Calibration]:
    pipeline = tiny_pixart()
    settings = CalibrationSettings(samples=6, steps=3, prompts_per_batch=2)
    return pipeline, collect(pipeline, PROMPTS, settings, progress=False)


def task_of(bits: str) -> Task:
    pipeline, data = calibrated()
    return Task(pipeline.transformer, data, Bits.parse(bits), progress=False, scheduler=data.scheduler)


def nonsense(recipe: str) -> list[tuple[str, Any]]:
    options = RECIPES[recipe].options
    found = []
    for name, hint in get_type_hints(options).items():
        kind = tuple if str(hint).startswith("tuple") else int if "ByteSize" in str(hint) else hint
        values = ["banana", 7.5, ""] if "Literal" in str(hint) else NONSENSE[kind]
        field = options.__dataclass_fields__[name]
        found += [(name, value) for value in values if value != field.default]
    return found


@pytest.mark.parametrize("recipe", RECIPES)
def test_nonsense_is_refused_at_all_widths(recipe: str) -> None:
    """Most before any work; names of layers and modules as soon as the model has been traced."""
    for bits in WIDTHS:
        for name, value in nonsense(recipe):
            with pytest.raises(ValueError, match=r"\w") as refused:
                recipes.make_options(RECIPES[recipe], {name: value}, bits)
                if name in (
                    "keep_8bit",
                    "features",
                ):  # any bits, they are not looked at: three of nine are enough
                    if bits not in ("w2a16", "w4a4", "w8a8"):
                        raise ValueError("left out")
                    recipes.plan(task_of(bits), recipe, bits, {name: value})
            assert "Traceback" not in str(refused.value), (name, value, bits)


def other_value(options: type[Any], name: str) -> Any:
    """A sensible value that is not the default."""
    default, hint = options.__dataclass_fields__[name].default, get_type_hints(options)[name]
    known = {
        "weight_format": "e2m1",
        "before_gelu": "e3m0",
        "keep_8bit": ("last",),
        "size": "1GB",
        "features": "transformer_blocks.1",
    }
    if name in known:
        return known[name]
    if "Literal" in str(hint):
        return next(value for value in hint.__args__ if value != default)
    return (not default) if hint is bool else 2 * default if default else 2


CASES = [(recipe, field.name) for recipe, row in RECIPES.items() for field in dataclasses.fields(row.options)]
# What is kept from doing anything by the bits, by the name of the option: at no other width is it refused.
NEEDS_FEW_BITS = {"iterations", "rounding_rows", "learning_rate", "scale_aware", "inputs"}
NEEDS_INPUTS = {"range_rate", "activation", "activation_format", "search"}


@pytest.mark.parametrize("bits", WIDTHS)
def test_what_would_change_nothing_is_refused(bits: str) -> None:
    widths = Bits.parse(bits)
    for recipe, name in CASES:
        options = RECIPES[recipe].options
        value = other_value(options, name)
        expected = (
            (name in NEEDS_FEW_BITS and widths.weight > 4)
            or (name in NEEDS_INPUTS and widths.activation is None)
            or (name == "rounding" and value == "learned" and widths.weight > 4)
            or (name == "precision" and recipe == "fp4dit" and widths.weight > 4)
            or (name == "ranges_by_timestep" and value is True and widths.activation is None)
            or (name in ("weight_format", "before_gelu") and value in ("e2m1", "e3m0") and widths.weight != 4)
            or (name in ("plus", "criterion", "candidates") and widths.weight == 8)
            or (name == "router_rate" and recipe != "msfp")
            or name.startswith("polish_")
            or name == "judge"
            or (name == "group_size" and recipe in ("rtn", "qdiffusion"))
        )
        try:
            recipes.make_options(RECIPES[recipe], {name: value}, bits)
        except ValueError as error:
            assert expected and name in str(error), (recipe, name, value, str(error))
        else:
            assert not expected, (recipe, name, value)


@pytest.mark.parametrize(
    ("recipe", "options", "message"),
    [
        ("rtn", {"group_size": 16}, "group_size must come with weight_granularity=group"),
        ("viditq", {"smoothing": 0.5, "stretches": 0}, "smoothing must come with at least one stretch"),
        ("msfp", {"factor_power": 2, "dfa": False}, "factor_power must come with dfa=true"),
        ("msfp", {"allocation": "random", "adapters": 1}, "allocation must come with several adapters"),
        ("mpqdm", {"plus": True, "mixed": False}, "plus must come with rows of several widths"),
        ("guided", {"router_rate": 0.5}, "router_rate must come with a router"),
        (
            "fp4dit",
            {"weight_format": "nonsense"},
            "weight_format must be paper or search, or a format, got 'nonsense'",
        ),
        (
            "fp4dit",
            {"before_gelu": "nonsense"},
            "before_gelu must be paper or same, or a format, got 'nonsense'",
        ),
        ("fp4dit", {"before_gelu": "ue2m2"}, "before_gelu must be a signed format, got ue2m2"),
        ("fp4dit", {"weight_format": "e4m3"}, "weight_format must have the 4 bits asked for, got e4m3"),
    ],
)
def test_the_sentence_says_what_is_missing(recipe: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        recipes.make_options(RECIPES[recipe], options, "w4a4")


@pytest.mark.parametrize(
    ("bits", "options", "inside", "before_gelu"),
    [
        ("w6a8", {}, {"e2m3"}, {"e2m3"}),
        ("w6a8", {"weight_format": "e3m2"}, {"e3m2"}, {"e3m2"}),
        ("w6a8", {"weight_format": "e3m2", "before_gelu": "e4m1"}, {"e3m2"}, {"e4m1"}),
        ("w8a8", {"weight_format": "int8", "before_gelu": "same"}, {"int8"}, {"int8"}),
        ("w3a8", {"before_gelu": "e2m0"}, {"e1m1", "e2m0"}, {"e2m0"}),
        ("w4a8", {"weight_format": "e1m2"}, {"e1m2"}, {"e3m0"}),
    ],
)
def test_fp4dits_formats_are_applied_at_every_width(
    bits: str, options: dict[str, Any], inside: set[str], before_gelu: set[str]
) -> None:
    plan = recipes.plan(task_of(bits), "fp4dit", bits, {"rounding": "nearest", "outside": "8bit", **options})
    formats = {name: layer.parts[0].weight.format.name for name, layer in plan.layers.items()}
    blocks = {name: one for name, one in formats.items() if name.startswith("transformer_blocks")}
    gelu = {name for name in blocks if name.endswith("ff.net.0.proj")}
    assert {blocks[name] for name in gelu} == before_gelu
    assert {one for name, one in blocks.items() if name not in gelu} <= inside
    assert {one for name, one in formats.items() if name not in blocks} == {"e3m4"}


def test_a_search_at_six_bits_tries_all_formats_of_six_bits() -> None:
    plan = recipes.plan(
        task_of("w6a8"),
        "fp4dit",
        "w6a8",
        {"rounding": "nearest", "weight_format": "search", "group_size": 16},
    )
    assert {layer.parts[0].weight.format.bits for layer in plan.layers.values()} == {6}
    fixed = recipes.plan(task_of("w6a8"), "fp4dit", "w6a8", {"rounding": "nearest", "group_size": 16})
    assert any(
        not torch.equal(layer.tensors["weight"], fixed.layers[name].tensors["weight"])
        for name, layer in plan.layers.items()
    )
