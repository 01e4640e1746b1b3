"""Weights of a plan rounded anew in closed form: second-order rounding under the moments of the inputs that the plan has.

The plan at hand says which layers are quantized and how they round their inputs. Nothing is trained, and no layer waits for
another one, since inputs are those that the float model makes.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from difloat import distributed
from difloat.layers import packed
from difloat.methods import low_rank, malloc_trim
from difloat.methods.finished import Finished, facts_of
from difloat.methods.kept_moments import KeptMoments
from difloat.methods.layer_rounding import Asked, round_layer, with_branch
from difloat.methods.low_rank import LowRankSettings
from difloat.methods.moments import Moments, MomentSettings, Source, cost, sources
from difloat.methods.second_order import SecondOrderSettings, factor
from difloat.methods.task import MixedRows, Task
from difloat.methods.trace import Call
from difloat.plan.plan import LayerPlan, LayerSpec
from difloat.plan.validation import plain, read


@dataclass(frozen=True)
class ClosedFormSettings:
    """How weights are rounded.

    Attributes:
        rounding: How second-order rounding goes.
        moments: What is gathered of inputs.
        rows: Calibration rows for moments.
        branch: The low-rank branch beside weights that can have one and are better with it, or None.
        unbranched: The layers that get no branch.
    """

    rounding: SecondOrderSettings = field(default_factory=SecondOrderSettings)
    moments: MomentSettings = field(default_factory=MomentSettings)
    rows: int = 128
    branch: LowRankSettings | None = None
    unbranched: tuple[str, ...] = ()


@dataclass(frozen=True)
class Inputs:
    """What moments are gathered from, and what is there already.

    Attributes:
        calls: Calls that give layers their inputs.
        found: The distinct inputs among them.
        finished: What an earlier run finished.
        kept: Moments that were looked at once.
    """

    calls: list[Call]
    found: list[Source]
    finished: Finished
    kept: KeptMoments

    def own(self, task: Task) -> list[Source]:
        """The inputs whose layers this process of a launch works on. They follow each other, with about equal work."""
        work = [
            source.columns * sum(packed.weight_of(task.model, name).numel() for name in source.names)
            for source in self.found
        ]
        ends, total = list(itertools.accumulate(work)), sum(work)
        turns = [min((end - 1) * distributed.count() // total, distributed.count() - 1) for end in ends]
        return [
            source for source, turn in zip(self.found, turns, strict=True) if turn == distributed.number()
        ]


def inputs_of(
    task: Task, plans: Mapping[str, LayerPlan], settings: ClosedFormSettings, row_bytes: int
) -> Inputs:
    """What moments of the layers' inputs are gathered from, where a row's largest layer takes `row_bytes`.

    Raises:
        ValueError: if there are no calibration rows.
    """
    if not len(task.calibration):
        raise ValueError("weights must be rounded on calibration rows, got none; collect some, or choose rtn")
    generator = torch.Generator().manual_seed(task.seed)
    rows = task.calibration.stratified(min(settings.rows, len(task.calibration)), generator)
    calls = task.calls(rows, row_bytes)
    few = task.calibration.batch(rows[:2])
    found = sources(task.model, few, plans, settings.moments)
    return Inputs(calls, found, Finished.of(task, len(rows)), KeptMoments(task.work_dir))


def branch_bytes(plans: Mapping[str, LayerPlan], inputs: Inputs, settings: ClosedFormSettings) -> int:
    """The most bytes that branches beside the layers take, which is 0 without branches."""
    if settings.branch is None:
        return 0
    rank = settings.branch.rank
    return sum(
        low_rank.pair_bytes(plans[name], rank)
        for source in inputs.found
        for name in source.names
        if name not in settings.unbranched and low_rank.fits(plans[name], rank, source.groups, source.columns)
    )


def round_anew(
    task: Task,
    plans: Mapping[str, LayerPlan],
    inputs: Inputs,
    asked: Mapping[str, Asked],
    settings: ClosedFormSettings,
) -> tuple[dict[str, LayerPlan], dict[str, Any]]:
    """Second-order rounding of every layer's weight, with the inputs of `plans`.

    Args:
        task: Model and data.
        plans: Layers with inputs.
        inputs: What `inputs_of` gave for them.
        asked: What is asked of the weight of each layer, or of bands of its rows.
        settings: How weights are rounded.

    Returns:
        The layers in the order of `plans`, what gathering took, and by layer the error relative to nearest rounding on the
        searched scales, the damping, and how many input vectors the moments are of.
    """
    done: dict[str, LayerPlan] = {}
    report: dict[str, Any] = {}
    for layers, said in distributed.shared(lambda: _round_own(task, plans, inputs, asked, settings)):
        done, report = done | layers, report | said
    in_order = {name: done[name] for name in plans}
    ordered = {name: report[name] for name in plans}
    return in_order, {"moments": cost(inputs.found, settings.moments), "layers": ordered}


def _round_own(
    task: Task,
    plans: Mapping[str, LayerPlan],
    inputs: Inputs,
    asked: Mapping[str, Asked],
    settings: ClosedFormSettings,
) -> tuple[dict[str, LayerPlan], dict[str, Any]]:
    """The layers that this process of a launch works on, and what is reported of them."""
    done: dict[str, LayerPlan] = {}
    report: dict[str, Any] = {}
    open_: list[Source] = []
    own = inputs.own(task)
    facts = {source: _facts(task, source, plans, asked, settings) for source in own}
    for source in own:
        kept = inputs.finished.read(facts[source])
        if kept is None:
            open_.append(source)
        else:
            _take(done, report, source, *kept)
    shown = task.progress and distributed.is_main()
    of_open = inputs.kept.gather(task.model, inputs.calls, plans, settings.moments, open_, keep=False)
    with closing(of_open) as gathered, tqdm(desc="round weights", total=len(own), disable=not shown) as bar:
        bar.update(len(own) - len(open_))
        for moments in gathered:
            rounded, said = _round(task, plans, asked, moments, settings)
            _keep(inputs.finished, facts[moments.source], moments.source, rounded, said)
            done |= rounded
            report |= said
            malloc_trim.release()
            bar.update()
    return done, report


def _round(
    task: Task,
    plans: Mapping[str, LayerPlan],
    asked: Mapping[str, Asked],
    moments: Moments,
    settings: ClosedFormSettings,
) -> tuple[dict[str, LayerPlan], dict[str, dict[str, float]]]:
    """The layers that read one input, and what is reported of them."""
    done, report = {}, {}
    try:
        known = factor(moments.matrix, settings.rounding)
        for name in moments.source.names:
            weight = plans[name].rotated(packed.weight_of(task.model, name).detach())
            arguments = weight, plans[name], asked[name], moments.matrix
            made = round_layer(*arguments, known, settings.rounding, task.target)
            if settings.branch is not None and name not in settings.unbranched:
                made = with_branch(made, *arguments, settings.branch, settings.rounding, task.target)
            done[name] = _with_inputs(made.plan, plans[name])
            share = made.error / made.nearest if made.nearest else 1.0
            report[name] = {"error": share, "damping": known.damping, "vectors": moments.vectors}
            report[name] |= {"branch": made.rank} if settings.branch is not None else {}
    except ValueError as error:
        raise ValueError(f"layer {moments.source.names[0]!r}: {error}") from error
    return done, report


def _facts(
    task: Task,
    source: Source,
    plans: Mapping[str, LayerPlan],
    asked: Mapping[str, Asked],
    settings: ClosedFormSettings,
) -> list[str]:
    """Everything that the rounded layers of one input depend on."""
    wanted = [
        [repr(of.rules), list(of.counts), of.order.tolist()] if isinstance(of, MixedRows) else repr(of)
        for of in (asked[name] for name in source.names)
    ]
    return ["rounded", repr(settings), json.dumps(wanted), *facts_of(task, source.names, plans)]


def _keep(
    finished: Finished,
    facts: Sequence[str],
    source: Source,
    layers: Mapping[str, LayerPlan],
    report: Mapping[str, Any],
) -> None:
    tensors = {
        f"{number}.{key}": tensor
        for number, name in enumerate(source.names)
        for key, tensor in layers[name].tensors.items()
    }
    texts = {name: json.dumps([plain(layers[name]), report[name]]) for name in source.names}
    finished.write(facts, tensors, texts)


def _take(
    done: dict[str, LayerPlan],
    report: dict[str, Any],
    source: Source,
    tensors: Mapping[str, Tensor],
    texts: Mapping[str, str],
) -> None:
    """Add what `_keep` kept."""
    for number, name in enumerate(source.names):
        data, report[name] = json.loads(texts[name])
        own = {k.split(".", 1)[1]: t for k, t in tensors.items() if k.split(".", 1)[0] == str(number)}
        done[name] = read(LayerSpec, data).with_tensors(own)


def _with_inputs(new: LayerPlan, old: LayerPlan) -> LayerPlan:
    """The layer `new` with the inputs of `old`."""
    parts = tuple(replace(n, activation=o.activation) for n, o in zip(new.parts, old.parts, strict=True))
    stored = {name: tensor for name, tensor in old.tensors.items() if name.startswith("input_")}
    return replace(new, parts=parts, tensors={**new.tensors, **stored}, rotation=old.rotation)
