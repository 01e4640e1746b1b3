"""Relation distillation: the loss against nested loops, its gradient, its memory, and which rows it is taken over."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from difloat import recipes
from difloat.calibration.collect import CalibrationSettings, collect_from_loop
from difloat.methods import post_training
from difloat.methods.post_training import LayerRules, Sequencing
from difloat.methods.task import Task
from difloat.methods.training import relation_loss
from difloat.methods.training.batches import Batch
from difloat.methods.training.relation_loss import (
    RelationLoss,
    RelationSettings,
    divergence,
    feature_block,
    positions,
)
from difloat.methods.training.student import Adapters, Student
from difloat.methods.training.train import TrainingSettings, train
from difloat.numbers.formats import parse
from difloat.plan.plan import Plan
from difloat.plan.rules import Bits, Rule

STEPS = (900, 500, 100)


class Denoiser(nn.Module):
    """Two blocks between a first and a last convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_in, self.conv_out = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 3, 3, padding=1)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.SiLU(), nn.Conv2d(8, 8, 1)) for _ in range(2)
        )

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        hidden = self.conv_in(sample) + (timestep.reshape(-1, 1, 1, 1).float() / 500).sin()
        for block in self.blocks:
            hidden = hidden + block(hidden)
        return self.conv_out(hidden)


def sample_with(module: nn.Module, steps: tuple[int, ...] = STEPS) -> None:
    x = torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    for timestep in steps:
        x = x - 0.1 * module(x, torch.full((4,), timestep))


def prepared(steps: tuple[int, ...] = STEPS, **changes: object) -> Task:
    torch.manual_seed(0)
    model = Denoiser()
    settings = CalibrationSettings(samples=4 * len(steps))
    data = collect_from_loop(model, lambda module: sample_with(module, steps), settings, progress=False)
    return Task(model, data, Bits.parse("w3a8"), progress=False, **changes)


def student_of(task: Task, planned: bool = True) -> Student:
    """A student that is quantized, or equal to the teacher."""
    rules = LayerRules(Rule((parse("int3"),), "channel"), None)
    plans = post_training.run(task, lambda name, seen: rules, Sequencing()).layers if planned else {}
    return Student(
        task.model,
        plans,
        {},
        post_training.timestep_grid(task),
        Adapters(1, 2),
        torch.Generator().manual_seed(1),
    )


def loss_of(
    task: Task, student: Student, step: int = 1, timestep: float = 500.0, **changes: object
) -> Tensor:
    extra = RelationLoss(task, student, RelationSettings(**changes))
    rows = [row for row, t in enumerate(task.calibration.timesteps) if t == timestep]
    output = student(*task.calibration.batch(rows))
    return extra(student, step, Batch(timestep, rows), output)


def by_hand(student: Tensor, teacher: Tensor) -> float:
    """The loss from its definition, one pair of positions at a time."""
    total = 0.0
    for one, two in zip(student.double(), teacher.double(), strict=True):
        one, two = (x / x.norm(dim=1, keepdim=True) for x in (one, two))
        for row in range(len(one)):
            logits = [[float(x[row] @ x[other]) for other in range(len(x))] for x in (one, two)]
            sums = [math.log(sum(math.exp(value) for value in values)) for values in logits]
            for q, p in zip(*logits, strict=True):
                total += math.exp(p - sums[1]) * ((p - sums[1]) - (q - sums[0]))
    return total


def test_divergence_is_its_definition() -> None:
    student, teacher = (torch.randn(2, 7, 5, generator=torch.Generator().manual_seed(n)) for n in (0, 1))
    assert float(divergence(student, teacher)) == pytest.approx(by_hand(student, teacher), rel=1e-4)
    assert abs(float(divergence(student, 3 * student))) < 1e-5  # lengths do not count


@pytest.mark.parametrize("map_bytes", [1, 16 * 2 * 7 * 3, 1 << 20])
def test_lots_of_rows_give_the_whole(map_bytes: int) -> None:
    student, teacher = (
        torch.randn(2, 7, 5, generator=torch.Generator().manual_seed(n), requires_grad=True) for n in (0, 1)
    )
    whole, lots = divergence(student, teacher), divergence(student, teacher, map_bytes=map_bytes)
    torch.testing.assert_close(lots, whole)
    expected, got = (torch.autograd.grad(loss, student)[0] for loss in (whole, lots))
    torch.testing.assert_close(got, expected)
    assert float(expected.abs().max()) > 0


def test_the_relations_are_never_whole(monkeypatch) -> None:
    sizes: list[int] = []
    rows_divergence = relation_loss._rows_divergence

    def watch(student: Tensor, teacher: Tensor, start: int, size: int) -> Tensor:
        sizes.append(size)
        return rows_divergence(student, teacher, start, size)

    monkeypatch.setattr(relation_loss, "_rows_divergence", watch)
    features = torch.randn(1, 64, 4, generator=torch.Generator().manual_seed(0), requires_grad=True)
    divergence(features, features.detach().roll(1, 1), map_bytes=16 * 64 * 8).backward()
    assert sizes == [8] * 16  # eight lots of eight rows, and once more in the backward pass


def test_gradient_reaches_the_student_only_where_it_is_attached() -> None:
    task = prepared()
    student = student_of(task)
    values = {}
    for kind in ("attached", "features", "detached"):
        loss = loss_of(task, student, kind=kind)
        values[kind] = loss.item()
        assert loss.requires_grad == (kind != "detached")
        if kind != "detached":
            places = {name for name, p in student.named_parameters() if "up" in name}
            loss.backward()
            touched = {
                n for n, p in student.named_parameters() if p.grad is not None and float(p.grad.abs().max())
            }
            assert {n for n in places if not n.startswith("twins.5")} <= touched  # all but the last layer
            assert not any(n.startswith("twins.5") for n in touched)
            student.zero_grad()
    assert values["attached"] == pytest.approx(values["detached"], rel=1e-6) and values["attached"] > 1e-5


@pytest.mark.parametrize("kind", ["attached", "features"])
def test_a_student_that_is_the_teacher_has_no_loss(kind: str) -> None:
    task = prepared()
    loss = loss_of(task, student_of(task, planned=False), kind=kind)
    assert abs(loss.item()) < 1e-5 * (100 if kind == "attached" else 1)


def test_the_step_before_of_the_same_trajectory_is_in_the_mean() -> None:
    task = prepared()
    student = student_of(task)
    for timestep, earlier in ((500.0, 900.0), (900.0, 900.0)):
        means = []
        for run in (lambda a, k: student(a, k), lambda a, k: task.model(*a, **k)):
            features = []
            for t in (timestep, earlier):
                rows = [row for row, at in enumerate(task.calibration.timesteps) if at == t]
                order = {task.calibration._rows[row].trajectory: row for row in rows}
                calls = task.calibration.batch([order[key] for key in sorted(order)])
                caught: list[Tensor] = []
                module = (student._model[0] if not means else task.model).blocks[1]
                handle = module.register_forward_hook(lambda m, i, out, c=caught: c.append(positions(out)))
                with torch.no_grad():
                    run(*calls)
                handle.remove()
                features.append(caught[0])
            means.append((features[0] + features[1]) / 2)
        expected = 100 * divergence(*means) / (4 * 3 * 5 * 5)
        torch.testing.assert_close(
            loss_of(task, student, timestep=timestep).detach(), expected, rtol=1e-3, atol=1e-7
        )


def test_it_is_taken_in_every_second_step_or_as_told() -> None:
    task = prepared()
    student = student_of(task)
    taken = [bool(loss_of(task, student, step=step)) for step in range(6)]
    assert taken == [
        False,
        True,
        False,
        True,
        False,
        True,
    ]  # three timesteps: the next epoch takes the others
    task = prepared(steps=(900, 500, 300, 100))
    student = student_of(task)
    taken = [bool(loss_of(task, student, step=step)) for step in range(8)]
    assert taken == [False, True, False, True, True, False, True, False]  # so does it where they are even
    assert all(bool(loss_of(task, student, step=step, every=1)) for step in range(2))
    with pytest.raises(ValueError, match="every 1st"):
        RelationSettings(every=0)


def test_a_call_for_the_step_before_leaves_the_steps_own_timestep() -> None:
    """Blocks whose activations are checkpointed are computed again in the backward pass, after that call."""
    task = prepared()
    rules = LayerRules(Rule((parse("int3"),), "channel"), Rule((parse("int4"),)))
    plans = post_training.run(task, lambda name, seen: rules, Sequencing()).layers
    grid = post_training.timestep_grid(task)
    generator = torch.Generator().manual_seed(1)
    student = Student(task.model, plans, {}, grid, Adapters(2, 2, input_ranges_by_timestep=True), generator)
    extra = RelationLoss(task, student, RelationSettings(every=1))
    rows = [row for row, timestep in enumerate(task.calibration.timesteps) if timestep == 500.0]
    output = student(*task.calibration.batch(rows))
    before = [(twin.entry, twin.choice) for twin in student.twins]
    assert bool(extra(student, 1, Batch(500.0, rows), output))
    for twin, (entry, choice) in zip(student.twins, before, strict=True):
        assert twin.entry == entry == grid.index(500.0) and twin.choice is choice


def test_the_first_step_stands_alone_with_its_whole_gradient() -> None:
    task = prepared()
    student = student_of(task)
    loss_of(task, student, timestep=900.0).backward()
    found = {name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None}
    student.zero_grad()
    rows = [row for row, t in enumerate(task.calibration.timesteps) if t == 900.0]
    caught: list[Tensor] = []
    for module in (student.module("blocks.1"), task.model.get_submodule("blocks.1")):
        module.register_forward_hook(lambda m, i, out: caught.append(positions(out)))
    output = student(*task.calibration.batch(rows))
    args, kwargs = task.calibration.batch(rows)
    task.model(*args, **kwargs)
    (100 / output.numel() * divergence(caught[0], caught[1].detach())).backward()
    for name, parameter in student.named_parameters():
        if name in found:
            torch.testing.assert_close(found[name], parameter.grad)
    assert any(bool(grad.any()) for grad in found.values())


def test_features_that_do_not_fit_the_memory_are_computed_again() -> None:
    task, small = prepared(), prepared(memory_bytes=0)
    held, again = (loss_of(one, student_of(one)) for one in (task, small))
    torch.testing.assert_close(held.detach(), again.detach())


def test_training_with_it_brings_the_relations_closer() -> None:
    task = prepared()
    settings = TrainingSettings(epochs=15, rows=4, adapter_rate=0.02)
    left = {}
    for kind in ("attached", "off"):
        student = student_of(task)
        extra = None if kind == "off" else RelationLoss(task, student, RelationSettings("attached", every=1))
        train(task, student, settings, dict.fromkeys(student.grid, 1.0), extra)
        left[kind] = sum(float(loss_of(task, student, timestep=float(t)).detach()) for t in STEPS)
    assert left["attached"] < 0.8 * left["off"]


def test_the_block_is_found_named_or_refused() -> None:
    task = prepared()
    call = task.calibration.batch([0])
    assert feature_block(task.model, call) == "blocks.1"
    assert RelationLoss(task, student_of(task), RelationSettings(module="blocks.0")).name == "blocks.0"
    with pytest.raises(ValueError, match="module of the denoiser, got features='nope'"):
        RelationLoss(task, student_of(task), RelationSettings(module="nope"))
    with pytest.raises(ValueError, match="called once, got features='blocks', called 0 times"):
        recipes.plan(task, "mpqdm", "w3a8", {"features": "blocks"})
    with pytest.raises(ValueError, match="must find a block"):
        feature_block(nn.Linear(3, 3), ((torch.zeros(1, 3),), {}))
    with pytest.raises(ValueError, match="output without"):
        positions(torch.zeros(2, 3))
    text, picture = torch.zeros(2, 4, 6), torch.ones(2, 9, 6)
    assert torch.equal(positions((text, picture)), picture)


def test_data_without_consecutive_steps_are_refused() -> None:
    task = prepared()
    data = collect_from_loop(
        task.model, lambda m: sample_with(m, (500,)), CalibrationSettings(samples=4), progress=False
    )
    alone = Task(task.model, data, task.bits, progress=False)
    with pytest.raises(ValueError, match="consecutive steps of one trajectory, got 4"):
        RelationLoss(alone, student_of(task), RelationSettings())


def test_detached_relations_train_nothing_and_attached_ones_do() -> None:
    task = prepared()
    options = {"epochs": 2, "rows": 4, "rank": 2, "adapter_rate": 0.1}
    plans = {
        kind: recipes.plan(task, "mpqdm", "w3a8", {**options, "relation": kind})
        for kind in ("off", "detached", "attached", "features")
    }
    assert plans["off"].measured["losses"] != plans["detached"].measured["losses"]
    assert "relation_features" not in plans["off"].measured
    assert plans["attached"].measured["relation_features"] == "blocks.1"

    def same(one: Plan, two: Plan) -> bool:
        return all(
            torch.equal(tensor, two.layers[name].tensors[key])
            for name, layer in one.layers.items()
            for key, tensor in layer.tensors.items()
        )

    assert same(plans["off"], plans["detached"])
    assert not same(plans["off"], plans["attached"]) and not same(plans["attached"], plans["features"])


def test_a_kept_run_without_relations_is_not_gone_on_with(tmp_path) -> None:
    options = {"epochs": 1, "rows": 4, "rank": 2, "adapter_rate": 0.1}
    kept = prepared(work_dir=tmp_path)
    recipes.plan(kept, "mpqdm", "w3a8", {**options, "relation": "off"})
    again = recipes.plan(kept, "mpqdm", "w3a8", {**options, "relation": "attached"})
    alone = recipes.plan(prepared(), "mpqdm", "w3a8", {**options, "relation": "attached"})
    assert again.measured["losses"] == alone.measured["losses"]
