"""Recipes with one width take the weight bits of another plan's layers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import difloat
from difloat import api, job, recipes
from difloat.cli import app
from difloat.estimate import forecast
from difloat.layers import install
from difloat.plan.plan import Plan
from tiny import PROMPTS, tiny_pixart

# diffusers' DPM solver hands torch tensors to numpy in a way numpy 2 deprecates; nothing here can change that.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

FAST = {
    "lbfp": {"iterations": 2},
    "fp4dit": {"iterations": 2},
    "msfp": {"adapters": 0},
    "guided": {"rounding": "nearest", "epochs": 0},
    "efficientdm": {"rounding": "nearest", "epochs": 0},
    "qdiffusion": {"iterations": 2},
    "gptq": {"rows": 8},
    "orbitquant": {},
    "svdquant": {"rows": 8},
    "hsvd": {"rows": 8},
    "rtn": {},
}
SAMPLED = {"samples": 8, "steps": 2, "prompts": PROMPTS, "progress": False}


@pytest.fixture(scope="module")
def chosen() -> Plan:
    """What auto chooses by layer for a tiny transformer."""
    return api.plan(tiny_pixart(), "auto", "w4a8", widths="layers", **SAMPLED)


def widths(plan: Plan) -> dict[str, int]:
    """Weight bits by layer."""
    return {name: layer.parts[0].weight.format.bits for name, layer in plan.layers.items()}


@pytest.mark.parametrize("recipe", FAST)
def test_a_recipe_takes_the_widths_that_auto_chose(recipe: str, chosen: Plan) -> None:
    """All that the recipe does not keep at 8 bits has the width of the other plan, and there are several."""
    plan = api.plan(tiny_pixart(), recipe, "w4a8", bits_from=chosen, **FAST[recipe], **SAMPLED)
    # Without data rtn reads edges off the structure, where all outside of the blocks is one.
    inner = {name: bits for name, bits in widths(plan).items() if name.startswith("transformer_blocks.")}
    assert inner == {name: widths(chosen)[name] for name in inner}
    assert len(set(inner.values())) > 1
    assert plan.options["layer_bits"] == "of another plan"


def test_the_same_from_the_files_of_a_checkpoint(chosen: Plan, tmp_path: Path) -> None:
    """Of a pipeline's directory or of its denoiser's, on the command line and in Python, and the forecast counts its bytes."""
    source, pipeline = tmp_path / "source", tiny_pixart()
    pipeline.save_pretrained(source)
    difloat.save(difloat.apply(tiny_pixart(), chosen), tmp_path / "auto")
    asked = job.request("rtn", "w4a8", {}, bits_from=tmp_path / "auto")
    assert asked.bits_from == {"": widths(chosen)}
    assert job.request("rtn", "w4a8", {}, bits_from=tmp_path / "auto" / "transformer") == asked
    command = ["quantize", str(source), str(tmp_path / "out"), "--recipe", "rtn", "--images", "0"]
    result = CliRunner().invoke(app, [*command, "--bits-from", str(tmp_path / "auto")])
    assert result.exit_code == 0, result.output
    again = api.plan_of(difloat.load(tmp_path / "out"))
    assert widths(again) == widths(api.plan(pipeline, "rtn", "w4a8", bits_from=chosen, progress=False))
    denoiser = install.apply(install.shadow(pipeline.transformer), again)
    packed = sum(tensor.nbytes for tensor in denoiser.state_dict().values())
    assert forecast(job.fit(pipeline, asked), None).packed_bytes == packed


def test_from_disk_the_same(chosen: Plan, tmp_path: Path) -> None:
    """Block by block from files to files the layers get the same codes."""
    source = tmp_path / "source"
    tiny_pixart().save_pretrained(source)
    difloat.save(difloat.apply(tiny_pixart(), chosen), tmp_path / "auto")
    common = [
        "quantize",
        str(source),
        "--recipe",
        "rtn",
        "--images",
        "0",
        "--bits-from",
        str(tmp_path / "auto"),
    ]
    for out, more in (("memory", []), ("disk", ["--offload", "disk"])):
        command = [*common[:2], str(tmp_path / out), *common[2:], *more]
        if more:
            command = [word for word in command if word not in ("--images", "0")]
        result = CliRunner().invoke(app, command)
        assert result.exit_code == 0, result.output
    one, two = (api.plan_of(difloat.load(tmp_path / out)) for out in ("memory", "disk"))
    assert widths(one) == widths(two)
    assert all(
        torch.equal(one.layers[n].tensors["weight"], two.layers[n].tensors["weight"]) for n in one.layers
    )


def test_what_does_not_fit_is_refused(chosen: Plan, tmp_path: Path) -> None:
    """Recipes that choose widths, rows of several widths, another model, a named format, and no checkpoint."""
    with pytest.raises(ValueError, match="bits_from must come with a recipe that is told the bits of layers"):
        job.request("auto", "w4a8", {}, bits_from=chosen)
    with pytest.raises(ValueError, match="weight_format must be left open with bits_from"):
        job.request("rtn", "w4a8", {"weight_format": "e2m1"}, bits_from=chosen)
    other = replace(chosen, layers={"nowhere": next(iter(chosen.layers.values()))})
    with pytest.raises(
        ValueError, match="bits_from must be a plan of this model, got one with a layer 'nowhere'"
    ):
        api.plan(tiny_pixart(), "rtn", "w4a8", bits_from=other, progress=False)
    rows = api.plan(tiny_pixart(), "mpqdm", "w4a8", epochs=0, **SAMPLED)
    with pytest.raises(ValueError, match="bits_from must be a plan with one width per layer, got"):
        job.request("rtn", "w4a8", {}, bits_from=rows)
    with pytest.raises(FileNotFoundError, match="must be in the checkpoint directory"):
        job.request("rtn", "w4a8", {}, bits_from=tmp_path)
    assert set(FAST) == recipes.RECIPES.keys() - set(recipes.UNTOLD)
