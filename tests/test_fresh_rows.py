"""Fine-tuning on rows drawn anew: they are new, their targets are the teacher's, and a run can be cut."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from difloat import api, recipes
from difloat.calibration.batch_axis import predict
from difloat.calibration.collect import CalibrationSettings, collect, collect_from_loop
from difloat.methods.task import Task
from difloat.methods.training import resume
from difloat.methods.training.batches import Batch, Fixed, Ring
from difloat.methods.training.relation_loss import RelationLoss, RelationSettings
from difloat.methods.training.student import Student
from difloat.methods.training.train import TrainingSettings, settings_of, train
from difloat.plan.rules import Bits
from test_finetune import SETTINGS, prepared, sample_anew, student_of, trained
from tiny import PROMPTS, tiny_unet

FRESH = replace(SETTINGS, fresh_rows=1)


def of_loop(loop: object = sample_anew) -> tuple[Task, dict]:
    task, plans = prepared()
    settings = CalibrationSettings(samples=24)
    return replace(task, calibration=collect_from_loop(task.model, loop, settings, progress=False)), plans


def of_pipeline(**changes: object) -> Task:
    pipeline = tiny_unet()
    settings = CalibrationSettings(samples=12, steps=3, guidance_scale=3.0, **changes)
    data = collect(pipeline, PROMPTS, settings, progress=False, call_kwargs={"height": 16, "width": 16})
    return replace(api.task_of(pipeline, data, Bits.parse("w4a4")), progress=False)


def noise(task: Task, batch: Batch) -> torch.Tensor:
    return batch.fresh.batch(batch.picked)[0][0]


def test_every_pass_has_new_trajectories_and_the_teachers_outputs() -> None:
    task, _ = of_loop()
    ring = Ring(task, FRESH)
    assert ring.grid == [900.0, 500.0, 100.0] == Fixed(task).grid
    seen: set[str] = set(task.calibration.samples)
    for number in range(6):
        batch = ring.draw(number, 4, seed=0)
        assert batch.timestep == ring.grid[number % 3] and len(set(batch.picked)) == 4
        call = batch.fresh.batch(batch.picked)
        torch.testing.assert_close(ring.rows.targets[batch.picked], predict(task.model, *call))
        if number % 3 == 0:
            assert not batch.fresh.samples & seen
            seen |= batch.fresh.samples
    assert len(seen) == len(task.calibration.samples) + 2 * 24


def test_the_ring_keeps_as_many_passes_as_asked() -> None:
    task, _ = of_loop()
    ring, passes = Ring(task, replace(FRESH, fresh_rows=2)), []
    for turn in range(4):
        passes.append(ring.draw(3 * turn, 4, seed=0).fresh.samples)
    assert [len(held) for held in passes] == [24, 48, 48, 48]
    assert [len(passes[n] & passes[n + 1]) for n in range(3)] == [24, 24, 24]
    assert not passes[1] & passes[3]


def test_a_pass_is_made_of_its_number_and_the_seed() -> None:
    task, _ = of_loop()
    one, other = Ring(task, FRESH), Ring(task, FRESH)
    one.draw(0, 4, seed=0)
    first, again = one.draw(4, 4, seed=0), other.draw(4, 4, seed=0)
    assert first.picked == again.picked and torch.equal(noise(task, first), noise(task, again))
    assert other.draw(4, 4, seed=1).picked != again.picked


def test_rows_repeat_only_where_a_timestep_has_too_few() -> None:
    task, _ = of_loop()
    picked = Ring(task, FRESH).draw(0, 11, seed=0).picked
    assert len(picked) == 11 and len(set(picked)) == 8


def test_trajectories_of_a_pipeline_come_with_both_parts_of_guidance_and_other_noise() -> None:
    task = of_pipeline()
    settings = replace(FRESH, rows=4)
    ring = Ring(task, settings)
    prompts = []
    for number in range(6):
        batch = ring.draw(number, 4, seed=0)
        beside = batch.fresh.beside
        pairs = [(row, beside[row]) for row in batch.picked if beside[row] is not None]
        assert len(pairs) == 2 and {row for pair in pairs for row in pair} == set(batch.picked)
        assert len(batch.fresh) == 2 * 2 * 3  # two pictures, two parts, three steps: no more is held
        assert not batch.fresh.samples & task.calibration.samples
        args, kwargs = batch.fresh.batch(batch.picked)
        torch.testing.assert_close(ring.rows.targets[batch.picked], predict(task.model, args, kwargs))
        prompts.append(kwargs["encoder_hidden_states"])
    assert torch.equal(prompts[0].sort(0).values, prompts[2].sort(0).values)
    assert not torch.equal(prompts[0].sort(0).values, prompts[3].sort(0).values)


def test_updates_count_optimiser_steps_whatever_the_trajectory() -> None:
    task, plans = of_loop()
    student = student_of(task, plans)
    steps: list[int] = []

    def note(student: Student, step: int, batch: Batch, output: torch.Tensor) -> torch.Tensor:
        steps.append(step)
        return output.new_zeros(())

    train(task, student, replace(FRESH, updates=7), dict.fromkeys(student.grid, 1.0), note)
    assert steps == list(range(7))
    options = recipes.make_options(
        recipes.lookup("msfp"), {"updates": "16000", "rows": "4", "fresh_rows": "1"}, "w4a4"
    )
    settings = settings_of(replace(options, dfa=False), task)
    assert (settings.steps(20), settings.rows, settings.fresh_rows) == (16000, 4, 1)
    cost = recipes.lookup("msfp").cost(options, Bits.parse("w4a4"))
    assert cost.computed(256, 20)["fine-tuning"] == 16000 * 4 * (3 + 1)


def test_a_cut_run_goes_on_with_the_rows_that_it_would_have_had(tmp_path, monkeypatch) -> None:
    task, plans = of_loop()
    settings = replace(FRESH, fresh_rows=2)
    whole = student_of(task, plans)
    expected = trained(task, whole, settings)
    monkeypatch.setattr(resume, "_SAVE_EVERY_S", 0.0)
    kept = replace(task, work_dir=tmp_path)
    cut = student_of(kept, plans)

    def stop(student: Student, step: int, *_: object) -> torch.Tensor:
        if step == 7:
            raise KeyboardInterrupt
        return torch.zeros(())

    with pytest.raises(KeyboardInterrupt):
        train(kept, cut, settings, dict.fromkeys(cut.grid, 1.0), stop)
    again = student_of(kept, plans)
    assert trained(kept, again, settings) == expected
    for name, parameter in whole.named_parameters():
        assert torch.equal(dict(again.named_parameters())[name], parameter)
    assert len(list(tmp_path.glob("fine-tuning-*"))) == 1


def test_relations_take_all_rows_of_a_fresh_pass() -> None:
    task, plans = of_loop()
    student = student_of(task, plans, count=1)
    loss = RelationLoss(task, student, RelationSettings(every=1, module="conv_in"))
    ring = Ring(task, FRESH)
    for number in (0, 1, 4):
        batch = ring.draw(number, 4, seed=0)
        output = student(*batch.fresh.batch(batch.rows))
        assert loss(student, number, batch, output).item() > 0
        assert loss.before == batch.fresh.before and None not in loss.before
    settings = replace(FRESH, updates=4)
    train(task, student, settings, dict.fromkeys(student.grid, 1.0), loss)


class Counter:
    def __init__(self) -> None:
        self.left = iter(range(1))

    def __call__(self, module: nn.Module) -> None:
        for _ in self.left:
            sample_anew(module)


def the_same_noise(module: nn.Module) -> None:
    x = torch.randn(8, 3, 6, 6, generator=torch.Generator().manual_seed(5))
    for timestep in (900, 500, 100):
        module(x * timestep / 900, torch.full((8,), timestep))


def other_timesteps(module: nn.Module) -> None:
    x = torch.randn(8, 3, 6, 6)
    for timestep in sorted(torch.randperm(1000)[:3].tolist(), reverse=True):
        module(x * timestep, torch.full((8,), timestep))


@pytest.mark.parametrize(
    ("loop", "said"),
    [
        (the_same_noise, "forward_loop must sample from other noise each time it runs for fresh_rows"),
        (Counter(), "forward_loop must call the module every time it runs for fresh_rows, got no call"),
        (other_timesteps, "fresh rows must be of the timesteps of the calibration rows, got none of"),
    ],
)
def test_loops_that_draw_nothing_new_are_refused(loop: object, said: str) -> None:
    task, plans = prepared()
    settings = CalibrationSettings(samples=24)
    data = collect_from_loop(task.model, loop, settings, progress=False, cache_key="loop")
    task = replace(task, calibration=data)
    student = student_of(task, plans)
    with pytest.raises(ValueError, match=said):
        trained(task, student, FRESH)


def test_rows_that_cannot_be_drawn_anew_are_refused_before_anything_is_quantized() -> None:
    task = of_pipeline(timesteps="clean")
    with pytest.raises(ValueError, match="fresh_rows must come with rows along a sampler's own trajectory"):
        recipes.plan(task, "msfp", "w4a4", {"fresh_rows": 1, "dfa": False})
    with pytest.raises(ValueError, match="updates must come with fine-tuning"):
        recipes.plan(task, "efficientdm", "w4a4", {"epochs": 0, "updates": 10})


def test_the_default_trains_on_the_calibration_rows() -> None:
    assert TrainingSettings().fresh_rows == 0 and TrainingSettings().steps(20) == 800
