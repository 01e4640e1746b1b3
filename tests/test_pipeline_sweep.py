"""The table of families, docs/families.md: complete, and what it says of every pipeline class of diffusers."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline_sweep import WORKS, classes, outcome, rows

PAGE = Path(__file__).parents[1] / "docs" / "families.md"
# One of every kind of input beside text; the others are run with `-m slow`.
QUICK = (
    "StableDiffusionInpaintPipeline",
    "StableDiffusionControlNetPipeline",
    "StableDiffusionXLImg2ImgPipeline",
    "StableDiffusion3InpaintPipeline",
    "FluxImg2ImgPipeline",
    "PixArtSigmaPAGPipeline",
)
# What diffusers deprecates, and what it says of pictures of another kind, is not what is tested here.
pytestmark = [
    pytest.mark.filterwarnings(f"ignore::{kind}")
    for kind in ("FutureWarning", "UserWarning", "DeprecationWarning")
]


def test_the_table_has_every_pipeline_class() -> None:
    table = rows(PAGE)
    assert table.keys() >= classes().keys()
    assert {name for name in QUICK} <= {name for name, result in table.items() if result == WORKS}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name not in QUICK)) for name in sorted(classes())]
)
def test_the_table_says_what_happens(name: str) -> None:
    expected, found = rows(PAGE)[name], outcome(classes()[name])
    assert (found == WORKS) == (expected == WORKS), found
    assert WORKS in (expected, found) or found.partition(":")[0] == expected.partition(":")[0]
