"""Adapters, router and fine-tuning: what is trained is what is packed, and a run can be cut and split."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from torch import nn

from difloat import distributed, recipes
from difloat.cache_entries import read_entry
from difloat.calibration.collect import Calibration, CalibrationSettings, collect_from_loop
from difloat.layers import install
from difloat.layers import packed as layers
from difloat.methods import post_training
from difloat.methods.post_training import LayerRules, Sequencing
from difloat.methods.task import MixedRows, Smoothing, Task
from difloat.methods.trace import Trace
from difloat.methods.training import batches, resume
from difloat.methods.training import train as finetune
from difloat.methods.training.batches import Batch, Fixed, lost_guidance
from difloat.methods.training.relation_loss import RelationLoss, RelationSettings
from difloat.methods.training.student import Adapters, Router, Student
from difloat.methods.training.train import TrainingSettings, train
from difloat.numbers.formats import parse
from difloat.numbers.search import ZERO_POINTS
from difloat.plan import rules as rules_module
from difloat.plan.encode import dequantize
from difloat.plan.plan import LayerPlan, Plan
from difloat.plan.rules import Bits, Rule, asymmetric_integers
from difloat.plan.specs import QuantSpec
from difloat.recipes import msfp
from difloat.report import build
from mixed_rows import in_bands

WEIGHTS = Rule((parse("e2m1"),), "channel")
SETTINGS = TrainingSettings(epochs=3, rows=4, adapter_rate=0.05, router_rate=0.05)


class Denoiser(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv_in, self.conv_out = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 3, 3, padding=1)
        self.time, self.norm = nn.Linear(4, 8), nn.GroupNorm(2, 8)

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        angles = timestep.reshape(-1, 1).float() / 100 * torch.arange(1, 5)
        hidden = self.conv_in(sample) + self.time(angles.sin().to(sample.dtype))[:, :, None, None]
        return self.conv_out(nn.functional.silu(self.norm(hidden)))


def sample_with(module: nn.Module) -> None:
    for batch in range(2):
        x = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(batch))
        x = x.to(next(module.parameters()).dtype)
        for timestep in (900, 500, 100):
            x = x - 0.1 * module(x, torch.full((4,), timestep))


def sample_anew(module: nn.Module) -> None:
    """As `sample_with`, from noise of torch's own random state."""
    x = torch.randn(8, 3, 6, 6)
    for timestep in (900, 500, 100):
        x = x - 0.1 * module(x, torch.full((8,), timestep))


def prepared(
    work_dir: Path | None = None, dtype: torch.dtype = torch.float32
) -> tuple[Task, dict[str, LayerPlan]]:
    torch.manual_seed(0)
    model = Denoiser().to(dtype)
    data: Calibration = collect_from_loop(model, sample_with, CalibrationSettings(samples=24), progress=False)
    task = Task(model, data, Bits.parse("w4a4"), progress=False, work_dir=work_dir)
    rule = Rule((parse("e2m1"), parse("ue2m2")), zero_points=ZERO_POINTS, asymmetry=0.5)
    rules = LayerRules(WEIGHTS, rule)
    return task, post_training.run(task, lambda name, seen: rules, Sequencing()).layers


def student_of(task: Task, plans: dict[str, LayerPlan], **changes: object) -> Student:
    adapters = Adapters(**{"count": 2, "rank": 3, **changes})
    generator = torch.Generator().manual_seed(1)
    return Student(task.model, plans, {}, post_training.timestep_grid(task), adapters, generator)


def by_timestep(task: Task) -> list[tuple[float, tuple]]:
    rows: dict[float, list[int]] = {}
    for row, timestep in enumerate(task.calibration.timesteps):
        rows.setdefault(timestep, []).append(row)
    return [(timestep, task.calibration.batch(some)) for timestep, some in sorted(rows.items())]


def trained(task: Task, student: Student, settings: TrainingSettings = SETTINGS) -> list[float]:
    return train(task, student, settings, dict.fromkeys(student.grid, 1.0))


def test_the_input_after_silu_is_unsigned_and_the_others_signed() -> None:
    _, plans = prepared()
    signed = {name: plan.parts[0].activation.format.signed for name, plan in plans.items()}
    assert signed == {"conv_in": True, "time": True, "conv_out": False}
    assert float(plans["conv_out"].tensors["input_zero_point"]) < 0


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"count": 1},
        {"input_ranges_by_timestep": True},
        {"rank": 0},
        {"carry": "side"},
        {"carry": "side", "count": 1, "left_out": ("conv_in",)},
        {"carry": "side", "input_ranges_by_timestep": True},
    ],
)
def test_packed_layers_compute_what_was_trained(changes: dict) -> None:
    task, plans = prepared()
    student = student_of(task, plans, **changes)
    trained(task, student)
    packed = student.packed()
    grid = student.grid if any(p.schedules for p in packed.values()) else ()
    model = install.apply(install.shadow(task.model), Plan("test", "w4a4", packed, timesteps=grid))
    for _, (args, kwargs) in by_timestep(task):
        with torch.no_grad():
            torch.testing.assert_close(model(*args, **kwargs), student(args, kwargs), rtol=1e-4, atol=1e-5)
    assert (len(packed["conv_in"].input_schedule) == 3) == bool(changes.get("input_ranges_by_timestep"))
    beside = {name for name, plan in packed.items() if plan.side is not None}
    expected = set(packed) - {*changes.get("left_out", ())} if "carry" in changes else set()
    assert beside == expected and not any(packed[name].schedule for name in beside)


def test_packed_codes_are_those_of_the_fake_quantized_weight() -> None:
    task, plans = prepared()
    student = student_of(task, plans)
    trained(task, student)
    table = student.table()
    for number, (name, plan) in enumerate(student.packed().items()):
        twin = student.twins[number]
        for variant, adapter in enumerate(sorted(set(table[:, number].tolist()))):
            weight = twin.quantized(twin.merged(torch.eye(2)[adapter])).detach()
            assert torch.equal(dequantize(plan.variant(variant)), weight), name


@pytest.mark.parametrize("changes", [{}, {"count": 1, "input_ranges_by_timestep": True}, {"rank": 0}])
@pytest.mark.parametrize("smoothed", [False, True])
def test_rows_of_several_widths_are_packed_as_they_were_trained(smoothed: bool, changes: dict) -> None:
    task, plans = prepared()
    factors = {"conv_in": torch.tensor([0.5, 3.0, 1.2]), "time": torch.tensor([2.0, 0.7, 1.0, 1.5])}
    for name, names in (("conv_in", ["uint1", "uint2", "e2m0"]), ("time", ["e2m1", "uint1"])):
        weight, parts = task.model.get_submodule(name).weight, plans[name].parts
        plans[name] = in_bands(weight, parts, names, factors[name] if smoothed else None)
    student = student_of(task, plans, **changes)
    start = student.twins[0].quantized(student.twins[0].merged(torch.zeros(2))).detach()
    expected = dequantize(replace(plans["conv_in"], smoothed=False))
    assert torch.equal(start, expected) or smoothed  # dividing by a factor and multiplying is not exact
    torch.testing.assert_close(start, expected)
    before = [scale.detach().clone() for scale in student.twins[0].weight_scales]
    losses = trained(task, student, replace(SETTINGS, epochs=6))
    assert losses[-1] < losses[0]
    assert len(before) == 3
    assert any(not torch.equal(a, b) for a, b in zip(before, student.twins[0].weight_scales, strict=True))
    packed, table = student.packed(), student.table()
    for number, name in enumerate(plans):
        twin = student.twins[number]
        assert packed[name].bands == plans[name].bands and packed[name].smoothed == plans[name].smoothed
        for variant, adapter in enumerate(sorted(set(table[:, number].tolist()))):
            weight = twin.quantized(
                twin.merged(torch.eye(2)[adapter : adapter + 1][0][: twin.adapters])
            ).detach()
            plain = replace(packed[name].variant(variant), smoothed=False)
            assert torch.equal(dequantize(plain), weight), name
    grid = student.grid if any(p.schedule or p.input_schedule for p in packed.values()) else ()
    model = install.apply(install.shadow(task.model), Plan("test", "w2a4", packed, timesteps=grid))
    for _, (args, kwargs) in by_timestep(task):
        with torch.no_grad():
            torch.testing.assert_close(model(*args, **kwargs), student(args, kwargs), rtol=1e-4, atol=1e-4)


def test_a_smoothed_layer_is_trained_as_the_input_sees_it() -> None:
    task, plans = prepared()
    factor = torch.tensor([0.5, 3.0, 1.2])
    weight, parts = task.model.conv_in.weight.detach(), plans["conv_in"].parts
    smoothed = in_bands(weight, parts, ["int8"], factor)
    twin = student_of(task, {"conv_in": smoothed}, count=1, rank=0).twins[0]
    x = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    expected = nn.functional.conv2d(
        twin.quantized_input(x), weight / factor.reshape(1, 3, 1, 1), task.model.conv_in.bias, padding=1
    )
    got = twin(x).detach()
    assert (got - expected).abs().max() < 0.02 * expected.abs().max()  # 8 bits


def test_training_lowers_the_loss_and_leaves_the_model_alone() -> None:
    task, plans = prepared()
    before = {name: tensor.clone() for name, tensor in task.model.state_dict().items()}
    losses = trained(task, student_of(task, plans), replace(SETTINGS, epochs=30))
    assert losses[-1] < 0.9 * losses[0]
    assert all(torch.equal(tensor, before[name]) for name, tensor in task.model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in task.model.parameters())


def test_the_router_has_a_gradient_from_the_first_step_and_one_choice() -> None:
    task, plans = prepared()
    student = student_of(task, plans)
    _, (args, kwargs) = by_timestep(task)[0]
    student(args, kwargs).square().sum().backward()
    assert all(float(p.grad.abs().max()) > 0 for p in student.router.parameters())
    for place in (0.0, 0.3, 1.0):
        choice = student.router(place)
        assert torch.equal(choice.sum(1).round(decimals=5), torch.ones(3))
        assert sorted(choice.detach().round().unique().tolist()) == [0.0, 1.0]
    table = student.table()
    for entry in range(len(student.grid)):
        assert torch.equal(student.router(student.place(entry)).argmax(1), table[entry])


def test_router_shape_and_seed() -> None:
    one, two = (Router(5, 3, torch.Generator().manual_seed(4)) for _ in range(2))
    assert torch.equal(one(0.4), two(0.4)) and one(0.4).shape == (5, 3)


def test_a_cut_run_goes_on_to_the_same_weights(tmp_path, monkeypatch) -> None:
    task, plans = prepared()
    whole = student_of(task, plans)
    expected = trained(task, whole)
    kept = replace(task, work_dir=tmp_path)
    monkeypatch.setattr(resume, "_SAVE_EVERY_S", 0.0)
    cut = student_of(kept, plans)

    def stop(student: Student, step: int, *_: object) -> torch.Tensor:
        if step == 7:
            raise KeyboardInterrupt
        return torch.zeros(())

    with pytest.raises(KeyboardInterrupt):
        train(kept, cut, SETTINGS, dict.fromkeys(cut.grid, 1.0), stop)
    again = student_of(kept, plans)
    assert trained(kept, again) == expected
    for name, parameter in whole.named_parameters():
        assert torch.equal(dict(again.named_parameters())[name], parameter)
    # Another run does not take it for its own.
    weights = dict.fromkeys(again.grid, 1.0)

    def state_of(task: Task, student: Student, **changes: object) -> object:
        made_of = {"settings": repr(SETTINGS), "weights": sorted(weights.items()), "extra": "", **changes}
        optimizer, scaler = torch.optim.AdamW(student.parameters()), torch.amp.GradScaler(enabled=False)
        return resume.Kept(task, student, optimizer, scaler, made_of).read()

    assert state_of(kept, again) is not None
    assert state_of(replace(kept, seed=5), again) is None
    assert state_of(kept, student_of(kept, plans, carry="side")) is None
    assert state_of(kept, again, weights=[(100.0, 2.0)]) is None
    weight = QuantSpec(parse("e1m2"), "channel")
    coarser = {n: replace(p, parts=(replace(p.parts[0], weight=weight),)) for n, p in plans.items()}
    assert state_of(kept, student_of(kept, coarser)) is None
    wider = {
        n: replace(p, tensors={**p.tensors, "input_scale": 2 * p.tensors["input_scale"]})
        for n, p in plans.items()
    }
    assert state_of(kept, student_of(kept, wider)) is None
    fewer = collect_from_loop(task.model, sample_with, CalibrationSettings(samples=20), progress=False)
    assert state_of(replace(kept, calibration=fewer), again) is None


def test_training_stops_when_nothing_gets_better(tmp_path) -> None:
    task, plans = prepared()
    settings = replace(SETTINGS, epochs=50, adapter_rate=0.0, router_rate=0.0, range_rate=0.0, scale_rate=0.0)
    settings = replace(settings, patience=2)
    expected = trained(task, student_of(task, plans), settings)
    assert len(expected) < 50
    kept = replace(task, work_dir=tmp_path)  # the last step is kept: nothing is left to train
    for _ in range(2):
        assert trained(kept, student_of(kept, plans), settings) == expected


def in_two_ways() -> dict[str, Student]:
    """Trained plainly, and with all that the loss can hold of guidance and relations."""
    task, plans = prepared()
    plain = student_of(task, plans)
    trained(task, plain, replace(SETTINGS, rows=5))  # which two processes share unevenly
    task = replace(task, calibration=Guided(task.calibration))
    student = student_of(task, plans, count=1)
    relations = RelationLoss(task, student, RelationSettings(every=1, module="conv_in"))
    settings = replace(SETTINGS, guidance_weight=20.0, rows=6, accumulation=2)
    train(task, student, settings, dict.fromkeys(student.grid, 1.0), relations)
    data = collect_from_loop(task.model, sample_anew, CalibrationSettings(samples=24), progress=False)
    task = replace(task, calibration=data)
    fresh = student_of(task, plans)
    trained(task, fresh, replace(SETTINGS, rows=5, fresh_rows=1))
    return {"plain": plain, "all": student, "fresh": fresh}


def test_two_processes_train_what_one_does(tmp_path) -> None:
    alone = in_two_ways()
    script = Path(__file__).with_name("train_two_processes.py")
    # accelerate's own launcher starts several processes on CPUs by MPI only; torch's starts them anywhere.
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        str(script),
    ]
    done = subprocess.run([*command, str(tmp_path)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    both = torch.load(tmp_path / "students.pt", weights_only=True)
    for way, student in alone.items():
        for name, parameter in student.named_parameters():
            torch.testing.assert_close(both[way][name], parameter.detach(), rtol=1e-3, atol=1e-5)


def test_report_shows_what_the_recipe_found_and_learned() -> None:
    task, _ = prepared()
    made = recipes.plan(task, "msfp", "w4a4", {"epochs": 1, "rows": 4, "keep_8bit": [], "dfa": False})
    shown = build.build(task.model, made, name="tiny")
    assert [shape.layer for shape in shown.inputs] == list(made.layers)
    for shape, (name, layer) in zip(shown.inputs, made.layers.items(), strict=True):
        x = inputs_of(task, name)
        assert shape.quantiles[0] == pytest.approx(float(x.min()), rel=0.3, abs=0.05)
        assert shape.asymmetric == (shape.lopsided >= 0.5)
        assert not shape.unsigned or (shape.asymmetric and layer.parts[0].activation.zero_point)
    assert shown.inputs[-1].asymmetric  # behind SiLU
    router = torch.tensor(made.measured["router"])
    assert shown.adapters is None if not router.any() else shown.adapters.table == router.flip(0).tolist()


def test_msfp_keeps_one_weight_with_its_adapters_beside() -> None:
    task, _ = prepared()
    options = {"epochs": 1, "rows": 4, "rank": 2, "keep_8bit": ["time"], "dfa": False}
    merged, beside = (
        recipes.plan(task, "msfp", "w4a4", {**options, "carry": carry}) for carry in ("merged", "side")
    )
    assert {name for name, layer in beside.layers.items() if layer.side} == {"conv_in", "conv_out"}
    assert not any(layer.schedule for layer in beside.layers.values())
    assert not any(layer.side for layer in merged.layers.values())
    assert (merged.options["carry"], beside.options["carry"]) == ("merged", "side")
    shown = {row.name: row for row in build.build(task.model, beside, name="tiny").layers}
    assert "rank 2 beside" in shown["conv_in"].note and not shown["time"].note


def test_the_narrow_search_stays_in_the_ranges_of_the_re_implementation() -> None:
    heavy = torch.randn(1, 4000, generator=torch.Generator().manual_seed(0)) ** 3
    reach = {}
    for search in ("narrow", "wide"):
        found = msfp._input(4, msfp.Options(grid="int", search=search, mixup_sign=False)).search(heavy)
        reach[search] = float(found.scale) * found.format.max / float(heavy.abs().max())
    assert reach["wide"] < 0.6 and reach["narrow"] == pytest.approx(0.8)


def inputs_of(task: Task, name: str) -> torch.Tensor:
    kept: list[torch.Tensor] = []
    hook = task.model.get_submodule(name).register_forward_pre_hook(
        lambda module, args: kept.append(args[0].detach())
    )
    for _, (args, kwargs) in by_timestep(task):
        task.model(*args, **kwargs)
    hook.remove()
    return torch.cat(kept)


def mixed(task: Task) -> dict[str, LayerPlan]:
    """Rows of three widths behind scaled inputs."""

    def rules(name: str, seen: Trace) -> LayerRules:
        shape = task.model.get_submodule(name).weight.shape
        generator = torch.Generator().manual_seed(shape[0])
        counts = (shape[0] // 3, shape[0] - 2 * (shape[0] // 3), shape[0] // 3)
        widths = tuple(asymmetric_integers(bits, "channel") for bits in (3, 2, 1))
        rows = MixedRows(widths, counts, torch.randperm(shape[0], generator=generator))
        smoothing = Smoothing(torch.rand(1, shape[1], generator=generator) + 0.5)
        return LayerRules(widths[1], asymmetric_integers(4, "tensor"), smoothing=smoothing, mixed=rows)

    return post_training.run(task, rules, Sequencing()).layers


def test_adapters_of_smoothed_layers_move_in_steps_of_the_grid() -> None:
    task, _ = prepared()
    plans = mixed(task)
    student = student_of(task, plans, count=1)
    for twin, (name, plan) in zip(student.twins, plans.items(), strict=True):
        weight = task.model.get_submodule(name).weight.detach()
        factor = plan.tensors["input_factor"].reshape(1, -1, *[1] * (weight.dim() - 2))
        change = (twin.up[0] @ twin.down[0].flatten(1)).detach().view_as(weight)
        torch.testing.assert_close(twin.merged(torch.ones(1)).detach(), weight / factor + change)
        bands = [
            (b.shape[0], b.parts[0].weight.format.bits, b.tensors["weight_scale"]) for b in plan.split_rows()
        ]
        reach = sum(rows * (2**bits - 1) * float(scale.mean()) for rows, bits, scale in bands) / len(weight)
        assert twin.step() == pytest.approx(reach / 14)  # fewer values than e2m1: as if it had as many


def test_adapters_from_the_error_are_packed_as_they_were_trained() -> None:
    task, _ = prepared()
    plans = mixed(task)
    changes = {"count": 1, "input_ranges_by_timestep": True, "init": "error"}
    student = student_of(task, plans, **changes)
    losses = trained(task, student, replace(SETTINGS, epochs=8, adapter_rate=0.2))
    assert losses[-1] < 0.9 * losses[0]
    packed = student.packed()
    assert all(layer.bands and layer.smoothed and layer.input_schedule for layer in packed.values())
    model = install.apply(install.shadow(task.model), Plan("test", "w2a4", packed, timesteps=student.grid))
    for _, (args, kwargs) in by_timestep(task):
        with torch.no_grad():
            torch.testing.assert_close(model(*args, **kwargs), student(args, kwargs), rtol=1e-4, atol=1e-5)


def test_adapters_from_the_error_start_at_the_float_weight_as_far_as_their_rank_goes() -> None:
    task, _ = prepared()
    plans = mixed(task)
    changes = {"count": 1, "init": "error"}
    left = {}
    for rank in (1, 4, 100):
        student = student_of(task, plans, rank=rank, **changes)
        left[rank] = 0.0
        for twin, (name, plan) in zip(student.twins, plans.items(), strict=True):
            weight = task.model.get_submodule(name).weight.detach()
            factor = plan.tensors["input_factor"].reshape(1, -1, *[1] * (weight.dim() - 2))
            merged = twin.merged(torch.ones(1)).detach()
            left[rank] += float((merged - weight / factor).square().sum())
            gone = torch.linalg.svdvals(((weight - dequantize(plan)) / factor).flatten(1))[rank:]
            assert float((merged - weight / factor).norm()) == pytest.approx(
                float(gone.norm()), rel=1e-3, abs=1e-5
            )
    assert left[100] < 1e-8 < left[4] < left[1]
    with pytest.raises(ValueError, match="one per layer, got 2"):
        student_of(task, plans, count=2, init="error")


@pytest.mark.parametrize("rank", [0, 3])
def test_training_starts_at_what_learned_rounding_left(rank: int) -> None:
    task, plans = prepared()
    drafts = {
        name: rules_module.draft_layer(layers.weight_of(task.model, name), [plan.shape[1]], WEIGHTS)
        for name, plan in plans.items()
    }
    moved = {}
    for name, draft in drafts.items():
        low, high, position = draft.grid_neighbours()
        other = torch.where(position > 0.5, low, high)  # everywhere the farther neighbour
        moved[name] = replace(
            plans[name], tensors={**plans[name].tensors, "weight": draft.plan(other).tensors["weight"]}
        )
        assert not torch.equal(moved[name].tensors["weight"], plans[name].tensors["weight"])
    packed = student_of(task, moved, count=1, rank=rank).packed()
    for name, plan in packed.items():
        assert torch.equal(plan.tensors["weight"], moved[name].tensors["weight"])


def lost(error: torch.Tensor, direction: torch.Tensor) -> float:
    along, power = (error * direction).sum(), direction.square().sum()
    return float(lost_guidance(along, power, direction.numel()))


def test_lost_guidance_is_the_squared_slope_of_the_error() -> None:
    direction = torch.randn(3, 4, 5, 5, generator=torch.Generator().manual_seed(0))
    power = float(direction.square().mean())
    for share in (0.0, -0.2, 0.5):
        assert lost(share * direction, direction) == pytest.approx(share**2 * power, rel=1e-4)
    noise = torch.randn(direction.shape, generator=torch.Generator().manual_seed(1))
    across = noise - (noise * direction).sum() / direction.square().sum() * direction
    assert lost(across, direction) < 1e-10  # what does not weaken guidance costs nothing here
    assert lost(across, torch.zeros_like(direction)) == 0


@pytest.mark.parametrize("conditional", [0, 1])
def test_pairs_of_guidance_enter_the_loss_once(conditional: int) -> None:
    task = prepared()[0]
    task = replace(task, calibration=Guided(task.calibration, conditional))
    settings = replace(SETTINGS, guidance_weight=3.0)
    data = Fixed(task).rows
    (first, second), (other, _), *_ = [(a, b) for b, a in enumerate(task.calibration.beside) if a is not None]
    rows = [first, second, other, first, second]  # drawn twice; `other` without its half
    batch = Batch(500.0, rows)
    output = torch.randn(len(rows), 3, 6, 6, generator=torch.Generator().manual_seed(2))
    error = output - data.targets[rows]
    missing = lost(error[4] - error[3], data.targets[second] - data.targets[first])
    plain = error.square().mean()
    assert missing > 0
    torch.testing.assert_close(data.loss(output, batch, settings), plain + 3 * missing)
    lonely = data.loss(output, Batch(500.0, [other] * len(rows)), settings)
    torch.testing.assert_close(lonely, (output - data.targets[other]).square().mean())
    without, having = (error[4], error[3]) if conditional == 0 else (error[3], error[4])
    guided = without + 7.5 * (having - without)  # rows without their other half take no part then
    torch.testing.assert_close(
        data.loss(output, batch, replace(SETTINGS, compare_at=7.5)), guided.square().mean()
    )


class Guided:
    """Calibration rows that stand for halves of guidance, two by two at every timestep."""

    def __init__(self, data: Calibration, conditional: int | None = 1) -> None:
        self.data, self.timesteps, self.batch, self.before = data, data.timesteps, data.batch, data.before
        self.fingerprint, self.steps, self.conditional_part = data.fingerprint, data.steps, conditional
        self.beside: list[int | None] = [None] * len(data)
        for timestep in set(data.timesteps):
            rows = [row for row, other in enumerate(data.timesteps) if other == timestep]
            for first, second in zip(rows[::2], rows[1::2], strict=False):
                self.beside[second] = first

    def __len__(self) -> int:
        return len(self.data)


@pytest.mark.parametrize("name", ["guidance_weight", "compare_at"])
def test_guidance_in_the_loss_without_guidance_is_refused(name: str) -> None:
    task, plans = prepared()
    with pytest.raises(ValueError, match=f"{name} must come with .* both parts of guidance, got none"):
        trained(task, student_of(task, plans), replace(SETTINGS, **{name: 1.0}))


def test_comparing_after_guidance_must_know_which_half_is_the_conditional_one() -> None:
    task, plans = prepared()
    task = replace(task, calibration=Guided(task.calibration, None))
    with pytest.raises(ValueError, match="which part of guidance has no condition"):
        trained(task, student_of(task, plans), replace(SETTINGS, compare_at=3.0))
    trained(task, student_of(task, plans), replace(SETTINGS, guidance_weight=3.0))


@pytest.mark.parametrize(
    ("name", "value"),
    [("rows", 0), ("accumulation", 0), ("epochs", -1), ("epochs", 1.5), ("patience", -1)]
    + [(name, value) for name in ("adapter_rate", "guidance_weight") for value in (-1.0, math.inf, math.nan)],
)
def test_numbers_out_of_their_range_are_refused(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{name} must be .*, got {value}"):
        replace(SETTINGS, **{name: value})


def test_every_process_must_have_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    task, plans = prepared()
    monkeypatch.setattr(distributed, "count", lambda: 5)
    with pytest.raises(ValueError, match="rows must be at least 1 for each of 5 processes, got 4"):
        trained(task, student_of(task, plans))


def test_a_run_that_diverges_says_so() -> None:
    task, plans = prepared()
    with pytest.raises(ValueError, match="loss of fine-tuning must be finite, got .* lower adapter_rate"):
        trained(task, student_of(task, plans), replace(SETTINGS, adapter_rate=1e30))


@pytest.mark.parametrize("mean", [1.0, 1e-4])
def test_gradients_pass_a_float16_denoiser(mean: float) -> None:
    """Also where those of a large picture are below what float16 can hold."""
    found = {}
    for dtype in (torch.float16, torch.float32):
        task, plans = prepared(dtype=dtype)
        student = student_of(task, plans, count=1)
        before = student.module("conv_in").up.detach().clone()
        train(task, student, replace(SETTINGS, epochs=1), dict.fromkeys(student.grid, mean))
        found[dtype] = student.module("conv_in").up.detach() - before
    cosine = torch.nn.functional.cosine_similarity(*(one.flatten() for one in found.values()), dim=0)
    assert float(cosine) > 0.9


def test_a_scaled_run_goes_on_with_its_scale(tmp_path, monkeypatch) -> None:
    task, plans = prepared(tmp_path, torch.float16)
    monkeypatch.setattr(resume, "_SAVE_EVERY_S", 0.0)
    student = student_of(task, plans, count=1)
    trained(task, student, replace(SETTINGS, epochs=1))
    (kept,) = tmp_path.glob("fine-tuning-*.safetensors")
    entry = read_entry(kept, kept.name, dict)
    assert entry is not None and json.loads(entry[1]["scaler"])["scale"] > 1
    again = student_of(task, plans, count=1)
    trained(task, again, replace(SETTINGS, epochs=1))
    assert torch.equal(student.module("conv_in").up, again.module("conv_in").up)


def test_models_may_read_the_weight_of_a_layer() -> None:
    """As the embedders of some transformers do, for its dtype."""

    class Reading(Denoiser):
        def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
            assert self.time.bias.shape == (8,)
            return super().forward(sample.to(self.time.weight.dtype), timestep)

    task, plans = prepared()
    reading = Reading()
    reading.load_state_dict(task.model.state_dict())
    task = replace(task, model=reading)
    assert len(trained(task, student_of(task, plans))) == 3


def test_what_accelerate_holds_for_the_process_is_given_back() -> None:
    task, plans = prepared()
    states = (AcceleratorState, GradientState, PartialState)
    for state in states:
        state._reset_state()
    trained(task, student_of(task, plans), replace(SETTINGS, epochs=1, accumulation=2))
    assert not any(state._shared_state for state in states)
    own = Accelerator(cpu=True, gradient_accumulation_steps=4)
    try:
        trained(task, student_of(task, plans), replace(SETTINGS, epochs=1, accumulation=2))
        assert own.gradient_accumulation_steps == 4 and own.device.type == "cpu"
    finally:
        for state in states:
            state._reset_state()


def test_calibration_rows_come_to_the_device_a_few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    task, _ = prepared()
    monkeypatch.setattr(batches, "_TEACHER_ROWS", 4)
    held: list[weakref.ref] = []
    alive: list[int] = []
    batch = type(task.calibration).batch

    def counted(self: Calibration, rows: list[int]) -> object:
        made = batch(self, rows)
        held.append(weakref.ref(made[0][0]))
        alive.append(sum(one() is not None for one in held))
        return made

    monkeypatch.setattr(type(task.calibration), "batch", counted)
    Fixed(task)
    assert len(alive) == 6 and max(alive) <= 2


def test_a_row_between_two_others_is_in_two_pairs() -> None:
    task = prepared()[0]
    three = Guided(task.calibration)
    rows = [row for row, timestep in enumerate(three.timesteps) if timestep == 500.0][:3]
    three.beside = [None] * len(three)
    three.beside[rows[1]], three.beside[rows[2]] = rows[0], rows[1]
    task = replace(task, calibration=three)
    data = Fixed(task).rows
    output = torch.randn(3, 3, 6, 6, generator=torch.Generator().manual_seed(2))
    error, targets = output - data.targets[rows], data.targets[rows]
    missing = lost(torch.cat([error[1:] - error[:-1]]), torch.cat([targets[1:] - targets[:-1]]))
    found = data.loss(output, Batch(500.0, rows), replace(SETTINGS, guidance_weight=3.0))
    torch.testing.assert_close(found, error.square().mean() + 3 * missing)
    with pytest.raises(ValueError, match="compare_at must compare two parts of guidance, got three"):
        finetune._check(task, replace(SETTINGS, compare_at=3.0))


def test_guided_without_guidance_has_nothing_to_keep() -> None:
    task, _ = prepared()
    options = {"epochs": 1, "rows": 4, "rank": 2, "iterations": 4, "rounding_rows": 8, "factor_power": 0}
    asked, without = (
        recipes.plan(task, "guided", "w4a4", {**options, "guidance_weight": weight}) for weight in (9, 0)
    )
    assert asked.measured["losses"] == without.measured["losses"]
    with pytest.raises(ValueError, match="must know the sampler, got a plain module"):
        recipes.plan(task, "guided", "w4a4", {**options, "factor_power": 2})


def test_accumulated_batches_make_one_step() -> None:
    task, plans = prepared()
    seen: list[int] = []

    def count(student: Student, step: int, batch: Batch, output: torch.Tensor) -> torch.Tensor:
        seen.append(step)
        return output.new_zeros(())

    student = student_of(task, plans)
    settings = replace(SETTINGS, epochs=2, accumulation=3)
    losses = train(task, student, settings, dict.fromkeys(student.grid, 1.0), count)
    assert seen == [step for step in range(6) for _ in range(3)] and len(losses) == 2
    once = student_of(task, plans)
    trained(task, once, replace(settings, accumulation=1))
    assert any(not torch.equal(a, b) for a, b in zip(student.parameters(), once.parameters(), strict=True))


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_mixed_precision_trains_about_the_same(precision: str) -> None:
    task, plans = prepared()
    full, half = (
        trained(task, student_of(task, plans), replace(SETTINGS, precision=p)) for p in ("no", precision)
    )
    assert half != full and half == pytest.approx(full, rel=0.1)


def test_mixed_precision_scales_losses_in_float16_and_ends_with_training(tmp_path: Path) -> None:
    task, plans = prepared(tmp_path)
    student = student_of(task, plans)
    trained(task, student, replace(SETTINGS, epochs=1, precision="fp16"))
    (kept,) = tmp_path.glob("fine-tuning-*.safetensors")
    entry = read_entry(kept, kept.name, dict)
    assert entry is not None and json.loads(entry[1]["scaler"])["scale"] > 1
    _, (args, kwargs) = by_timestep(task)[0]
    assert student(args, kwargs).dtype == torch.float32
    with student.mixed_precision(torch.float16):
        assert student(args, kwargs).dtype == torch.float16


def test_an_accelerator_of_the_user_has_no_say() -> None:
    """Its precision is that of the user's own training."""
    task, plans = prepared()
    expected = trained(task, student_of(task, plans))
    Accelerator(cpu=True, mixed_precision="bf16")
    try:
        assert trained(task, student_of(task, plans)) == expected
        assert AcceleratorState().mixed_precision == "bf16"
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
