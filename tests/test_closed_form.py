"""Widths by layer and second-order rounding put together: bytes, inputs, models without guidance, what is refused."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from difloat import api, recipes
from difloat.calibration.collect import Calibration, CalibrationSettings, collect
from difloat.methods import allocation, layer_rounding
from difloat.plan import encode
from difloat.plan.plan import Plan
from difloat.plan.rules import Bits
from difloat.plan.validation import plain
from difloat.report import build
from difloat.report.record import record_from_json, record_to_json
from tiny import PROMPTS, tiny_pixart, tiny_unet

SIZES = {"height": 16, "width": 16}
PIPELINES = {
    "unet": (tiny_unet, SIZES),
    "pixart": (tiny_pixart, {**SIZES, "use_resolution_binning": False, "clean_caption": False}),
}


def calibrated(kind: str, guidance: float = 3.0) -> tuple[Any, Calibration]:
    build, call = PIPELINES[kind]
    pipeline = build()
    settings = CalibrationSettings(samples=32, steps=4, guidance_scale=guidance, prompts_per_batch=4)
    return pipeline, collect(pipeline, PROMPTS, settings, progress=False, call_kwargs=call)


def planned(pipeline: Any, data: Calibration, bits: str = "w4a8", **options: Any) -> Plan:
    task = api.task_of(pipeline, data, Bits.parse(bits))
    return recipes.plan(task, "auto", bits, options)


def nbytes(plan: Plan) -> int:
    return sum(layer.nbytes for layer in plan.layers.values())


@pytest.mark.parametrize(
    ("kind", "guidance"),
    [
        pytest.param("unet", 1.0, marks=pytest.mark.slow),
        ("pixart", 3.0),
        pytest.param("unet", 3.0, marks=pytest.mark.slow),
        pytest.param("pixart", 1.0, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("by", ["layers", "rows"])
def test_allocated_widths_take_the_bytes_of_one_width(kind: str, guidance: float, by: str) -> None:
    pipeline, data = calibrated(kind, guidance)
    same, chosen = (planned(pipeline, data, widths=widths, grid="integer") for widths in ("same", by))
    assert 0.995 * nbytes(same) <= nbytes(chosen) <= nbytes(same)
    widths = {name: layer.parts[0].weight.format.bits for name, layer in chosen.layers.items()}
    assert len(set(widths.values())) > 2 and (by == "rows" or chosen.measured["widths"]["optimal"])
    assert any(layer.bands for layer in chosen.layers.values()) == (by == "rows")
    for name, layer in same.layers.items():
        assert [p.activation for p in layer.parts] == [p.activation for p in chosen.layers[name].parts]
        fixed = layer.parts[0].weight.format.bits == 8
        assert layer.parts[0].weight.format.bits in (4, 8) and (not fixed or widths[name] == 8)
    report = chosen.measured["closed_form"]["layers"]
    assert set(report) == set(chosen.layers) and all(one["error"] <= 1 + 1e-5 for one in report.values())


@pytest.mark.slow
@pytest.mark.parametrize("bits", ["w3a16", "w2a4", "w8a8"])
def test_other_widths(bits: str) -> None:
    pipeline, data = calibrated("unet")
    chosen, same = (planned(pipeline, data, bits, widths=of, grid="integer") for of in ("rows", "same"))
    assert nbytes(chosen) <= nbytes(same)
    inputs = {p.activation for layer in chosen.layers.values() for p in layer.parts}
    assert (inputs == {None}) == (bits == "w3a16")


def test_groups_and_the_same_result_twice() -> None:
    pipeline, data = calibrated("pixart")
    one, two = (planned(pipeline, data, widths="same", group_size=16) for _ in range(2))
    assert {layer.parts[0].weight.group_size for layer in one.layers.values()} == {16}
    for name, layer in one.layers.items():
        assert all(
            torch.equal(tensor, two.layers[name].tensors[key]) for key, tensor in layer.tensors.items()
        )


class Plain(nn.Module):
    """Nothing of diffusers: a perceptron in blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(8, 32), nn.Linear(32, 8)
        self.blocks = nn.ModuleList(nn.Linear(32, 32) for _ in range(3))

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        x = self.enter(sample)
        for block in self.blocks:
            x = x + block(x.relu())
        return self.leave(x)


def test_a_plain_module_without_sampler_and_guidance() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Plain()
    draw = torch.Generator().manual_seed(0)

    def loop(module: nn.Module) -> None:
        for step in range(8):
            module(torch.randn(8, 8, generator=draw), torch.full((8,), step))

    plans = {
        widths: api.plan(
            model,
            "auto",
            "w4a8",
            forward_loop=loop,
            samples=64,
            progress=False,
            widths=widths,
            grid="integer",
        )
        for widths in ("same", "layers")
    }
    assert 0.9 * nbytes(plans["same"]) <= nbytes(plans["layers"]) <= nbytes(plans["same"])
    error = {}
    nearest = api.plan(model, "rtn", "w4a8", grid="int", progress=False)
    x = torch.relu(model.enter(torch.randn(500, 8, generator=draw))).detach()
    for label, found in (("auto", plans["same"]), ("nearest", nearest)):
        change = encode.dequantize(found.layers["blocks.0"]) - model.blocks[0].weight.detach()
        error[label] = float((x @ change.T).square().sum())
    assert set(plans["layers"].layers) == {"enter", "leave", "blocks.0", "blocks.1", "blocks.2"}
    assert error["auto"] < 0.8 * error["nearest"]


def test_averages_and_sizes_are_met_from_below() -> None:
    pipeline, data = calibrated("pixart")
    low, between, high = (nbytes(planned(pipeline, data, bits)) for bits in ("w3a8", "w3.5a8", "w4a8"))
    assert abs(between - (low + high) / 2) < 0.005 * between
    float_bytes = sum(t.nbytes for t in api.denoiser(pipeline).state_dict().values())
    weights = 4 * sum(
        math.prod(layer.shape) for layer in planned(pipeline, data, widths="same").layers.values()
    )
    asked = float_bytes - weights + between
    sized = nbytes(planned(pipeline, data, size=f"{asked}B"))
    assert 0.995 * between <= sized <= between
    with pytest.raises(ValueError, match=r"size must be at least \d+ bytes for this model, got 1000"):
        planned(pipeline, data, size="1000B")


def test_rows_that_matter_most_get_most_bits() -> None:
    pipeline, data = calibrated("pixart")
    plan = planned(pipeline, data)
    mixed = {name: layer for name, layer in plan.layers.items() if layer.bands}
    for name, layer in mixed.items():
        bits = [band.weights[0].format.bits for band in layer.bands]
        assert bits == sorted(bits, reverse=True) and all(band.rows % 16 == 0 for band in layer.bands[:-1])
        report = plan.measured["widths"]["formats"][name]
        assert report == "/".join(band.weights[0].format.name for band in layer.bands)
    assert mixed
    record = build.build(api.denoiser(pipeline), plan, name="tiny")
    assert {share.layer for share in record.shares} == set(plan.measured["widths"]["formats"])
    for share in record.shares:
        assert share.bits == 8 * plan.layers[share.layer].nbytes / share.weights
        assert [bits for bits, _ in share.errors] == sorted(bits for bits, _ in share.errors)
    assert record_from_json(record_to_json(record)).shares == record.shares


def test_a_killed_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline, data = calibrated("pixart")
    task = api.task_of(pipeline, data, Bits.parse("w4a8"))
    whole = recipes.plan(task, "auto", "w4a8", {})
    rounded: list[str] = []
    second = layer_rounding.round_together

    def killed(*arguments: Any) -> Any:
        rounded.append("once")
        if len(rounded) == 10:
            raise KeyboardInterrupt
        return second(*arguments)

    kept = replace(task, work_dir=tmp_path)
    monkeypatch.setattr(layer_rounding, "round_together", killed)
    with pytest.raises(KeyboardInterrupt):
        recipes.plan(kept, "auto", "w4a8", {})
    before = len(rounded)
    monkeypatch.setattr(allocation, "round_second_order", None)  # what was looked at is not looked at again
    monkeypatch.setattr(allocation, "sensitivities", None)
    resumed = recipes.plan(kept, "auto", "w4a8", {})
    assert len(rounded) - before < len(whole.layers) - 5
    for name, layer in whole.layers.items():
        other = resumed.layers[name]
        assert plain(layer) == plain(other)
        assert all(torch.equal(tensor, other.tensors[key]) for key, tensor in layer.tensors.items())
    assert whole.measured["closed_form"] == resumed.measured["closed_form"]


def test_what_another_model_kept_is_not_taken(tmp_path: Path) -> None:
    """The loop draws the same rows whatever the model gives, and a block's own weight stays what it was."""
    plans = []
    for change in (0.0, 1.0):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = Plain()
        model.enter.weight.data[:, 0] += change
        draw = torch.Generator().manual_seed(0)

        def loop(module: nn.Module, draw: torch.Generator = draw) -> None:
            for step in range(8):
                module(torch.randn(8, 8, generator=draw), torch.full((8,), step))

        data = api.calibrate(model, forward_loop=loop, samples=64, progress=False)
        task = replace(api.task_of(model, data, Bits.parse("w4a8")), progress=False)
        kept = recipes.plan(replace(task, work_dir=tmp_path), "auto", "w4a8", {"widths": "same"})
        fresh = recipes.plan(task, "auto", "w4a8", {"widths": "same"})
        assert kept.measured["closed_form"] == fresh.measured["closed_form"]
        plans.append(kept)
    errors = [plan.measured["closed_form"]["layers"]["blocks.0"]["error"] for plan in plans]
    assert errors[0] != errors[1]


def test_what_cannot_be_is_refused() -> None:
    pipeline, data = calibrated("unet")
    with pytest.raises(ValueError, match="weight bits must be a whole number"):
        planned(pipeline, data, "w3.5a8", widths="same")
    for options in ({"guidance": 2.0}, {"factor_power": 1.0}):
        with pytest.raises(ValueError, match="must come with widths=rows or layers"):
            planned(pipeline, data, widths="same", **options)
    with pytest.raises(ValueError, match="rows must be a whole number of at least 1"):
        planned(pipeline, data, rows=0)
