"""Fine-tuning of quantized checkpoints: what is taken, where it starts, what stays as it is, what is refused."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import difloat
from difloat import api, cli, run
from difloat.calibration import collect as calibration
from difloat.checkpoint import data_free
from difloat.layers import install
from difloat.layers.packed import QuantizedLayer
from difloat.methods.training import fine_tune
from difloat.methods.training.student import Student
from difloat.methods.training.twin_layer import Adaptive
from difloat.numbers.formats import parse
from difloat.plan.encode import plan_layer
from difloat.plan.plan import LayerPlan, Plan
from difloat.plan.specs import Part, QuantSpec
from difloat.plan.validation import plain
from difloat.report import build
from mixed_rows import in_bands
from test_finetune import Denoiser, by_timestep, prepared, sample_with, student_of
from tiny import tiny_pixart

# diffusers' DPM solver hands torch tensors to numpy in a way numpy 2 deprecates; nothing here can change that.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

GRID = (100.0, 500.0, 900.0)  # what `sample_with` calls the denoiser at
QUICK = {"rank": 2, "dfa": False, "samples": 24, "progress": False, "forward_loop": sample_with}
FACTORS = {"time": torch.tensor([2.0, 0.7, 1.0, 1.5])}


def by_time(layer: LayerPlan, sizes: Sequence[float], schedule: Sequence[int]) -> LayerPlan:
    """The layer with input ranges of several sizes, chosen by timestep."""
    ranges = {
        name: torch.cat([size * layer.tensors[name] for size in sizes])
        for name in ("input_scale", "input_zero_point")
        if name in layer.tensors
    }
    return replace(layer, tensors={**layer.tensors, **ranges}, input_schedule=tuple(schedule))


def banded(model: nn.Module, plans: dict[str, LayerPlan]) -> dict[str, LayerPlan]:
    """Two layers in rows of several widths, one of them smoothed."""
    conv = in_bands(model.conv_in.weight, plans["conv_in"].parts, ["uint1", "uint2", "e2m0"])
    time = in_bands(model.time.weight, plans["time"].parts, ["e2m1", "uint1"], FACTORS["time"])
    return {**plans, "conv_in": conv, "time": time}


def error_of(model: nn.Module, plan: Plan, calls: Sequence[tuple[float, Any]]) -> float:
    """Mean squared error of the model's output under a plan, all timesteps together."""
    quantized = install.apply(install.shadow(model), plan)
    with torch.no_grad():
        return sum(
            float((quantized(*args, **kw) - model(*args, **kw)).square().mean()) for _, (args, kw) in calls
        )


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[Student]:
    """Students as training would find them; they are not trained."""
    found: list[Student] = []

    def train(task: Any, student: Student, *more: Any) -> list[float]:
        found.append(student)
        return [0.0]

    monkeypatch.setattr(fine_tune, "train", train)
    return found


@pytest.mark.parametrize("rows_apart", [False, True])
def test_a_student_starts_with_the_ranges_of_every_timestep(rows_apart: bool) -> None:
    task, plans = prepared()
    plans = banded(task.model, plans) if rows_apart else plans
    plans["conv_in"] = by_time(plans["conv_in"], (1.0, 1.7), (1, 0, 1))
    plans["conv_out"] = by_time(plans["conv_out"], (1.0, 1.7, 0.6), (2, 1, 0))  # `time` has one range for all
    expected = install.apply(install.shadow(task.model), Plan("test", "w4a4", plans, timesteps=GRID))
    student = student_of(task, plans, count=1, left_out=tuple(plans))
    packed = install.apply(install.shadow(task.model), Plan("test", "w4a4", student.packed(), timesteps=GRID))
    for _, (args, kwargs) in by_timestep(task):
        with torch.no_grad():  # the bounds are those of packed against trained layers in test_finetune
            torch.testing.assert_close(student(args, kwargs), expected(*args, **kwargs), rtol=1e-4, atol=1e-5)
            assert torch.equal(packed(*args, **kwargs), expected(*args, **kwargs))
    lengths = {name: len(plan.input_schedule) for name, plan in student.packed().items()}
    assert lengths == {"conv_in": 3, "conv_out": 3, "time": 0}


def test_other_timesteps_start_at_the_nearest_of_the_plan(started: list[Student]) -> None:
    task, plans = prepared()
    timesteps, sizes = (60.0, 290.0, 310.0, 480.0, 990.0), (1.0, 1.2, 1.4, 1.6, 1.8)
    plans["conv_out"] = by_time(plans["conv_out"], sizes, range(5))
    before = Plan("efficientdm", "w4a4", plans, options={"rank": 4}, timesteps=timesteps)
    after = api.repair(task.model, before, epochs=1, **QUICK)
    assert after.timesteps == GRID == started[0].grid
    made = after.layers["conv_out"]
    assert made.input_schedule == (0, 1, 2) and after.layers["time"].input_schedule == ()
    for name in ("input_scale", "input_zero_point"):
        assert torch.equal(made.tensors[name], before.layers["conv_out"].tensors[name][[0, 3, 4]])
    assert after.options["rank"] == 4 and after.options["repair"]["rank"] == 2
    saved = api.apply(install.shadow(task.model), after)
    assert api.plan_of(saved).timesteps == GRID


def test_ranges_by_timestep_are_trained_apart() -> None:
    task, plans = prepared()
    plans |= {name: by_time(plans[name], (0.7,), (0, 0, 0)) for name in ("conv_in", "conv_out")}
    before = Plan("mpqdm", "w4a4", plans, timesteps=GRID)
    kept = {name: tensor.clone() for name, tensor in plans["conv_in"].tensors.items()}
    after = api.repair(task.model, before, epochs=10, **QUICK)
    calls = by_timestep(task)
    assert error_of(task.model, after, calls) < error_of(task.model, before, calls)
    for name in ("conv_in", "conv_out"):
        assert len(set(after.layers[name].tensors["input_scale"].tolist())) == 3
    assert all(torch.equal(tensor, kept[name]) for name, tensor in before.layers["conv_in"].tensors.items())


@pytest.mark.parametrize("recipe", ["efficientdm", "mpqdm"])
def test_checkpoints_with_ranges_by_timestep_are_taken(
    recipe: str, started: list[Student], tmp_path: Path
) -> None:
    task, _ = prepared()
    own = {"relation": "off"} if recipe == "mpqdm" else {}
    options = {**own, "epochs": 1, "rank": 2, "keep_8bit": ["conv_out"]}
    made = api.plan(
        task.model, recipe, "w4a4", forward_loop=sample_with, samples=24, progress=False, **options
    )
    assert all(layer.input_schedule for layer in made.layers.values())
    assert any(layer.smoothed for layer in made.layers.values()) == (recipe == "mpqdm")
    quantized = api.apply(install.shadow(task.model), made)
    difloat.save(quantized, tmp_path / "saved")
    loaded = difloat.load(tmp_path / "saved", into=Denoiser())
    before = api.plan_of(loaded)
    started.clear()
    after = api.repair(task.model, before, epochs=1, **{**QUICK, "rank": 0})
    first, second = ({name: plain(one) for name, one in each.layers.items()} for each in (before, after))
    assert first == second and after.timesteps == before.timesteps
    repaired = api.apply(install.shadow(task.model), after)
    for _, (args, kwargs) in by_timestep(task):  # not trained and without adapters: the checkpoint as it was
        with torch.no_grad():
            assert torch.equal(repaired(*args, **kwargs), loaded(*args, **kwargs))


def test_ranges_by_timestep_of_one_timestep_become_one_range(started: list[Student]) -> None:
    task, plans = prepared()
    plans["conv_out"] = by_time(plans["conv_out"], (1.0, 1.5), (0, 1, 1))

    def once(module: nn.Module) -> None:
        module(torch.randn(8, 3, 6, 6), torch.full((8,), 800))

    before = Plan("efficientdm", "w4a4", plans, timesteps=GRID)
    after = api.repair(task.model, before, epochs=1, **{**QUICK, "forward_loop": once})
    assert after.timesteps == () and not any(layer.schedules for layer in after.layers.values())
    first, second = before.layers["conv_out"].tensors["input_scale"].tolist()
    assert after.layers["conv_out"].tensors["input_scale"].tolist() == [second] != [first]


def test_layers_of_8_bits_learn_ranges_only_unless_their_rows_differ(started: list[Student]) -> None:
    task, plans = prepared()
    part = Part(3, QuantSpec(parse("int8"), "channel"), plans["conv_in"].parts[0].activation)
    weight = task.model.conv_in.weight.detach()
    scale = weight.abs().amax((1, 2, 3)) / 127
    plans["conv_in"] = plan_layer(weight, [part], [scale], input_scales=[torch.tensor(0.1)])
    plans["time"] = in_bands(task.model.time.weight, plans["time"].parts, ["int8", "int7"])
    api.repair(task.model, Plan("test", "w7a4", plans), epochs=1, **QUICK)
    ranks = dict(zip(started[0].names, (twin.rank for twin in started[0].twins), strict=True))
    assert ranks == {"conv_in": 0, "time": 2, "conv_out": 2}


@pytest.mark.parametrize("carry", ["merged", "side"])
def test_what_cannot_be_trained_on_says_what_to_do(carry: str) -> None:
    task, plans = prepared()
    generator = torch.Generator().manual_seed(0)
    packed = {
        name: Adaptive(
            task.model.get_submodule(name),
            plan,
            adapters=2,
            rank=2,
            entries=1,
            carry=carry,
            generator=generator,
        ).packed([0, 1, 0])
        for name, plan in plans.items()
    }
    plan = Plan("msfp", "w4a4", packed, timesteps=GRID)
    found = "nothing beside .*quantize with carry='merged', adapters=1"
    if carry == "merged":
        found = "one weight per layer .*got 2 by timestep of 'conv_in'; .*quantize with adapters=1"
    with pytest.raises(ValueError, match=found):
        api.repair(task.model, plan, forward_loop=lambda module: pytest.fail("calibrated first"))


@pytest.mark.parametrize(
    "numbers", [{"rank": -1}, {"rank": 1.5}, {"epochs": 0}, {"epochs": 1.5}, {"guidance_weight": math.nan}]
)
def test_numbers_out_of_range_are_refused_before_calibration(numbers: dict[str, float]) -> None:
    name = next(iter(numbers))
    with pytest.raises(ValueError, match=f"{name} must be|epochs must be at least 1 and rank"):
        api.repair(prepared()[0].model, Plan("test", "w4a8", {}), **numbers)


def test_plans_of_other_models_are_refused_before_calibration() -> None:
    task, plans = prepared()
    before = {"forward_loop": lambda module: pytest.fail("calibrated first")}
    other = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(ValueError, match="plan must fit the model"):
        api.repair(other, Plan("rtn", "w4a4", plans), **before)
    plan = Plan("rtn", "w4a4", plans, components={"text_encoder": Plan("datafree", "w4a8", {})})
    with pytest.raises(ValueError, match="no component 'text_encoder'"):
        api.repair(task.model, plan, **before)


def test_a_plan_on_the_cpu_is_trained_where_the_weights_are(device: torch.device) -> None:
    task, plans = prepared()
    for name, plan in plans.items():
        layer = task.model.get_submodule(name).to(device)
        arguments = {"adapters": 2, "rank": 2, "entries": 3, "generator": torch.Generator().manual_seed(0)}
        twin = Adaptive(layer, plan, **arguments)
        assert {parameter.device.type for parameter in twin.parameters()} == {device.type}
        twin.choice = torch.tensor([1.0, 0.0], device=device)
        shape = (2, plan.shape[1]) if isinstance(layer, nn.Linear) else (2, plan.shape[1], 6, 6)
        twin(torch.randn(shape, device=device)).square().mean().backward()
        packed = twin.packed([0, 1, 0])
        assert {tensor.device.type for tensor in packed.tensors.values()} == {device.type}


# On the command line


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("repair") / "source"
    tiny_pixart().save_pretrained(directory)
    return directory


def repaired(patch: pytest.MonkeyPatch, *arguments: object) -> Path:
    """Run the command quickly; the directory of what it made."""
    fast = ["--epochs", 1, "--samples", 6, "--steps", 2, "--images", 0]
    patch.setattr("sys.argv", ["difloat", "repair", *map(str, arguments), *map(str, fast)])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert not stopped.value.code
    return Path(str(arguments[2]))


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_other_components_stay_packed_bit_for_bit(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = tiny_pixart()
    call = {"use_resolution_binning": False}
    wanted = ["transformer", "text_encoder", "vae=w8a8"]
    settings = {"samples": 6, "steps": 2, "progress": False, "call_kwargs": call}
    difloat.quantize(pipeline, "rtn", "w4a8", components=wanted, **settings)
    checkpoint = difloat.save(pipeline, tmp_path / "checkpoint")
    collected = []

    def collect(*given: Any, **more: Any) -> Any:
        collected.append(given[2])
        return calibration_collect(*given, **more)

    calibration_collect = calibration.collect
    monkeypatch.setattr(calibration, "collect", collect)
    options = ["--rank", 2, "--guidance-weight", 4.5, "--memory-mb", 3]
    out = repaired(monkeypatch, source, checkpoint, tmp_path / "repaired", *options)
    for name in ("text_encoder", "vae"):
        assert contents(out / name) == contents(checkpoint / name)
    assert contents(out / "transformer") != contents(checkpoint / "transformer")
    loaded = difloat.load(out)
    for name in ("transformer", "text_encoder", "vae"):
        assert any(isinstance(layer, QuantizedLayer) for layer in getattr(loaded, name).modules())
    assert set(api.plan_of(loaded).components) == {"text_encoder", "vae"}
    config = json.loads((out / "transformer" / "config.json").read_text())["quantization_config"]
    used = {"epochs": 1, "rank": 2, "dfa": True, "guidance_weight": 4.5, "seed": 0}
    assert config["options"]["repair"] == used
    assert [one.memory_bytes for one in collected] == [3 << 20]
    assert all(finding.passed for finding in difloat.verify(out))


def test_a_model_quantized_while_loading_is_taken(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = tiny_pixart()
    plan = data_free.plan(pipeline.transformer, data_free.settings({"bits": "w4a8"}), progress=False)
    checkpoint = difloat.save(api.apply(pipeline, plan), tmp_path / "checkpoint")
    out = repaired(monkeypatch, source, checkpoint, tmp_path / "repaired")
    made = api.plan_of(difloat.load(out))
    assert made.recipe == "datafree" and "repair" in made.options
    assert build.read(out)[0].recipe_notes == []


def test_plans_of_no_recipe_have_no_notes() -> None:
    assert run.notes_of("datafree") == run.notes_of("import") == []
    assert run.notes_of("lbfp")
