"""Search: equal to trying every candidate on every element, and never worse than simpler choices."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import oracles
from difloat.numbers import search as module
from difloat.numbers import sorted_rows
from difloat.numbers.formats import Format, candidates, parse
from difloat.numbers.rounding import round_to
from difloat.numbers.search import CLIPS, ZERO_POINTS, Found, best_per_format, search
from difloat.plan.rules import Rule, asymmetric_integers, draft_layer, levels_or_integers

SIGNED = ["e2m1", "e3m0", "e1m2", "int4", "int2", "e3m2", "e4m3", "int8"]
UNSIGNED = ["ue2m2", "ue4m0", "uint4", "uint1"]


@pytest.fixture
def weights(generator: torch.Generator) -> Tensor:
    """Four rows of different spread, one of them with an outlier below zero."""
    rows = torch.randn(4, 200, generator=generator) * torch.tensor([[1.0], [0.02], [30.0], [1e-4]])
    rows[1, 7] = -0.3
    return rows


@pytest.fixture
def activations(generator: torch.Generator) -> Tensor:
    """What a layer behind SiLU reads: a long positive and a short negative side."""
    return torch.nn.functional.silu(2 * torch.randn(3, 150, generator=generator))


def errors_by_brute_force(
    rows: Tensor, format: Format, clips: tuple[float, ...], zeros: tuple[float, ...]
) -> Tensor:
    """Squared error [r, candidates] of quantizing every element for every candidate."""
    low, high = rows.double().aminmax(dim=1, keepdim=True)
    result = []
    for zero in zeros:
        zero_point = (zero * low).float().double()
        reach = torch.maximum(high, -low) if format.signed else high - zero_point
        for clip in clips:
            scale = (clip * (reach / format.max)).float().double()
            result.append(error_of(rows, format, scale, zero_point))
    return torch.stack(result, dim=1)


def error_of(rows: Tensor, format: Format, scale: Tensor, zero_point: Tensor) -> Tensor:
    quantized = round_to((rows.double() - zero_point) / scale, format) * scale + zero_point
    return (quantized - rows.double()).square().sum(dim=1)


def error_of_found(rows: Tensor, found: Found) -> Tensor:
    return error_of(rows, found.format, found.scale.double()[:, None], found.zero_point.double()[:, None])


@pytest.mark.parametrize("name", SIGNED)
def test_equals_brute_force(name: str, weights: Tensor) -> None:
    found = search(weights, [parse(name)], refine=0)
    brute = errors_by_brute_force(weights, parse(name), CLIPS, (0.0,)).min(dim=1).values
    torch.testing.assert_close(found.error, brute, rtol=1e-10, atol=0)
    torch.testing.assert_close(error_of_found(weights, found), found.error, rtol=1e-10, atol=0)
    assert not found.zero_point.any()


@pytest.mark.parametrize("name", UNSIGNED)
def test_equals_brute_force_with_zero_points(name: str, activations: Tensor) -> None:
    found = search(activations, [parse(name)], zero_points=ZERO_POINTS, refine=0)
    brute = errors_by_brute_force(activations, parse(name), CLIPS, ZERO_POINTS).min(dim=1).values
    torch.testing.assert_close(found.error, brute, rtol=1e-10, atol=0)
    torch.testing.assert_close(error_of_found(activations, found), found.error, rtol=1e-10, atol=0)


@pytest.mark.parametrize("name", ["e2m1", "int4", "ue2m2"])
def test_error_equals_exact_fractions(name: str, activations: Tensor) -> None:
    """The reported error is that of the float32 scale and zero point, also after refinement."""
    found = search(activations, [parse(name)], zero_points=ZERO_POINTS)
    assert found.scale.dtype == found.zero_point.dtype == torch.float32 and found.error.dtype == torch.float64
    for row, scale, zero, error in zip(
        activations.tolist(),
        found.scale.tolist(),
        found.zero_point.tolist(),
        found.error.tolist(),
        strict=True,
    ):
        assert error == pytest.approx(float(oracles.squared_error(row, scale, parse(name), zero)), rel=1e-11)


def test_unsigned_without_zero_point_on_positive_rows(weights: Tensor) -> None:
    rows = weights.abs()
    found = search(rows, [parse("ue2m2")], refine=0)
    brute = errors_by_brute_force(rows, parse("ue2m2"), CLIPS, (0.0,)).min(dim=1).values
    torch.testing.assert_close(found.error, brute, rtol=1e-10, atol=0)


def test_rows_do_not_depend_on_each_other(weights: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    formats = [parse("e2m1"), parse("int4")]
    together = best_per_format(weights, formats)
    monkeypatch.setattr(module, "_BLOCK", 2 * weights.shape[1])  # also: the size of a block does not matter
    monkeypatch.setattr(sorted_rows, "_CHUNK", 1)
    apart = best_per_format(weights, formats)
    for index in range(len(weights)):
        alone = best_per_format(weights[index : index + 1], formats)
        for name in ("e2m1", "int4"):
            for other in (alone[name], apart[name]):
                row = index if other is apart[name] else 0
                assert other.scale[row] == together[name].scale[index]
                assert other.error[row] == pytest.approx(float(together[name].error[index]), rel=1e-12)


@pytest.mark.parametrize("name", SIGNED)
def test_never_worse_than_absmax_and_refining_never_hurts(name: str, weights: Tensor) -> None:
    format = parse(name)
    absmax = errors_by_brute_force(weights, format, (1.0,), (0.0,))[:, 0]
    errors = [search(weights, [format], refine=rounds).error for rounds in range(4)]
    assert (errors[0] <= absmax * (1 + 1e-10)).all()
    for coarse, fine in zip(errors, errors[1:], strict=False):
        assert (fine <= coarse).all()
    assert (errors[1] < errors[0]).any()


def test_refining_zero_points_never_hurts(activations: Tensor) -> None:
    coarse, fine = (
        search(activations, [parse("ue2m2")], zero_points=ZERO_POINTS, refine=r).error for r in (0, 1)
    )
    assert (fine <= coarse).all() and (fine < coarse).any()


@pytest.mark.parametrize("winner", [*candidates(4), parse("int4")], ids=lambda format: format.name)
def test_finds_the_format_that_made_the_data(winner: Format, generator: torch.Generator) -> None:
    values = torch.tensor(winner.values)
    codes = torch.randint(len(values), (3, 400), generator=generator)
    codes[:, :2] = torch.tensor([0, len(values) - 1])  # both ends occur
    scale = torch.tensor([0.37, 1e-3, 5.0])
    rows = values[codes] * scale[:, None]
    # The extra value of int4 makes absmax 8 steps of the grid whose largest value is 7.
    clips = (*CLIPS, 7 / 8)
    found = search(rows, [*candidates(4), parse("int4")], clips=clips)
    assert found.format == winner or winner.name == "e1m2" and found.format.name == "int4"
    torch.testing.assert_close(
        found.scale, scale * (winner.step if winner != found.format else 1), rtol=1e-6, atol=0
    )
    assert (found.error <= 1e-12 * rows.double().square().sum(dim=1)).all()
    assert set(found.error_by_format) == {"e3m0", "e2m1", "e1m2", "int4"}
    assert (
        found.error_by_format[found.format.name] == min(found.error_by_format.values()) == found.error.sum()
    )


def test_one_format_for_all_rows_has_the_lowest_total(weights: Tensor) -> None:
    formats = candidates(4)
    per_format = best_per_format(weights, formats)
    assert list(per_format) == ["e3m0", "e2m1", "e1m2"]
    totals = {name: float(found.error.sum()) for name, found in per_format.items()}
    best = search(weights, formats)
    assert best.format.name == min(totals, key=totals.__getitem__)
    assert best.error_by_format == totals
    assert torch.equal(best.scale, per_format[best.format.name].scale)


def test_sign_and_zero_point_pay_behind_silu(activations: Tensor) -> None:
    """The premise of mixup-sign quantization (arXiv:2505.21591)."""
    found = search(activations, [*candidates(4), *candidates(4, signed=False)], zero_points=ZERO_POINTS)
    assert not found.format.signed
    assert (found.zero_point <= 0).all() and (found.zero_point >= activations.min()).all()
    signed = min(error for name, error in found.error_by_format.items() if name[0] == "e")
    assert float(found.error.sum()) < 0.6 * signed


def test_rows_without_reach() -> None:
    rows = torch.stack([torch.zeros(5), torch.full((5,), -2.5), torch.full((5,), 1e-44)])
    found = search(rows, [parse("e2m1")])
    assert found.scale[0] == 1.0 and found.error[0] == 0.0
    assert found.scale.isfinite().all() and (found.scale > 0).all()
    assert found.error.tolist() == pytest.approx([0.0, 0.0, 0.0], abs=1e-12)
    shifted = search(rows[:2], [parse("ue2m2")], zero_points=ZERO_POINTS)
    assert shifted.error.tolist() == pytest.approx([0.0, 0.0], abs=1e-12)
    assert (shifted.scale > 0).all()
    largest = search(torch.full((1, 3), 3e38), [parse("e0m1")])
    assert largest.scale.isfinite().all() and largest.error.isfinite().all()


def test_other_dtypes_layouts_and_single_values(weights: Tensor) -> None:
    expected = search(weights.bfloat16().float(), [parse("e2m1")])
    for rows in (
        weights.bfloat16(),
        weights.bfloat16().t().contiguous().t(),
        weights.bfloat16().requires_grad_(),
    ):
        assert torch.equal(search(rows, [parse("e2m1")]).scale, expected.scale)
    single = search(torch.tensor([[3.0]]), [parse("e2m1")])
    assert single.error.item() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        (
            torch.tensor([[1.0, -1.0]]),
            {"formats": [parse("ue2m2")]},
            "rows must not be negative .* got -1; pass zero_points",
        ),
        (torch.tensor([[1.0], [math.nan]]), {}, "rows must be finite"),
        (torch.tensor([[1.0, -math.inf]]), {}, "rows must be finite"),
        (torch.ones(3), {}, r"rows must be floating point \[r, n\]"),
        (torch.ones(3, 0), {}, r"rows must be floating point \[r, n\]"),
        (torch.ones(3, 2, dtype=torch.int64), {}, r"rows must be floating point \[r, n\]"),
        (torch.ones(3, 2), {"formats": []}, "formats must be"),
        (torch.ones(3, 2), {"clips": [0.5, 0.0]}, "clips must be positive"),
        (torch.ones(3, 2), {"clips": [math.nan]}, "clips must be positive"),
        (torch.ones(3, 2), {"zero_points": []}, "zero_points must be fractions"),
        (torch.ones(3, 2), {"zero_points": [-0.3]}, "zero_points must be fractions"),
        (torch.ones(3, 2), {"refine": -1}, "refine must be 0 or more"),
    ],
)
def test_bad_input_gets_one_sentence(rows: Tensor, options: dict, message: str) -> None:
    arguments = {"formats": [parse("e2m1")], **options}
    with pytest.raises(ValueError, match=message):
        search(rows, **arguments)


def test_a_negative_row_is_fine_for_signed_formats_beside_unsigned_ones() -> None:
    rows = torch.tensor([[-1.0, -2.0, -3.0]])
    found = search(rows, [parse("ue2m2"), parse("e2m1")], zero_points=(0.0,))
    assert found.format.name == "e2m1"
    assert found.error_by_format["ue2m2"] == pytest.approx(14.0)


@pytest.mark.parametrize("name", ["int8", "uint8", "e2m1"])
def test_one_candidate_is_rounded_in_place_of_sorted(name: str) -> None:
    weights = torch.randn(40, 30, generator=torch.Generator().manual_seed(5))
    format = parse(name)
    found = search(weights, [format], clips=[1.0], zero_points=[1.0])
    zero = found.zero_point[:, None]
    low, high = weights.aminmax(dim=1)
    reach = torch.maximum(high, -low) if format.signed else high - low
    torch.testing.assert_close(found.scale, reach / format.max)
    assert torch.equal(found.zero_point, torch.zeros(40) if format.signed else low)
    scale = found.scale[:, None].double()
    rounded = round_to((weights - zero.double()) / scale, format) * scale + zero
    torch.testing.assert_close(found.error, (rounded - weights).square().sum(1))


@pytest.mark.parametrize("rule", [levels_or_integers(4, "channel"), asymmetric_integers(5, "channel")])
def test_a_rough_search_is_near_the_full_one(rule: Rule) -> None:
    weights = torch.randn(60, 256, generator=torch.Generator().manual_seed(6))
    full, rough = (float(draft_layer(weights, [256], one).error) for one in (rule, replace(rule, rough=True)))
    assert full <= rough < 1.05 * full
