"""Learned rounding that goes on from codes, and the judge of optional parts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from difloat import api
from difloat.methods import blockwise, judge, optional_parts, polish
from difloat.methods.judge import apart
from difloat.methods.post_training import Outcome
from difloat.methods.task import Task
from difloat.numbers import formats
from difloat.plan.coded import Coded, startable
from difloat.plan.encode import dequantize, join_rows, plan_layer
from difloat.plan.options import checked, make_options
from difloat.plan.plan import LayerPlan, Plan
from difloat.plan.rules import Bits, asymmetric_integers, draft_layer, levels_or_integers
from difloat.plan.specs import Part, QuantSpec
from difloat.recipes.auto import Options
from difloat.report import build
from tiny import PROMPTS, tiny_pixart

# diffusers' DPM solver hands torch tensors to numpy in a way numpy 2 deprecates; nothing here can change that.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

SAMPLED: dict[str, Any] = {
    "samples": 64,
    "steps": 4,
    "trajectories": 16,
    "prompts": PROMPTS,
    "progress": False,
}
FEW: dict[str, Any] = {"widths": "same", "refit": False, "sweep": False}


@pytest.fixture(scope="module")
def task() -> Task:
    """A tiny transformer with rows of 16 trajectories."""
    pipeline = tiny_pixart()
    data = api.calibrate(pipeline, **SAMPLED)
    return replace(api.task_of(pipeline, data, Bits.parse("w3a8")), progress=False)


def random_layer(generator: torch.Generator) -> tuple[Tensor, LayerPlan]:
    """A layer of rows with a table, a zero point and few bits, two parts each, whose codes are off the nearest by up to one."""
    weight = torch.randn(12, 10, generator=generator)
    order = torch.randperm(12, generator=generator)
    rules = (
        levels_or_integers(4, "channel"),
        asymmetric_integers(3, "channel"),
        levels_or_integers(2, "channel"),
    )
    bands = []
    for rows, rule in zip(order.split([5, 4, 3]), rules, strict=True):
        draft = draft_layer(weight[rows], [6, 4], rule)
        off = weight[rows] + 0.5 * torch.randn(len(rows), 10, generator=generator)
        bands.append(draft.plan(off))
    return weight, join_rows(bands, order)


@pytest.mark.parametrize("seed", range(4))
def test_neighbours_are_the_next_values_towards_the_float_weight(seed: int) -> None:
    """By brute force over all values of every row's grid; learning starts at the codes; and codes survive a round trip."""
    weight, layer = random_layer(torch.Generator().manual_seed(seed))
    start = Coded(weight, layer)
    here, there, share = start.grid_neighbours()
    assert torch.equal(here, dequantize(layer))
    assert (share < 0.5).all()
    assert start.error == pytest.approx(float((weight - here).square().sum()))
    moved = (there != here).nonzero().tolist()
    assert len(moved) > 40
    grids = grids_of(layer)
    for o, i in moved:
        values, at = grids[o][i], float(here[o, i])
        side = [v for v in values if abs(v - at) > 1e-5 and (v > at) == (float(weight[o, i]) > at)]
        assert float(there[o, i]) == pytest.approx(min(side, key=lambda v: abs(v - at)), abs=1e-6)
    for o, i in (there == here).nonzero().tolist():
        at, to = float(here[o, i]), float(weight[o, i])
        assert abs(to - at) < 1e-6 or not [
            v for v in grids[o][i] if abs(v - at) > 1e-5 and (v > at) == (to > at)
        ]
    assert start.plan() is layer
    assert torch.equal(start.plan(here).tensors["weight"], layer.tensors["weight"])
    taken = torch.where(
        torch.rand(here.shape, generator=torch.Generator().manual_seed(seed)) < 0.5, here, there
    )
    again = start.plan(taken)
    torch.testing.assert_close(dequantize(again), taken, rtol=1e-6, atol=1e-6)
    assert all(torch.equal(again.tensors[k], v) for k, v in layer.tensors.items() if k != "weight")


def grids_of(layer: LayerPlan) -> list[list[list[float]]]:
    """All values that a weight can have, by row and column."""
    bands = layer.tensors["row_band"].tolist()
    counts = [0] * len(layer.bands)
    found = []
    columns = layer.weight().columns
    for band in bands:
        row: list[list[float]] = []
        for column in columns:
            piece, at = column[band], counts[band]
            offset = 0.0 if piece.zero_point is None else float(piece.zero_point[at])
            values = [float(piece.scale[at]) * v + offset for v in piece.spec.format.values]
            row += [values] * piece.part.channels
        counts[band] += 1
        found.append(row)
    return found


def test_layers_with_more_than_a_weight_do_not_start() -> None:
    """A layer with factors of its input is left alone."""
    part = Part(4, QuantSpec(formats.parse("e2m1")))
    layer = plan_layer(torch.ones(2, 4), [part], [torch.tensor([0.5])])
    assert startable(layer)
    tensors = {**layer.tensors, "input_factor": torch.ones(4)}
    assert not startable(replace(layer, smoothed=True, tensors=tensors))


def auto(task: Task, **options: Any) -> Outcome:
    """The outcome of auto for a task."""
    from difloat.recipes import auto as recipe

    chosen = make_options(recipe.Options, {**FEW, **options})
    return recipe.plan(task, checked(chosen, task.bits))


def test_polish_helps_held_out_trajectories_and_says_so(task: Task) -> None:
    """Codes move, scales stay, and what is noted is what the judge measures anew."""
    start, done = auto(task), auto(task, polish=60)
    (tried,) = done.measured["tried"]
    assert tried["part"] == "polish" and tried["kept"] and tried["gain"]["value"] > 0
    assert tried["trajectories"] == 4
    assert tried["pictures"] == pytest.approx(tried["rows"] / task.calibration.pace.picture_rows)
    changed = {
        key
        for name, layer in done.layers.items()
        for key, tensor in layer.tensors.items()
        if not torch.equal(tensor, start.layers[name].tensors[key])
    }
    assert changed == {"weight"}
    assert done.layers.keys() == start.layers.keys()
    assert all(error["learned"] <= error["nearest"] for error in done.measured["blocks"].values())


def test_what_does_not_help_goes_back_to_the_start(task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    """A learner that spoils codes is refused by the judge, and the report says by how much."""

    def spoil(*args: Any) -> dict[str, LayerPlan]:
        drafts = args[2]
        return {name: draft.plan(torch.zeros_like(draft.weight)) for name, draft in drafts.items()}

    monkeypatch.setattr(polish, "learn_blocks", spoil)
    start, done = auto(task), auto(task, polish=1)
    (tried,) = done.measured["tried"]
    (told,) = build.tried(Plan("auto", "w3a8", done.layers, measured=done.measured))
    assert (told.part, told.kept, told.gain_db[0]) == ("polish", False, tried["gain"]["value"])
    assert not tried["kept"] and tried["gain"]["high"] < 0
    assert all(
        torch.equal(tensor, start.layers[name].tensors[key])
        for name, layer in done.layers.items()
        for key, tensor in layer.tensors.items()
    )


def test_time_and_interrupts_end_learning_and_keep_what_is_done(
    task: Task, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """After Ctrl-C in the second block the first one stays learned; a later run with the folder learns the others."""
    own, learned = replace(task, work_dir=tmp_path), blockwise.learn_rounding
    calls: list[int] = []

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return learned(*args, **kwargs)

    monkeypatch.setattr(blockwise, "learn_rounding", interrupted)
    first = auto(own, polish=4)
    assert len(first.measured["blocks"]) == 1
    calls.append(1)
    second = auto(own, polish=4)
    whole = auto(task, polish=4)
    assert len(second.measured["blocks"]) == len(whole.measured["blocks"]) > 1
    assert len(calls) == 3 + len(whole.measured["blocks"]) - 1 + len(whole.measured["blocks"])
    assert same(second.layers, whole.layers)
    brief = auto(task, polish=4, polish_minutes=1e-9)
    assert brief.measured["blocks"] == {}


def same(one: Any, two: Any) -> bool:
    """Whether two sets of layers have the same bytes."""
    return one.keys() == two.keys() and all(
        torch.equal(tensor, two[name].tensors[key])
        for name in one
        for key, tensor in one[name].tensors.items()
    )


def test_the_judge_compares_guided_outputs_by_trajectory(task: Task) -> None:
    """As a naive loop over held-out pairs does, and the strict rule needs the whole interval."""
    learned_from, held = apart(task.calibration, task.seed)
    names = task.calibration.trajectories
    assert {names[row] for row in held}.isdisjoint({names[row] for row in learned_from})
    assert sorted([*learned_from, *held]) == list(range(len(task.calibration)))
    few, more = auto(replace(task, bits=Bits.parse("w2a8"))), auto(replace(task, bits=Bits.parse("w6a8")))
    weights = {
        timestep: 1.0 + number for number, timestep in enumerate(sorted(set(task.calibration.timesteps)))
    }
    settings: dict[str, Any] = {"guidance": 2.5, "weights": weights, "strict": True}
    verdict = judge.judge(task, held, "bits", few, more, **settings)
    assert verdict.kept and verdict.gain.low > 0
    assert verdict.gain.value == pytest.approx(naive(task, held, few, more, weights), rel=1e-4)
    assert not judge.judge(task, held, "bits", more, few, **settings).kept
    assert not judge.judge(task, held, "nothing", few, few, **settings).kept


def naive(task: Task, held: Sequence[int], one: Outcome, two: Outcome, weights: dict[float, float]) -> float:
    """The mean over trajectories of the ratio of squared errors in dB, pair by pair."""
    data = task.calibration
    models = [quantized(task, one), quantized(task, two)]
    sums: dict[str, list[float]] = {}
    with torch.no_grad():
        for conditional in held:
            other = data.beside[conditional]
            if other is None:
                continue
            outputs = []
            for model in (task.model, *models):
                pair = []
                for row in (other, conditional):
                    args, kwargs = data.batch([row])
                    found = model(*args, **{**kwargs, "return_dict": False})[0]
                    pair.append(found[:, :4].double())
                outputs.append(pair[0] + 2.5 * (pair[1] - pair[0]))
            own = sums.setdefault(data.trajectories[conditional], [0.0, 0.0])
            for number in (0, 1):
                error = (outputs[number + 1] - outputs[0]).square().sum()
                own[number] += weights[data.timesteps[conditional]] * float(error)
    ratios = torch.tensor([before / after for before, after in sums.values()], dtype=torch.float64)
    return float((10 * ratios.log10()).mean())


def quantized(task: Task, outcome: Outcome) -> Any:
    """The model with the layers of an outcome."""
    from difloat.layers import install

    return install.apply(install.shadow(task.model), Plan("", "w4a8", outcome.layers))


def test_what_cannot_be_polished_is_said(task: Task) -> None:
    """Few trajectories, and options that would change nothing."""
    few = replace(task, calibration=task.calibration.some(range(4)))
    with pytest.raises(ValueError, match="rows must come from at least 8 trajectories"):
        auto(few, polish=1, rows=4)
    for word in ("polish_rate", "polish_minutes"):
        with pytest.raises(ValueError, match=f"{word} must come with polish of at least one update"):
            checked(make_options(Options, {word: 1.0}), Bits.parse("w4a8"))
    with pytest.raises(
        ValueError, match=r"judge must come with an optional part \(polish, rotate or branch\)"
    ):
        checked(make_options(Options, {"judge": True}), Bits.parse("w4a8"))


def test_parts_stay_where_held_out_trajectories_gain(task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each part is tried beside those that were kept, on rows without those that judge, and the report has both verdicts."""
    plain, asked = auto(task), {"rotate": "all", "branch": 2}
    seen: list[tuple[str, bool, bool]] = []
    real = optional_parts.judge

    def said(task: Task, held: Sequence[int], part: str, before: Outcome, after: Outcome, **more: Any) -> Any:
        seen.append((part, *(turned(one) for one in (before, after))))
        found = real(task, held, part, before, after, **more)
        return replace(found, kept=part == "branch")

    monkeypatch.setattr(optional_parts, "judge", said)
    done = auto(task, judge=True, **asked)
    assert seen == [("rotate", False, True), ("branch", False, False)]
    assert [(one["part"], one["kept"]) for one in done.measured["tried"]] == [
        ("rotate", False),
        ("branch", True),
    ]
    assert same(done.layers, auto(task, branch=2).layers) and not same(done.layers, plain.layers)
    assert done.used == {"rotate": "none", "branch": 2}
    told = build.tried(Plan("auto", "w3a8", done.layers, measured=done.measured))
    assert [one.part for one in told] == ["rotate", "branch"]
    price = [cost(replace(Options(), **more)) for more in ({}, asked, {**asked, "judge": True})]
    assert price[0] == price[1] and price[2] > 4 * price[1]


def turned(outcome: Outcome) -> bool:
    """Whether a layer reads a rotated input."""
    return any(layer.rotation is not None for layer in outcome.layers.values())


def cost(options: Options) -> float:
    """Rows that a plan by these options asks of the denoiser."""
    from difloat.recipes import auto as recipe

    return sum(recipe.cost(options, Bits.parse("w3a8")).computed(10_000, 20).values())


def test_without_gain_nothing_is_kept(task: Task) -> None:
    """Both verdicts come from the judge, whose strict rule leaves a part out that changes nothing."""
    done = auto(replace(task, bits=Bits.parse("w8a8")), judge=True, branch=1)
    (tried,) = done.measured["tried"]
    assert tried["kept"] == (tried["gain"]["low"] > 0)
    expected = auto(replace(task, bits=Bits.parse("w8a8")), branch=1 if tried["kept"] else 0)
    assert same(done.layers, expected.layers)
