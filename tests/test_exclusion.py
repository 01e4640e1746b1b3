"""What the user excludes stays as it is, whatever the recipe; a pattern that means nothing is refused."""

from __future__ import annotations

import pytest

from difloat import api, recipes
from difloat.layers.exclude import EXCLUDED, excluded, matches
from test_contracts import FAST, prepared_pipeline

NAMES = ("blocks.1.to_q", "blocks.1.to_k", "blocks.10.to_q", "proj_out")


@pytest.mark.parametrize(
    ("pattern", "meant"),
    [
        ("proj_out", {"proj_out"}),
        ("blocks.1", {"blocks.1.to_q", "blocks.1.to_k"}),
        ("*.to_q", {"blocks.1.to_q", "blocks.10.to_q"}),
        ("blocks.1?.*", {"blocks.10.to_q"}),
        ("*", set(NAMES)),
    ],
)
def test_patterns_mean_layers_blocks_and_wildcards(pattern: str, meant: set[str]) -> None:
    assert excluded(NAMES, [pattern]) == meant == {name for name in NAMES if matches(name, pattern)}


def test_several_patterns_add_up_and_none_means_nothing() -> None:
    assert excluded(NAMES, ["proj_out", "*.to_k"]) == {"proj_out", "blocks.1.to_k"}
    assert excluded(NAMES, []) == set()
    with pytest.raises(ValueError, match="'block.1', which means none"):
        excluded(NAMES, ["proj_out", "block.1"])


@pytest.mark.parametrize("recipe", recipes.RECIPES)
def test_every_recipe_obeys(recipe: str) -> None:
    pipeline, _ = prepared_pipeline("pixart")
    known = recipes.RECIPES[recipe].options.__dataclass_fields__
    options = {name: value for name, value in FAST.items() if name in known}
    plan = api.plan(
        pipeline,
        recipe,
        "w4a8",
        prompts=["a cat", "a red house"],
        samples=24,
        steps=2,
        progress=False,
        exclude=["transformer_blocks.1", "proj_out"],
        **options,
    )
    assert not [name for name in plan.layers if name.startswith(("transformer_blocks.1.", "proj_out"))]
    assert plan.skipped["proj_out"] == EXCLUDED == plan.skipped["transformer_blocks.1.attn1.to_q"]
    assert [name for name in plan.layers if name.startswith("transformer_blocks.0.")]
    assert not [name for name in plan.attention if name.startswith("transformer_blocks.1.")]
    assert plan.options["exclude"] == ["transformer_blocks.1", "proj_out"]


def test_a_layer_that_is_none_is_refused_before_calibration() -> None:
    pipeline, _ = prepared_pipeline("pixart")
    with pytest.raises(ValueError, match="exclude must name layers or blocks of the model, got 'mid_block'"):
        api.plan(pipeline, "rtn", "w4a8", prompts=["a cat"], exclude=["mid_block"], progress=False)
