"""Which format every layer or row gets within a budget of bytes, so that the denoiser's output changes least.

An output channel (row) r of a layer at b bits makes the error ``gamma_r * v_r * ratio_b`` of the output: gamma is the output's
sensitivity (`methods.sensitivity`), v the row's error under the moments when it is rounded to nearest at one width, and ratio
what second-order rounding at b bits makes of that, measured on some rows of the layer. So one search over all rows tells of all
widths, and at one price of a byte every row has its best one. Of large models the ratio is counted from nearest rounding of
these rows and the factorised moments (`second_order.Factor`).

Rows of a layer that get the same width are a band. A price gives every layer a division into bands, many prices give many of
them, and the budget (`methods.budget`) then chooses between these and one width for the whole layer by exact bytes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from tqdm.auto import tqdm

from difloat import distributed
from difloat.layers import packed
from difloat.methods import closed_form, layer_times
from difloat.methods.budget import Allotment, Candidate, allot
from difloat.methods.byte_counts import budget_of, layer_bytes, mixed_bytes
from difloat.methods.closed_form import ClosedFormSettings, Inputs
from difloat.methods.finished import facts_of
from difloat.methods.fitted_levels import fitted
from difloat.methods.layer_rounding import Asked
from difloat.methods.moments import Moments, Source
from difloat.methods.picture_budget import is_large
from difloat.methods.second_order import factor, nearest_row_error, round_second_order
from difloat.methods.sensitivity import SensitivitySettings, probes_of, sensitivities
from difloat.methods.task import MixedRows, Task
from difloat.methods.training.timestep_weights import loss_weights
from difloat.plan.plan import LayerPlan
from difloat.plan.rules import Rule, draft_layer
from difloat.plan.target import FILES, Target, restrict

_SAMPLE_ROWS = 128  # of a layer, by which widths are compared
_MEASURED_BITS = 5  # beyond it an additional bit is known to leave a quarter of the error
_PRICES = 48  # of a byte, that divide a layer into bands
ROWS_TOGETHER = 16  # bands are multiples of it, for the sake of kernels


@dataclass(frozen=True)
class WidthSettings:
    """How formats are chosen.

    Attributes:
        by: Whether rows of a layer may get several widths, or layers one each.
        size: Bytes of all parameters and stored buffers of the model. None takes what the bits asked for take.
        factor_power: Power of the sampler's factors that weighs timesteps. Without a sampler all weigh alike.
        sensitivity: What is looked at to tell what errors do to the output.
    """

    by: Literal["rows", "layers"] = "rows"
    size: int | None = None
    factor_power: float = 2.0
    sensitivity: SensitivitySettings = field(default_factory=SensitivitySettings)


@dataclass(frozen=True)
class Choice:
    """What every layer's weight becomes.

    Attributes:
        asked: The rule of every layer.
        found: What the budget says of it.
        offers: The candidates of every layer with one width, as format, bytes, and what its rounding does to the output.
        most_time: The seconds that all layers may take together, or infinity without a limit.
        seconds: The expected seconds of every layer, and those of the float layer. It is empty without a limit.
    """

    asked: dict[str, Asked]
    found: Allotment
    offers: dict[str, list[tuple[str, int, float]]]
    most_time: float = math.inf
    seconds: dict[str, tuple[float, float]] = field(default_factory=dict)

    def report(self) -> dict[str, Any]:
        """Plain data for a plan's measurements."""
        timed = {
            "seconds": {name: list(pair) for name, pair in self.seconds.items()},
            "most_seconds": self.most_time,
        }
        return {
            "formats": {name: _words(asked) for name, asked in self.asked.items()},
            "bytes": self.found.size,
            "error": self.found.error,
            "optimal": self.found.optimal,
            "offers": {name: [list(one) for one in offers] for name, offers in self.offers.items()},
            **(timed if self.seconds else {}),
        }


@dataclass(frozen=True)
class _Layer:
    """What is known of a layer.

    The rules are sorted by width. `score` [o] times `ratios` [widths] is the error of a row at a width.
    """

    plan: LayerPlan
    rules: tuple[Rule, ...]
    score: Tensor = field(repr=False)
    ratios: tuple[float, ...]
    divisible: bool
    target: Target = "any"

    @property
    def row_bytes(self) -> Tensor:
        """Bytes of a row at every width, [widths]."""
        sizes = [layer_bytes(self.plan, rule, self.target) for rule in self.rules]
        return torch.tensor(sizes, dtype=torch.float64) / self.plan.shape[0]


def choose(
    task: Task,
    plans: Mapping[str, LayerPlan],
    inputs: Inputs,
    offers: Mapping[str, Sequence[Rule]],
    fixed: Mapping[str, Rule],
    settings: WidthSettings,
    rounding: ClosedFormSettings,
) -> Choice:
    """The formats with which the output's error is least within a budget of bytes.

    Args:
        task: Model and data.
        plans: Layers with inputs.
        inputs: What `closed_form.inputs_of` gave for them.
        offers: A rule of one format for every width, ascending, for the layers whose weights are up for choice.
        fixed: What is asked of the weights of the other layers.
        settings: How formats are chosen.
        rounding: Settings of the rounding that follows.

    Raises:
        ValueError: as `allot` and `sensitivities`; if the smallest candidates do not fit into `WidthSettings.size`, or not
            beside the branches.
    """
    budget = budget_of(task, plans, fixed, offers, settings.size)
    if beside := closed_form.branch_bytes(plans, inputs, rounding):
        budget -= beside
        _check_room(task, plans, offers, budget, beside)
    by_time = loss_weights(task, settings.factor_power if task.scheduler is not None else 0.0)
    gamma = distributed.on_main(
        lambda: _gamma(task, plans, inputs, list(offers), by_time, settings.sensitivity)
    )
    shared = distributed.shared(lambda: _looks(task, plans, inputs, offers, rounding))
    looks = {name: look for each in shared for name, look in each.items()}
    known = {
        name: _layer(task, plans[name], offers[name], *looks[name], gamma[name], source.groups == 1)
        for source in inputs.found
        for name in source.names
        if name in offers
    }
    every = {name: _candidates(known[name], settings.by) for name in offers}
    most_time, seconds = math.inf, {}
    if task.target == "cpu":
        timed = layer_times.timed(task, plans, every, budget)
        every, most_time, floating = timed.candidates, timed.most_time, timed.floating
    found = allot(
        {name: [one for _, one in candidates] for name, candidates in every.items()}, budget, most_time
    )
    if task.target == "cpu":
        seconds = {name: (every[name][pick][1].time, floating[name]) for name, pick in found.picks.items()}
    listed = {
        name: [(_words(asked), one.size, one.error) for asked, one in every[name] if isinstance(asked, Rule)]
        for name in offers
    }
    asked = {name: every[name][pick][0] for name, pick in found.picks.items()}
    return Choice(asked, found, listed, most_time, seconds)


def _check_room(
    task: Task, plans: Mapping[str, LayerPlan], offers: Mapping[str, Sequence[Rule]], left: int, beside: int
) -> None:
    """Refuse branches of so many bytes that the smallest candidates do not fit into what is left."""
    least = sum(
        min(layer_bytes(plans[n], rule, task.target) for rule in rules) for n, rules in offers.items()
    )
    if left < least:
        raise ValueError(
            f"branches must leave the {least} bytes of the smallest weights, got {beside} bytes of branches in a budget of "
            f"{left + beside}; choose a smaller rank or more bits"
        )


def _gamma(
    task: Task,
    plans: Mapping[str, LayerPlan],
    inputs: Inputs,
    names: list[str],
    by_time: Mapping[float, float],
    settings: SensitivitySettings,
) -> dict[str, Tensor]:
    """Sensitivities of the output, [o] by layer."""
    facts = [
        "sensitivities",
        repr(settings),
        json.dumps(sorted(by_time.items())),
        *facts_of(task, names, plans),
    ]
    kept = inputs.finished.read(facts)
    if kept is not None:
        return kept[0]
    gamma = sensitivities(task.model, probes_of(task, settings, by_time), names, settings, task.seed)
    inputs.finished.write(facts, gamma, {})
    return gamma


def _looks(
    task: Task,
    plans: Mapping[str, LayerPlan],
    inputs: Inputs,
    offers: Mapping[str, Sequence[Rule]],
    rounding: ClosedFormSettings,
) -> dict[str, tuple[Tensor, Tensor]]:
    """What `_look` says of this process's layers in `offers`, as far as it is not kept from an earlier run."""
    own = inputs.own(task)
    facts = {
        source: ["looked at", repr(rounding), repr([offers.get(name) for name in source.names])]
        + facts_of(task, source.names, plans)
        for source in own
    }
    done: dict[str, tuple[Tensor, Tensor]] = {}
    open_: list[Source] = []
    for source in own:
        kept = inputs.finished.read(facts[source])
        if kept is None:
            open_.append(source)
        else:
            done |= {name: (kept[0][f"{name}.nearest"], kept[0][f"{name}.ratios"]) for name in kept[1]}
    shown = task.progress and distributed.is_main()
    of_open = inputs.kept.gather(task.model, inputs.calls, plans, rounding.moments, open_, keep=True)
    with closing(of_open) as gathered, tqdm(desc="choose widths", total=len(own), disable=not shown) as bar:
        bar.update(len(own) - len(open_))
        for moments in gathered:
            names = [name for name in moments.source.names if name in offers]
            seen = {name: _look(task, name, plans[name], offers[name], moments, rounding) for name in names}
            tensors = {f"{name}.nearest": nearest for name, (nearest, _) in seen.items()}
            tensors |= {f"{name}.ratios": ratios for name, (_, ratios) in seen.items()}
            inputs.finished.write(facts[moments.source], tensors, dict.fromkeys(names, ""))
            done |= seen
            bar.update()
    return done


def _look(
    task: Task,
    name: str,
    plan: LayerPlan,
    rules: Sequence[Rule],
    moments: Moments,
    settings: ClosedFormSettings,
) -> tuple[Tensor, Tensor]:
    """Errors of rows when they are rounded to nearest at one width, [o], and what every width makes of them, [widths]."""
    weight = plan.rotated(packed.weight_of(task.model, name).detach())
    splits = [part.channels for part in plan.parts]
    rules = [restrict(rule, task.target) for rule in rules]
    middle = min(rules, key=lambda rule: abs(rule.formats[0].bits - 4))
    # Of large models errors of columns count as independent, since products with the moments of every width take too long.
    large = is_large(task.model)
    error_of = partial(nearest_row_error, moments=moments.matrix, independent=large)
    # Of rows that are rounded exactly, float32 sums may come out a little below zero.
    nearest = error_of(draft_layer(weight, splits, middle)).cpu().clamp_min(0)
    chosen = torch.arange(len(weight))
    if len(weight) > _SAMPLE_ROWS and moments.source.groups == 1:
        draw = torch.Generator().manual_seed(task.seed)
        chosen = torch.randperm(len(weight), generator=draw)[:_SAMPLE_ROWS].sort().values
    some, base = weight[chosen.to(weight.device)], float(nearest[chosen].sum())
    ratios: list[float] = []
    solved = factor(moments.matrix, settings.rounding)
    for rule, before in zip(rules, (None, *rules), strict=False):
        if ratios and before is not None and before.formats[0].bits >= _MEASURED_BITS:
            ratios.append(ratios[-1] / 4 ** (rule.formats[0].bits - before.formats[0].bits))
            continue
        draft = draft_layer(some, splits, fitted(rule, some, splits, moments.matrix))
        if large:  # rounding some rows of every layer at every width would take longer than pictures do
            error = solved.share * float(error_of(draft).sum())
        else:
            error = float(
                round_second_order(draft, moments.matrix, settings.rounding, solved).row_error.sum()
            )
        ratios.append(max(0.0, error) / base if base else 0.0)
    return nearest, torch.tensor(ratios, dtype=torch.float64)


def _layer(
    task: Task,
    plan: LayerPlan,
    rules: Sequence[Rule],
    nearest: Tensor,
    ratios: Tensor,
    gamma: Tensor,
    divisible: bool,
) -> _Layer:
    known = tuple(restrict(rule, task.target) for rule in rules)
    score = gamma.double() * nearest.double()
    return _Layer(plan, known, score, tuple(ratios.tolist()), divisible, task.target)


def _candidates(layer: _Layer, by: Literal["rows", "layers"]) -> list[tuple[Asked, Candidate]]:
    """One width for all rows, at every width, and divisions into bands if rows may differ."""
    total = float(layer.score.sum())
    found: list[tuple[Asked, Candidate]] = [
        (rule, Candidate(layer_bytes(layer.plan, rule, layer.target), total * ratio))
        for rule, ratio in zip(layer.rules, layer.ratios, strict=True)
    ]
    if by == "layers" or not layer.divisible or layer.target in FILES:
        return found
    order = layer.score.argsort(descending=True, stable=True)
    sums = torch.cat([torch.zeros(1, dtype=torch.float64), layer.score[order].cumsum(0)])
    for counts in _divisions(layer, layer.score[order]):
        bands = [
            (rule, ratio, n) for rule, ratio, n in zip(layer.rules, layer.ratios, counts, strict=True) if n
        ]
        bands.reverse()  # rows that matter most come first
        ends = torch.tensor([0, *[n for _, _, n in bands]]).cumsum(0)
        error = sum(ratio * float(sums[ends[k + 1]] - sums[ends[k]]) for k, (_, ratio, _) in enumerate(bands))
        rows = MixedRows(tuple(rule for rule, _, _ in bands), tuple(n for _, _, n in bands), order)
        found.append((rows, Candidate(mixed_bytes(layer.plan, rows), error)))
    return found


def _divisions(layer: _Layer, falling: Tensor) -> list[tuple[int, ...]]:
    """Counts of rows of every width at many prices of a byte, several widths each, with the scores `falling` [o] in order."""
    sizes, ratios = layer.row_bytes, torch.tensor(layer.ratios, dtype=torch.float64)
    steps = (ratios[:-1] - ratios[1:]) / (sizes[1:] - sizes[:-1])  # what a byte saves per score
    positive, steps = falling[falling > 0], steps[steps > 0]
    if not len(positive) or not len(steps):
        return []
    low, high = float(positive.min() * steps.min()), float(positive.max() * steps.max())
    found: dict[tuple[int, ...], None] = {}
    for price in torch.logspace(math.log10(low), math.log10(high), _PRICES, dtype=torch.float64):
        picks = (falling[:, None] * ratios + price * sizes).argmin(1)
        # Errors fall with the width, so widths fall with the rows; ends of bands are moved to multiples.
        at_least = [int((picks >= width).sum()) for width in range(len(ratios))]
        ends = [min(len(falling), round(n / ROWS_TOGETHER) * ROWS_TOGETHER) for n in at_least]
        ends[0] = len(falling)
        counts = tuple(a - b for a, b in zip(ends, (*ends[1:], 0), strict=True))
        if sum(n > 0 for n in counts) > 1 and min(n for n in counts if n) >= ROWS_TOGETHER:
            found[counts] = None
    return list(found)


def _words(asked: Asked) -> str:
    rules = (asked,) if isinstance(asked, Rule) else asked.rules
    return "/".join(rule.formats[0].name for rule in rules)
