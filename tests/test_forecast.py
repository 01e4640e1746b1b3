"""What a run with fine-tuning will take: RAM, packed bytes and seconds, against what real students and plans hold."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

import families
from difloat import api, estimate, estimate_training, recipes, run
from difloat.calibration.collect import CalibrationSettings
from difloat.calibration.rows import first_tensor
from difloat.estimate import Forecast
from difloat.layers import packed
from difloat.methods.post_training import timestep_grid
from difloat.methods.training.student import Student
from difloat.plan.rules import Bits
from family_table import FAMILIES
from tiny import PROMPTS, tiny_unet

# diffusers' DPM solver hands torch tensors to numpy in a way numpy 2 deprecates; nothing here can change that.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

SETTINGS = CalibrationSettings(samples=12, steps=2, prompts_per_batch=2)
ROW_S = 1.0  # of the denoiser, instead of a measured time


@pytest.fixture(autouse=True)
def steady_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every row takes the denoiser a second, whatever the machine does meanwhile."""
    probe = estimate.probe

    def steady(*arguments: Any, **named: Any) -> Any:
        need, rows = probe(*arguments, **named)
        return {**need, "row_seconds": ROW_S}, rows

    monkeypatch.setattr(estimate, "probe", steady)


def expected(
    recipe: str,
    pipeline: Any = None,
    settings: CalibrationSettings = SETTINGS,
    call: Any = None,
    **options: Any,
) -> Forecast:
    pipeline = tiny_unet() if pipeline is None else pipeline
    arguments = (pipeline, api.denoiser(pipeline), PROMPTS, settings, recipe, "w4a4", options, call)
    return estimate.forecast(*arguments)


def held_bytes(student: Student, call: Any) -> int:
    """Storages that the graph of a forward pass really holds, but for the model's own tensors."""
    own = {tensor.untyped_storage()._cdata for tensor in student.module("").state_dict().values()}
    held: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        held.append(tensor)
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        output = first_tensor(student(*call))
    storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in held}
    assert output.requires_grad
    return sum(size for key, size in storages.items() if key not in own)


@pytest.mark.parametrize("carry", ["merged", "side"])
def test_memory_of_fine_tuning_is_what_a_real_student_holds(
    monkeypatch: pytest.MonkeyPatch, carry: str
) -> None:
    monkeypatch.setattr(
        estimate_training, "_HEAP", 1.0
    )  # what is in use, not what the C library keeps beside
    pipeline, rows, rank = tiny_unet(), 5, 4
    options = {"rows": rows, "rank": rank, "adapters": 2, "carry": carry}
    said = expected("msfp", pipeline, **options)

    data = api.calibrate(pipeline, prompts=PROMPTS, progress=False, **vars(SETTINGS))
    task = api.task_of(pipeline, data, Bits.parse("w4a4"))
    plan = recipes.plan(task, "msfp", "w4a4", {**options, "epochs": 0})
    generator = torch.Generator().manual_seed(0)
    kept = ("conv_in", "conv_out")
    shape = {"adapters": 2, "rank": rank, "input_ranges_by_timestep": False}
    student = Student(
        task.model,
        plan.layers,
        {},
        timestep_grid(task),
        carry=carry,
        without_adapters=kept,
        generator=generator,
        **shape,
    )
    call = data.batch([data.timesteps.index(data.timesteps[0])] * rows)
    weights = sum(packed.weight_of(task.model, name).nbytes for name in plan.layers)
    trained = sum(tensor.nbytes for twin in student.twins for tensor in twin.parameters())
    outputs = len(data) * 4 * first_tensor(task.model(*data.batch([0])[0], **data.batch([0])[1])).numel()
    real = weights + 4 * trained + held_bytes(student, call) + outputs
    assert said.tuning_bytes == pytest.approx(real, rel=0.02)  # routed choices have gradients of a few bytes


def test_memory_of_fine_tuning_grows_with_rows_and_is_told_from_the_rest() -> None:
    few, more, most = (expected("efficientdm", rows=rows).tuning_bytes for rows in (4, 8, 12))
    assert most - more == pytest.approx(more - few, rel=1e-3) and more - few > 4 * 10_000
    text = run.describe(expected("efficientdm", rows=4), SETTINGS)
    assert "RAM: about" in text and "RAM of fine-tuning: about" in text
    for recipe, options in (("efficientdm", {"epochs": 0}), ("msfp", {"adapters": 0}), ("rtn", {})):
        untrained = expected(recipe, **options)
        assert untrained.tuning_bytes == untrained.training_s == 0
        assert "RAM of fine-tuning" not in run.describe(untrained, SETTINGS)


def test_layers_kept_at_8_bits_have_no_adapters_in_the_packed_bytes() -> None:
    pipeline = tiny_unet()
    options = {"adapters": 1, "rank": 4, "carry": "side", "epochs": 1, "rows": 2}
    said = expected("msfp", pipeline, **options)
    data = api.calibrate(pipeline, prompts=PROMPTS, progress=False, **vars(SETTINGS))
    plan = recipes.plan(api.task_of(pipeline, data, Bits.parse("w4a4")), "msfp", "w4a4", options)
    assert plan.layers["conv_in"].side is None and plan.layers["conv_out"].side is None
    saved = sum(packed.weight_of(pipeline.unet, name).nbytes for name in plan.layers)
    stored = sum(layer.nbytes for layer in plan.layers.values())
    assert said.packed_bytes == said.float_bytes - saved + stored


def test_guidance_in_two_calls_takes_no_more_steps() -> None:
    pipeline = families.flux()
    size = FAMILIES["flux"].call
    settings = CalibrationSettings(samples=12, steps=2, prompts_per_batch=3)
    options = {"epochs": 3, "rows": 4, "rank": 2}
    guided = {**size, "true_cfg_scale": 2.0, "negative_prompt": ""}
    once, twice = (expected("efficientdm", pipeline, settings, call, **options) for call in (size, guided))
    assert twice.calibration["calls"] / twice.calibration["batches"] == 4
    forwards = (
        12 + 2 * 3 * 4 * estimate_training._TRAINING_FORWARDS
    )  # the teacher's, and two timesteps in three epochs
    assert once.training_s == twice.training_s == forwards * ROW_S
    more = expected("efficientdm", pipeline, settings, size, **options, accumulation=3)
    assert more.training_s - 12 * ROW_S == 3 * (once.training_s - 12 * ROW_S)


def test_choosing_widths_is_part_of_the_search(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = recipes.plan

    def slow(*arguments: Any) -> Any:
        made = plan(*arguments)
        made.measured["seconds"] |= {"choose widths": 1000.0, "search weights": 0.0}
        return made

    monkeypatch.setattr(recipes, "plan", slow)
    said, alike = expected("mpqdm", epochs=0), expected("mpqdm", epochs=0, mixed=False)
    module = tiny_unet().unet
    tried = sum(packed.weight_of(module, name).numel() for name in said.trial.layers)
    assert alike.search_s == 12 * ROW_S  # the inputs' alone
    # Rows pass for the inputs, the channels' maxima and the held vectors; those of the trial are taken off.
    passed = 2 * 8 * ROW_S  # two prompts, two parts of guidance, two steps: the rows of a trial
    assert said.search_s == pytest.approx((1000 - passed) * said.weights / tried + 3 * 12 * ROW_S)
    short = CalibrationSettings(samples=12, steps=2, prompts_per_batch=2, memory_bytes=1 << 20)
    more = expected("mpqdm", settings=short, epochs=0)
    further = (more.search_s - said.search_s) / (12 * ROW_S)  # passes, for vectors that are not held at once
    assert further >= 1 and further == pytest.approx(round(further))


def test_relations_are_part_of_fine_tuning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(estimate_training, "_relation_s", lambda features, kind: 7.0)
    options = {"epochs": 4, "rows": 3, "rank": 2, "mixed": False}
    off, second, every, features = (
        expected("mpqdm", relation=kind, relation_every=n, **options)
        for kind, n in (("off", 2), ("attached", 2), ("attached", 1), ("features", 2))
    )
    before = estimate_training._STUDENT_FORWARDS * ROW_S
    assert second.training_s - off.training_s == 12 * ROW_S + 4 * 3 * (before + 7.0)
    assert every.training_s - off.training_s == 12 * ROW_S + 8 * 3 * (before + 7.0)
    assert features.training_s - off.training_s == 12 * ROW_S + 4 * 3 * before
    held = 12 * 64 * 16 * 4  # rows, positions and channels of the last up block, float32
    assert second.tuning_bytes - off.tuning_bytes == held
    short = CalibrationSettings(samples=12, steps=2, prompts_per_batch=2, memory_bytes=2 * held)
    again = expected("mpqdm", settings=short, **options)  # a quarter of that holds half of them
    assert again.training_s - second.training_s == pytest.approx(4 * 3 * 2 * 0.5 * ROW_S)
    with pytest.raises(ValueError, match="relation features must come from a module .*'nowhere'"):
        expected("mpqdm", features="nowhere", **options)


def test_relations_are_timed() -> None:
    features = torch.randn(1, 64, 8, generator=torch.Generator().manual_seed(0))
    assert all(0 < estimate_training._relation_s(features, kind) < 30 for kind in ("attached", "detached"))
