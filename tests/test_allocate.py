"""Widths of rows: against brute force over every number of rows, on the layer's own output, with the average exact."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import difloat
from difloat import recipes
from difloat.calibration.collect import CalibrationSettings, collect_from_loop
from difloat.layers import install
from difloat.layers.exclude import Exclusion
from difloat.methods import mixed_rows
from difloat.methods.mixed_rows import (
    Allocation,
    AllocationSettings,
    choose,
    input_scale,
    input_vectors,
    kurtosis,
    row_errors,
)
from difloat.methods.task import Task
from difloat.numbers.formats import parse
from difloat.plan import encode
from difloat.plan.plan import LayerPlan
from difloat.plan.rules import Bits, asymmetric_integers, draft_layer, floating_grids
from difloat.plan.specs import Band
from difloat.plan.target import fits


def rule(bits: int):
    return asymmetric_integers(bits, "channel")


class Denoiser(nn.Module):
    """A convolution, a grouped and strided one, a linear layer, one that is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 20, 3, padding=1)
        self.grouped = nn.Conv2d(20, 20, 3, padding=2, stride=2, dilation=2, groups=4)
        self.linear = nn.Linear(20, 30)
        self.idle = nn.Linear(3, 3)

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        hidden = F.silu(self.conv(sample)) * (timestep.reshape(-1, 1, 1, 1) / 500)
        return self.linear(self.grouped(hidden).mean((2, 3)))


def prepared(bits: str = "w2a8", **changes: object) -> Task:
    torch.manual_seed(0)
    model = Denoiser()
    with torch.no_grad():  # rows of very different shapes: a few large weights in some
        for layer in (model.conv, model.grouped, model.linear):
            layer.weight[::3] = 8 * layer.weight[::3] ** 5 / layer.weight.abs().max() ** 4

    def loop(module: nn.Module) -> None:
        for timestep in (900, 300):
            module(torch.randn(8, 3, 8, 8), torch.full((8,), timestep))

    data = collect_from_loop(model, loop, CalibrationSettings(samples=16), progress=False)
    return Task(model, data, Bits.parse(bits), progress=False, **changes)


def decided(task: Task, **options: object) -> dict[str, Allocation]:
    return mixed_rows.allocate(task, rule, AllocationSettings(**options))


def test_kurtosis_is_its_definition() -> None:
    weight = torch.randn(4, 3, 3, 3, generator=torch.Generator().manual_seed(0)).double()
    for row, value in zip(weight.flatten(1), kurtosis(weight), strict=True):
        expected = (row - row.mean()).pow(4).mean() / row.std() ** 4
        assert float(value) == pytest.approx(float(expected))
    assert kurtosis(torch.tensor([[1.0, 1.0, 1.0], [0.0, 0.0, 0.0]])).tolist() == [0.0, 0.0]
    heavy, light = torch.zeros(1, 100), torch.ones(1, 100)
    heavy[0, 0], light[0, ::2] = 1.0, -1.0
    assert float(kurtosis(heavy)) > 50 > float(kurtosis(light))


@pytest.mark.parametrize("size", [1e-40, 1e-30, 1e-10, 1e30])
def test_kurtosis_has_no_unit(size: float) -> None:
    rows = torch.randn(6, 50, generator=torch.Generator().manual_seed(0)).double()
    small = (rows * size).float()
    assert small.abs().max() > 0
    # What float32 keeps of numbers as small as 1e-40 is five digits.
    torch.testing.assert_close(kurtosis(small), kurtosis(rows), rtol=1e-3, atol=0)


def test_a_layer_of_very_small_weights_is_quantized_by_every_criterion() -> None:
    for criterion in ("kurtosis", "magnitude", "error"):
        model = nn.Sequential(nn.Linear(16, 20), nn.SiLU(), nn.Linear(20, 16))
        with torch.no_grad():
            model[0].weight.mul_(1e-40 / 0.25)

        def loop(module: nn.Module) -> None:
            module(torch.randn(8, 16))

        plan = difloat.plan(
            model,
            "mpqdm",
            "w3a8",
            forward_loop=loop,
            samples=8,
            progress=False,
            epochs=0,
            criterion=criterion,
        )
        for layer in plan.layers.values():
            assert all(bool(t.isfinite().all()) for t in layer.tensors.values() if t.is_floating_point())


def test_the_input_scale_is_that_of_the_paper_and_leaves_the_output() -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(50, 6, generator=generator) * torch.logspace(-1, 1, 6), torch.randn(4, 6)
    scale = input_scale(x.abs().amax(0), weight)
    torch.testing.assert_close(scale, (x.abs().amax(0) / weight.abs().amax(0)).sqrt())
    torch.testing.assert_close((x / scale) @ (weight * scale).T, x @ weight.T)
    kernels = torch.randn(4, 6, 3, 3)
    of_kernels = input_scale(x.abs().amax(0), kernels)
    torch.testing.assert_close(of_kernels, (x.abs().amax(0) / kernels.abs().amax((0, 2, 3))).sqrt())


def test_dead_channels_get_a_harmless_scale() -> None:
    weight = torch.ones(3, 4)
    weight[:, 2] = 0
    scale = input_scale(torch.tensor([4.0, 0.0, 9.0, 16.0]), weight)
    assert scale.tolist() == [2.0, 2.0, 2.0, 4.0]
    assert input_scale(torch.zeros(4), weight).tolist() == [1.0] * 4
    faint = input_scale(torch.tensor([1e-30, 1.0, 1.0, 1e30]), torch.ones(3, 4))
    assert faint.isfinite().all() and float(faint.max() / faint.min()) <= 1.01e6
    assert float((1 / faint).max()) < 65504  # half precision holds the factor


@given(
    st.integers(1, 45),
    st.integers(0, 10_000),
    st.booleans(),
    st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_choice_equals_brute_force_and_keeps_the_average(
    rows: int, seed: int, one_step: bool, extra: bool
) -> None:
    generator = torch.Generator().manual_seed(seed)
    score = torch.rand(rows, generator=generator)
    more = torch.rand(rows, generator=generator).double()
    same = more + torch.rand(rows, generator=generator)
    less = same + torch.rand(rows, generator=generator)
    choice = choose(score, [less, same, more], only_one_step=one_step, extra_tenth=extra)
    tenth = rows // 10 if extra else 0
    step, ordered = max(1, rows // 10), sorted(range(rows), key=lambda row: -float(score[row]))
    assert choice.order.tolist() == ordered
    totals = {}
    for n in range(0, rows // 2 + 1, step):
        if 2 * n + tenth > rows or (one_step and n > step):
            break
        widths = {row: 3 for row in ordered[: n + tenth]} | {row: 1 for row in ordered[rows - n :]}
        totals[n] = sum(float({3: more, 1: less}.get(widths.get(row, 2), same)[row]) for row in range(rows))
        assert sum(widths.get(row, 2) for row in range(rows)) == 2 * rows + tenth
    assert choice.errors == pytest.approx(totals)
    assert totals[choice.moved] == pytest.approx(min(totals.values()))
    assert choice.raised == choice.moved + tenth and choice.errors[choice.moved] <= choice.errors[0]


@pytest.mark.parametrize("name", ["conv", "grouped", "linear"])
def test_input_vectors_are_what_the_rows_are_multiplied_with(name: str) -> None:
    layer = Denoiser().get_submodule(name)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(7, 20) if name == "linear" else torch.randn(2, layer.in_channels, 7, 6)
    vectors = input_vectors(layer, x, 10_000, generator)
    layer.bias.data.zero_()
    rows = layer.weight.detach().flatten(1).unflatten(0, (len(vectors), -1))
    products = (vectors @ rows.transpose(1, 2)).transpose(0, 1).flatten(1)  # [n, o] in some order
    with torch.no_grad():
        expected = layer(x).movedim(1, -1).flatten(0, -2) if name != "linear" else layer(x)
    assert products.shape == expected.shape
    key = lambda values: values[values[:, 0].argsort()]  # noqa: E731
    torch.testing.assert_close(key(products.detach()), key(expected), rtol=1e-4, atol=1e-5)
    error = row_errors(layer.weight.detach(), vectors)
    torch.testing.assert_close(error, expected.double().square().sum(0), rtol=1e-4, atol=1e-6)
    assert input_vectors(layer, x, 5, generator).shape[:2] == (len(vectors), 5)


def test_the_number_of_rows_is_the_best_one_by_the_output() -> None:
    task = prepared()
    found = decided(task)
    assert set(found) == {"conv", "grouped", "linear"}
    for name, one in found.items():
        layer = task.model.get_submodule(name)
        weight, rows = layer.weight.detach(), len(layer.weight)
        assert (one.smoothing is None) == (name == "grouped")
        scale = torch.ones(5) if one.smoothing is None else 1 / one.smoothing.factors[0]
        inputs: list[Tensor] = []
        handle = layer.register_forward_pre_hook(lambda m, x, kept=inputs: kept.append(x[0]))
        chosen = task.calibration.stratified(16, torch.Generator().manual_seed(0))
        args, kwargs = task.calibration.batch(chosen)
        with torch.no_grad():
            task.model(*args, **kwargs)
        handle.remove()
        order = kurtosis(weight * scale.reshape(1, -1, *[1] * (weight.dim() - 2))).argsort(
            descending=True, stable=True
        )
        assert torch.equal(one.mixed.order, order)
        errors = {}
        for n in range(0, rows // 2 + 1, rows // 10):
            rounded = round_rows(weight, scale, order, n)
            errors[n] = float((run(layer, inputs[0], rounded) - run(layer, inputs[0], weight)).square().sum())
        assert one.moved == min(errors, key=errors.get)
        assert one.error == pytest.approx(errors[one.moved] / errors[0], rel=1e-3)
    assert any(one.moved for one in found.values()) and min(one.error for one in found.values()) < 0.95


def round_rows(weight: Tensor, scale: Tensor, order: Tensor, moved: int) -> Tensor:
    factor = scale.reshape(1, -1, *[1] * (weight.dim() - 2))
    result = torch.empty_like(weight)
    for place, row in enumerate(order.tolist()):
        width = 3 if place < moved else 1 if place >= len(order) - moved else 2
        draft = draft_layer((weight * factor)[row : row + 1], [weight.shape[1]], rule(width))
        result[row] = (encode.dequantize(draft.plan()) / factor)[0]
    return result


def run(layer: nn.Module, x: Tensor, weight: Tensor) -> Tensor:
    twin = replace_weight(layer, weight)
    with torch.no_grad():
        return twin(x).double()


def replace_weight(layer: nn.Module, weight: Tensor) -> nn.Module:
    import copy

    twin = copy.deepcopy(layer)
    twin.weight = nn.Parameter(weight)
    return twin


@pytest.mark.parametrize(
    "options", [{}, {"extra_tenth": True}, {"candidates": "release"}, {"criterion": "random"}]
)
def test_bands_hold_every_row_once_at_the_average_width(options: dict) -> None:
    task = prepared("w3a8")
    for name, one in decided(task, **options).items():
        rows = len(task.model.get_submodule(name).weight)
        assert sorted(one.mixed.order.tolist()) == list(range(rows)) and sum(one.mixed.counts) == rows
        widths = [r.formats[0].bits for r in one.mixed.rules]
        assert widths == sorted(widths, reverse=True) and set(widths) <= {2, 3, 4}
        average = sum(w * n for w, n in zip(widths, one.mixed.counts, strict=True)) / rows
        assert average == pytest.approx(3 + (rows // 10) / rows * bool(options.get("extra_tenth")))
        assert one.bits == pytest.approx(average)
        assert one.moved in (0, rows // 10) or options.get("candidates") != "release"


def test_criteria_order_rows_by_what_they_say() -> None:
    task = prepared()
    weight = task.model.linear.weight.detach()
    plain = decided(task, criterion="magnitude", scale_inputs=False)["linear"]
    assert plain.smoothing is None
    magnitude = weight.square().mean(1)[plain.mixed.order]
    assert bool((magnitude.diff() <= 0).all())
    orders = {
        criterion: tuple(decided(task, criterion=criterion)["conv"].mixed.order.tolist())
        for criterion in ("kurtosis", "magnitude", "error", "random")
    }
    assert len(set(orders.values())) == 4
    again, other = (decided(replace(task, seed=seed), criterion="random")["conv"] for seed in (0, 1))
    assert tuple(again.mixed.order.tolist()) == orders["random"] != tuple(other.mixed.order.tolist())
    by_error, by_chance = (decided(task, criterion=c)["conv"].error for c in ("error", "random"))
    assert by_error <= by_chance


def test_small_memory_means_more_passes_with_the_same_result(monkeypatch) -> None:
    task = prepared()
    monkeypatch.setattr(mixed_rows, "_VECTORS", 24)  # fewer than there are: they are drawn
    passes = []
    listen = mixed_rows._listen
    monkeypatch.setattr(mixed_rows, "_listen", lambda *a: passes.append(list(a[2])) or listen(*a))
    at_once = decided(task)
    assert passes == [["conv", "grouped", "linear"]]
    passes.clear()
    monkeypatch.setattr(mixed_rows, "HELD_SHARE", task.memory_bytes >> 10)
    one_by_one = decided(task)
    assert {name: one.error for name, one in at_once.items()} == {
        name: one.error for name, one in one_by_one.items()
    }
    assert all(one.error < 1 for one in at_once.values())
    assert {tuple(names) for names in passes} == {("conv",), ("grouped",), ("linear",)}
    assert math.prod(len(names) for names in passes) == 1


def test_eight_bits_have_nothing_above_them() -> None:
    found = decided(prepared("w8a8"))
    assert all(one.mixed is None and one.bits == 8 for one in found.values())


def bits_of_rows(layer: LayerPlan) -> float:
    """Average width of the codes of a layer's rows."""
    bands = layer.bands or (Band(layer.shape[0], tuple(part.weight for part in layer.parts)),)
    return sum(band.rows * band.weights[0].format.bits for band in bands) / layer.shape[0]


@pytest.mark.parametrize(("grid", "plus"), [("int", False), ("fp", False), ("int", True)])
def test_the_recipe_mixes_widths_at_the_average_that_was_asked_for(grid: str, plus: bool) -> None:
    options = {"epochs": 0, "grid": grid, "plus": plus, "keep_8bit": ["conv"], "criterion": "error"}
    plan = recipes.plan(prepared("w2a4"), "mpqdm", "w2a4", options)
    for name, layer in plan.layers.items():
        tenth = layer.shape[0] // 10 / layer.shape[0]
        assert bits_of_rows(layer) == pytest.approx(8 if name == "conv" else 2 + tenth * plus), name
        assert layer.smoothed == (name == "linear")
    names = {weight.format.name for p in plan.layers.values() for band in p.bands for weight in band.weights}
    assert {parse(name).bits for name in names} == {1, 2, 3}
    assert all(name.startswith("uint") == (grid == "int") for name in names)
    assert set(plan.measured["widths"]) == {"grouped", "linear"} and set(plan.skipped) == {"idle"}
    assert all(found["error"] <= 1 for found in plan.measured["widths"].values())


def test_mixed_layers_compute_with_their_dequantized_weight() -> None:
    task = prepared("w2a16")
    plan = recipes.plan(task, "mpqdm", "w2a16", {"epochs": 0, "keep_8bit": [], "criterion": "error"})
    assert sum(bool(layer.bands) for layer in plan.layers.values()) == 3
    packed = install.apply(install.shadow(task.model), plan)
    plain = install.restore(install.apply(install.shadow(task.model), plan))
    args, kwargs = task.calibration.batch(range(8))
    with torch.no_grad():
        torch.testing.assert_close(packed(*args, **kwargs), plain(*args, **kwargs), rtol=1e-4, atol=1e-5)
    linear = plan.layers["linear"]
    torch.testing.assert_close(plain.linear.weight, encode.dequantize(linear))
    assert set((linear.tensors["row_band"].bincount()).tolist()) == {band.rows for band in linear.bands}


def test_excluded_layers_take_no_part_and_formats_are_those_of_the_target() -> None:
    task = prepared("w4a8", exclude=Exclusion(("linear",), frozenset({"linear"})), target="cpu")
    found = mixed_rows.allocate(task, lambda bits: floating_grids(bits, "channel"), AllocationSettings())
    assert set(found) == {"conv", "grouped"}
    chosen = [
        one for each in found.values() if each.mixed for rule in each.mixed.rules for one in rule.formats
    ]
    assert chosen and all(fits(one, "cpu") for one in chosen)


def test_options_that_would_do_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match="plus must come with rows of several widths .*, got plus=True"):
        recipes.plan(prepared("w2a8"), "mpqdm", "w2a8", {"epochs": 0, "plus": True, "mixed": False})
    with pytest.raises(ValueError, match="criterion must come with rows of several .*, got criterion=error"):
        recipes.plan(prepared("w2a8"), "mpqdm", "w2a8", {"epochs": 0, "criterion": "error", "mixed": False})
    with pytest.raises(ValueError, match="factor_power must come with dfa=true, got factor_power=2"):
        recipes.plan(prepared("w2a8"), "msfp", "w2a8", {"dfa": False, "factor_power": 2})
    with pytest.raises(ValueError, match="layers that the model calls, got 'idle'"):
        recipes.plan(prepared("w2a8"), "rtn", "w2a8", {"keep_8bit": ["last", "idle"]})


@pytest.mark.parametrize("recipe", ["rtn", "efficientdm", "msfp", "mpqdm"])
@pytest.mark.parametrize("bits", ["w2a4", "w3a6"])
def test_two_and_three_bits_are_two_and_three_bits(recipe: str, bits: str) -> None:
    options = {} if recipe == "rtn" else {"epochs": 1, "rows": 2, "rank": 2}
    options |= {"dfa": False} if recipe == "msfp" else {}
    options |= {"relation": "off"} if recipe == "mpqdm" else {}
    plan = recipes.plan(prepared(bits), recipe, bits, {**options, "keep_8bit": ["conv"]})
    assert {name: bits_of_rows(layer) for name, layer in plan.layers.items()} == {
        "conv": 8,
        "grouped": Bits.parse(bits).weight,
        "linear": Bits.parse(bits).weight,
    }
