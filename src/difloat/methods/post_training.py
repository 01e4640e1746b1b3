"""Post-training quantization from end to end: trace, search weights, learn rounding block by block, search inputs.

The recipes that do not fine-tune are settings of this one sequence.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from difloat import distributed
from difloat.layers import attention, dtype_readers, install, packed
from difloat.layers.exclude import EXCLUDED, matches
from difloat.methods import malloc_trim, readers, trace
from difloat.methods.blockwise import learn_blocks
from difloat.methods.input_search import search_inputs
from difloat.methods.picture_budget import is_large
from difloat.methods.structure import structure, unread
from difloat.methods.task import LayerRules, Sequencing, Smoothing, Task
from difloat.methods.trace import Trace
from difloat.plan import vllm_models
from difloat.plan.encode import join_rows, join_variants
from difloat.plan.plan import LayerPlan
from difloat.plan.rules import Bits, Draft, draft_layer
from difloat.plan.specs import AttentionPlan
from difloat.plan.target import COMFY_ROTATION, FILES, Target, fit, fit_inputs, restrict

__all__ = [
    "Bits",
    "LayerRules",
    "Outcome",
    "Sequencing",
    "Smoothing",
    "Task",
    "Trace",
    "keeps_8bit",
    "run",
    "timed",
    "timestep_grid",
]


_RANGE_TIMESTEPS, _FEW_RANGE_TIMESTEPS, _RANGE_LAYERS = 20, 4, 4  # shown in reports, fewer of large models


@dataclass(frozen=True)
class Outcome:
    """Layers, attention and reasons for a plan, and what was measured on the way.

    `used` has the values of options that were used in place of what was asked for, and `seen` is the trace of a forward pass.
    """

    layers: dict[str, LayerPlan]
    skipped: dict[str, str]
    measured: dict[str, Any]
    attention: dict[str, AttentionPlan] = field(default_factory=dict)
    timesteps: tuple[float, ...] = ()
    used: Mapping[str, Any] = field(default_factory=dict)
    seen: Trace = field(default_factory=Trace, repr=False)


def keeps_8bit(name: str, seen: Trace, keep: Sequence[str]) -> bool:
    """Whether `keep` names this layer: itself, "first" (reads the sample) or "last" (gives the prediction).

    Raises:
        ValueError: if `keep` names a layer that the model does not call.
    """
    unknown = set(keep) - {"first", "last"} - set(seen.order)
    if unknown:
        raise ValueError(
            f"keep_8bit must name 'first', 'last' or layers that the model calls, got {min(unknown)!r}; see "
            "difloat inspect --layers"
        )
    return name in keep or ("first" in keep and name in seen.first) or ("last" in keep and name == seen.last)


def run(
    task: Task,
    rules_for: Callable[[str, Trace], LayerRules | str],
    settings: Sequencing,
    attention_plan: AttentionPlan | None = None,
) -> Outcome:
    """Carry out the sequence.

    In a launch of several processes the main one decides and the others wait for its outcome: every search and every block
    builds on those before it.

    Args:
        task: Model and data.
        rules_for: What is asked of a layer, given its name and the trace; or the reason why it stays as it is.
        settings: The order of the work, and whether and how weights are learned.
        attention_plan: How every attention that the trace finds is quantized. None leaves all of them.

    Raises:
        ValueError: if no layer is left to quantize.
    """
    generator = torch.Generator().manual_seed(task.seed)
    candidates = packed.quantizable(task.model)
    seen, read = _looked_at(task, generator)
    wished = [name for name in seen.order if (task.only is None or name in task.only) and name not in read]
    decided = {name: EXCLUDED if name in task.exclude.names else rules_for(name, seen) for name in wished}
    if task.target in FILES:
        decided = {name: _for_file(rule, name, candidates[name], task) for name, rule in decided.items()}
        settings, attention_plan = replace(settings, split=False), None
    rules = {
        name: _on_target(rule, task.target) for name, rule in decided.items() if not isinstance(rule, str)
    }
    skipped = {name: "not called by the forward pass" for name in candidates if name not in seen.order}
    skipped |= {name: reason for name, reason in decided.items() if isinstance(reason, str)} | read
    if not rules:
        raise ValueError(
            f"recipe must quantize at least one layer, but keeps all: {next(iter(skipped.values()))}"
        )

    _check_data(task, rules)

    def decide() -> Outcome:
        return _decide(task, rules, skipped, seen, settings, attention_plan, generator)

    return replace(distributed.on_main(decide), seen=seen)


def _looked_at(task: Task, generator: torch.Generator) -> tuple[Trace, dict[str, str]]:
    """What two rows show, or the modules alone without rows, and the layers that must stay with the reason."""
    read = dtype_readers.kept(task.model)
    if not len(task.calibration):
        return structure(task.model), unread(task.model) | read
    args, kwargs = call = task.calibration.batch(task.calibration.stratified(2, generator))
    seen = trace.trace(task.model, call)
    return seen, read | readers.kept(task.model, lambda: task.model(*args, **kwargs), seen.uses)


def _check_data(task: Task, rules: Mapping[str, LayerRules]) -> None:
    """Refuse to go on without rows where rounding is learned or an input has a stored range."""
    asking = (r.learn or (r.activation is not None and not r.activation.online) for r in rules.values())
    if not len(task.calibration) and any(asking):
        raise ValueError(
            "calibration must have rows where rounding is learned or inputs have stored ranges, got none"
        )


def _decide(
    task: Task,
    rules: Mapping[str, LayerRules],
    skipped: dict[str, str],
    seen: Trace,
    settings: Sequencing,
    attention_plan: AttentionPlan | None,
    generator: torch.Generator,
) -> Outcome:
    """Weights, rounding and inputs of the layers that `rules` names."""
    measured: dict[str, Any] = {"seconds": {}, "blocks": {}}
    with timed(measured, "search weights"):
        plans, learn = _search_weights(task, rules, seen, settings)
    malloc_trim.release()
    twin = install.shadow(task.model)
    for name, plan in plans.items():
        install.install(twin, name, plan)
    if learn:
        with timed(measured, "learn rounding"):
            plans |= learn_blocks(task, twin, learn, seen, settings, generator, measured)
    attending = [
        name for name in seen.attention if not any(matches(name, own) for own in task.exclude.patterns)
    ]
    entries = {} if attention_plan is None else dict.fromkeys(attending, attention_plan)
    attention.install(twin, entries)
    wanted = {name: rule.activation for name, rule in rules.items() if rule.activation is not None}
    with timed(measured, "search activations"):
        count = min(settings.activation_rows, len(task.calibration))
        calls = task.calls(task.calibration.stratified(count, generator), seen.row_bytes) if count else []
        plans, measured["inputs"] = search_inputs(twin, calls, plans, wanted, generator)
    by_time = any(plan.schedule for plan in plans.values())
    if wanted and task.only is None and len(task.calibration):
        measured["ranges"] = _widest_ranges(task, list(wanted))
    asked = min(settings.rounding_rows, len(task.calibration))
    cut = learn and measured["rounding_rows"] < asked  # by memory; else the option says it
    used = {"rounding_rows": measured["rounding_rows"]} if cut else {}
    return Outcome(plans, skipped, measured, entries, timestep_grid(task) if by_time else (), used)


def _widest_ranges(task: Task, names: list[str]) -> dict[str, dict[float, list[float]]]:
    """Ranges by token and timestep of the inputs where the largest is furthest above the typical."""
    first = {timestep: row for row, timestep in reversed(list(enumerate(task.calibration.timesteps)))}
    grid = sorted(first, reverse=True)
    most = _FEW_RANGE_TIMESTEPS if is_large(task.model) else _RANGE_TIMESTEPS
    shown = grid[:: -(-len(grid) // most)]
    calls = {timestep: task.calibration.batch([first[timestep]]) for timestep in shown}
    found = trace.token_ranges(task.model, names, calls)

    def spread(name: str) -> float:
        table = torch.tensor(list(found[name].values()))
        return float(table.max() / table[:, len(trace.SHARES) // 2].median().clamp_min(1e-12))

    return {name: found[name] for name in sorted(names, key=spread, reverse=True)[:_RANGE_LAYERS]}


def _for_file(rules: LayerRules | str, name: str, layer: nn.Module, task: Task) -> LayerRules | str:
    """The rules so that a kind of file holds the layer, or the reason why it stays as it is."""
    if isinstance(rules, str):
        return rules
    if task.target == "vllm" and (reason := vllm_models.left_float(type(task.model).__name__, name)):
        return reason
    weight = cast(nn.Linear, layer).weight
    activation = fit_inputs(task.bits.activation, task.bits.weight, task.target)
    inputs = task.bits.activation
    found = fit(rules.weight, rules.learn, weight.dim() == 2, weight.shape[1], task.target, inputs)
    if isinstance(found, str):
        return found
    rotation = COMFY_ROTATION if found.scales == "whole" else rules.rotation
    return replace(rules, weight=found, activation=activation, rotation=rotation)


def _on_target(rules: LayerRules, target: Target) -> LayerRules:
    activation = None if rules.activation is None else restrict(rules.activation, target)
    mixed = rules.mixed
    if mixed is not None:
        mixed = replace(mixed, rules=tuple(restrict(rule, target) for rule in mixed.rules))
    return replace(rules, weight=restrict(rules.weight, target), activation=activation, mixed=mixed)


@contextmanager
def timed(measured: dict[str, Any], name: str) -> Any:
    """Note the seconds of what is inside under `name`."""
    start = time.perf_counter()
    yield
    measured["seconds"][name] = time.perf_counter() - start


def _search_weights(
    task: Task, rules: Mapping[str, LayerRules], seen: Trace, settings: Sequencing
) -> tuple[dict[str, LayerPlan], dict[str, Draft]]:
    """Layers with weights rounded to nearest, and the drafts of those whose rounding is learned."""
    plans, drafts = {}, {}
    for name, rule in tqdm(rules.items(), desc="search weights", disable=not task.progress):
        weight = packed.weight_of(task.model, name)
        splits = list(seen.splits.get(name, ())) if settings.split else []
        if sum(splits) != weight.shape[1]:  # no concatenation, or one into a grouped convolution
            splits = [weight.shape[1]]
        if rule.rotation is not None:
            turned = draft_layer(rule.rotation.forward(weight.detach()), [weight.shape[1]], rule.weight)
            plans[name] = replace(turned.plan(), rotation=rule.rotation)
            continue
        if rule.smoothing is not None:
            plans[name] = _smooth(weight, splits, rule, rule.smoothing)
            continue
        if rule.mixed is not None:
            plans[name] = _nearest(weight, splits, rule)
            continue
        draft = draft_layer(weight, splits, rule.weight)
        plans[name] = draft.plan()
        if rule.learn:
            drafts[name] = draft
    return plans, drafts


def _smooth(weight: Tensor, splits: Sequence[int], rules: LayerRules, smoothing: Smoothing) -> LayerPlan:
    axes = (1, -1, *[1] * (weight.dim() - 2))
    stretches = [
        _nearest(weight.detach().float() / factors.to(weight.device).reshape(axes), splits, rules)
        for factors in smoothing.factors
    ]
    return join_variants(stretches, smoothing.schedule, smoothing.factors)


def _nearest(weight: Tensor, splits: Sequence[int], rules: LayerRules) -> LayerPlan:
    """The weight rounded to nearest, its rows in bands if that is asked."""
    if rules.mixed is None:
        return draft_layer(weight, splits, rules.weight).plan()
    bands = zip(rules.mixed.rules, rules.mixed.order.split(list(rules.mixed.counts)), strict=True)
    return join_rows(
        [draft_layer(weight[rows], splits, rule).plan() for rule, rows in bands], rules.mixed.order
    )


def timestep_grid(task: Task) -> tuple[float, ...]:
    """The sampler's timesteps as calibration saw them, ascending."""
    return tuple(sorted(set(task.calibration.timesteps)))
