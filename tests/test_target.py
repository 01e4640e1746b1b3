"""``--target cpu``: only formats whose products are int8 remain, at the same width."""

from __future__ import annotations

import pytest

from difloat import job, recipes
from difloat.calibration.collect import CalibrationSettings, collect, denoiser_of
from difloat.methods.post_training import Bits, Task
from difloat.numbers.formats import candidates, parse
from difloat.numbers.integer_grids import grid_of
from difloat.plan.rules import Rule
from difloat.plan.target import restrict
from difloat.recipes.lbfp import encodings
from tiny import tiny_pixart


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("signed", [True, False])
def test_what_remains_is_exact_and_of_the_same_width(bits, signed) -> None:
    rule = Rule(candidates(bits, signed))
    kept = restrict(rule, "cpu").formats
    assert kept == tuple(f for f in rule.formats if grid_of(f) is not None)
    assert kept and {f.bits for f in kept} == {bits}
    assert restrict(rule, "any") is rule


def test_what_fits_nowhere_gives_way() -> None:
    assert [f.name for f in restrict(Rule((parse("e4m3"),)), "cpu").formats] == ["e1m6"]
    assert [f.name for f in restrict(Rule((parse("ue4m4"),)), "cpu").formats] == ["ue1m7"]
    assert {f.name for f in restrict(Rule(encodings(6)), "cpu").formats} == {"e2m3", "e1m4"}


def test_unknown_target_is_one_sentence() -> None:
    words = "target must be one of any, cpu, comfy, gguf, openvino, vllm, diffusers, got 'tpu'"
    with pytest.raises(ValueError, match=words):
        job.request("rtn", "w4a8", {}, target="tpu")


@pytest.mark.parametrize("recipe", ["lbfp", "rtn"])
def test_a_recipe_obeys(recipe) -> None:
    pipeline = tiny_pixart()
    model = denoiser_of(pipeline)[1]
    settings = CalibrationSettings(samples=4, steps=2, prompts_per_batch=2)
    data = collect(pipeline, ["a cat", "a red house"], settings, progress=False)
    task = Task(model, data, Bits.parse("w6a8"), progress=False, target="cpu")
    options = {"rounding": "nearest"} if recipe == "lbfp" else {}
    plan = recipes.plan(task, recipe, "w6a8", options)
    specs = [s for layer in plan.layers.values() for p in layer.parts for s in (p.weight, p.activation)]
    assert specs and all(grid_of(spec.format) is not None for spec in specs)
    assert plan.options["target"] == "cpu"
