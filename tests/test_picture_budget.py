"""What a recipe may cost in full-precision pictures: trajectories, rows, and moments that are gathered once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from difloat import api, job
from difloat.layers.quantizable import quantizable
from difloat.methods import picture_budget
from difloat.methods.kept_moments import KeptMoments
from difloat.methods.moments import MomentSettings, gather
from difloat.methods.picture_budget import rows_within, sampled
from difloat.plan.request import CalibrationSettings
from difloat.plan.rules import asymmetric_integers, draft_layer
from tiny import PROMPTS, tiny_unet


class Data(list[int]):
    """As much of a calibration as the budget looks at."""

    def __init__(self, steps: int, parts: int, rows: int, pictures: int) -> None:
        super().__init__(range(rows))
        self.timesteps, self.pictures, self.parts = (
            [float(row % steps) for row in range(rows)],
            pictures,
            parts,
        )

    def describe(self) -> dict[str, Any]:
        return {"parts": dict.fromkeys(range(self.parts), 1)}


@pytest.mark.parametrize(("steps", "parts"), [(20, 2), (50, 2), (50, 1), (28, 1), (20, 1)])
def test_calibration_leaves_more_than_one_of_five_pictures_to_rounding(steps: int, parts: int) -> None:
    pictures, kept = sampled(5, 256, steps)
    rows = rows_within(5, Data(steps, parts, kept, pictures), 256, 48)  # type: ignore[arg-type]
    assert pictures == rows.sampled == 2 and kept == 2 * steps
    assert rows.moments + 4 * rows.gradients == round(rows.pictures * steps * parts)
    assert rows.pictures + rows.sampled <= 3.8 and rows.gradients % 2 == 0
    assert "calibration 3." in rows.sentence(5) and "too little" not in rows.sentence(5)


def test_without_a_budget_rows_stay_and_few_steps_are_told() -> None:
    rows = rows_within(0, Data(20, 2, 300, 16), 256, 48)  # type: ignore[arg-type]
    assert (rows.moments, rows.gradients) == (256, 48)
    pictures, kept = sampled(5, 256, 4)
    few = rows_within(5, Data(4, 1, kept, pictures), 256, 48)  # type: ignore[arg-type]
    assert kept == few.moments == 16 and few.gradients == 4
    assert "of 5 full-precision pictures" in few.sentence(5) and few.sentence(5).endswith("so few steps")


def test_a_large_pipeline_samples_two_pictures_unless_the_user_says_how_many(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(picture_budget, "SMALL", 10)
    pipeline = tiny_unet()

    def settings(options: dict[str, Any], **own: Any) -> CalibrationSettings:
        asked = job.request("auto", "w4a8", options, CalibrationSettings(steps=8, **own))
        return job.fit(pipeline, asked).request.calibration

    found = settings({})
    assert (found.samples, found.prompts_per_batch) == (16, 2)
    assert settings({}, trajectories=3).samples == 256  # the user's own
    assert settings({"pictures": 0}).prompts_per_batch == 8
    assert settings({"pictures": 10}).samples == 32
    plan = api.plan(pipeline, "auto", "w4a8", prompts=PROMPTS, steps=8)
    said = capsys.readouterr().err
    assert "calibration 4.0 of 5 full-precision pictures: 2 sampled" in said
    assert plan.options["calibration_rows"] == 16


def test_moments_are_gathered_once_and_their_files_go(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.SiLU(), nn.Linear(8, 4))
    plans = {
        name: draft_layer(layer.weight, [layer.weight.shape[1]], asymmetric_integers(4, "channel")).plan()
        for name, layer in quantizable(model).items()
    }
    calls, ran = [((torch.randn(5, 6),), {})] * 2, []
    settings = MomentSettings(fewest=8, most=8)
    expected = list(gather(model, calls, plans, settings))
    model.register_forward_pre_hook(lambda *_: ran.append(1))
    kept = KeptMoments(tmp_path)
    found = [one.source for one in expected]
    first = list(kept.gather(model, calls, plans, settings, found[:1], keep=True))
    assert len(ran) == 2 and len(list(tmp_path.rglob("*.safetensors"))) == 1
    again = list(kept.gather(model, calls, plans, settings, found, keep=False))
    assert len(ran) == 4 and not list(tmp_path.rglob("*.safetensors"))
    for one, other in zip(expected, [*first, again[1]], strict=True):
        assert torch.equal(one.matrix, other.matrix) and one.vectors == other.vectors
    assert torch.equal(again[0].matrix, expected[0].matrix)
    del kept
    assert not list(tmp_path.iterdir())
