"""Expected times of layers on this machine, which limit a choice of formats beside its bytes.

A choice may take as long as the widest single format that the bytes allow, which is what it competes with. Nor may a layer
be slower than in float, as far as another candidate of it is faster.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from difloat.kernels import latency
from difloat.kernels.latency import Kind, kind_of
from difloat.layers import packed
from difloat.methods.budget import Candidate, least_time
from difloat.methods.layer_rounding import Asked
from difloat.methods.task import Task
from difloat.methods.trace import Call
from difloat.plan.plan import LayerPlan
from difloat.plan.rules import Rule
from difloat.plan.specs import Part

SLOWDOWN = 1.05  # of the widest single format's time, since measured times are off by as much
_ROWS = 2  # of a call, as guidance makes it


@dataclass(frozen=True)
class Timed:
    """Candidates with their times, and the limit.

    Attributes:
        candidates: What is asked of every layer, and what it costs.
        most_time: The seconds that all chosen candidates may take together.
        floating: The seconds of every float layer.
    """

    candidates: dict[str, list[tuple[Asked, Candidate]]]
    most_time: float
    floating: dict[str, float]


def timed(
    task: Task,
    plans: Mapping[str, LayerPlan],
    candidates: Mapping[str, Sequence[tuple[Asked, Candidate]]],
    budget: int,
) -> Timed:
    """Candidates with the times that they take on this machine, which measures what it does not know yet.

    Args:
        task: Model and data; two calibration rows are sent through the model to count tokens.
        plans: Layers with inputs.
        candidates: What may be asked of every layer's weight, first one rule for all rows by ascending width.
        budget: The bytes of all candidates that are chosen.

    Raises:
        OSError: if the user's cache cannot be written.
    """
    names = list(candidates)
    rows = range(min(_ROWS, len(task.calibration)))
    tokens = _tokens(task.model, task.calibration.batch(list(rows)), names)
    layers = {name: _Layer(task, plans[name], tokens.get(name, 0), name) for name in names}
    kinds = {
        kind: None
        for name in names
        for kind in (*layers[name].kinds([asked for asked, _ in candidates[name]]), *layers[name].floats())
    }
    latency.measure(kinds, tqdm.write if task.progress else _quietly)
    known = {
        name: [(asked, replace(one, time=layers[name].seconds(asked))) for asked, one in candidates[name]]
        for name in names
    }
    floating = {name: layers[name].floating() for name in names}
    fast = {name: _fast_enough(known[name], floating[name], tokens.get(name, 0)) for name in names}
    smallest = sum(min(one.size for _, one in offered) for offered in fast.values())
    kept = fast if smallest <= budget else known  # bytes are what was asked for first
    least = least_time({name: [one for _, one in offered] for name, offered in kept.items()}, budget)
    return Timed(kept, max(SLOWDOWN * _of_one_format(known, budget), least), floating)


def _quietly(text: str) -> None:
    """Say nothing."""


class _Layer:
    """What is known of the shape of a layer and its calls."""

    def __init__(self, task: Task, plan: LayerPlan, tokens: int, name: str) -> None:
        self.plan, self.tokens = plan, tokens
        self.kernel = tuple(plan.shape[2:])
        self.dtype = packed.weight_of(task.model, name).dtype

    def _kinds(self, rule: Rule) -> list[Kind]:
        return [
            self._kind(replace(part, weight=rule.spec(rule.formats[0])), part) for part in self.plan.parts
        ]

    def _kind(self, part: Part | None, of: Part) -> Kind:
        return kind_of(part, of.channels, self.tokens, self.kernel, self.dtype)

    def kinds(self, asked: Sequence[Asked]) -> list[Kind]:
        """What must be measured for these candidates."""
        rules = {rule for one in asked for rule in ((one,) if isinstance(one, Rule) else one.rules)}
        return [kind for rule in rules for kind in self._kinds(rule)]

    def floats(self) -> list[Kind]:
        """What must be measured of the float layer."""
        return [self._kind(None, part) for part in self.plan.parts]

    def _sum(self, kinds: Sequence[Kind], rows: int) -> float:
        times = [
            latency.seconds(kind, rows, part.channels, self.tokens)
            for kind, part in zip(kinds, self.plan.parts, strict=True)
        ]
        return math.fsum(time for time in times if time is not None)

    def seconds(self, asked: Asked) -> float:
        """Expected seconds of a call."""
        if isinstance(asked, Rule):
            return self._sum(self._kinds(asked), self.plan.shape[0])
        bands = zip(asked.rules, asked.counts, strict=True)
        return math.fsum(self._sum(self._kinds(rule), count) for rule, count in bands)

    def floating(self) -> float:
        """Expected seconds of a call of the float layer."""
        return self._sum(self.floats(), self.plan.shape[0])


def _fast_enough(
    offered: Sequence[tuple[Asked, Candidate]], floating: float, tokens: int
) -> list[tuple[Asked, Candidate]]:
    """The candidates that are not slower than float, or the fastest one if all are."""
    limit = floating / latency.slowest(tokens)
    kept = [one for one in offered if one[1].time <= limit]
    return kept or [min(offered, key=lambda one: one[1].time)]


def _of_one_format(known: Mapping[str, Sequence[tuple[Asked, Candidate]]], budget: int) -> float:
    """Seconds of all layers at the widest format that all of them can have within the budget."""
    single = [[one for asked, one in offered if isinstance(asked, Rule)] for offered in known.values()]
    widths = range(min(map(len, single)))
    fitting = [n for n in widths if sum(layer[n].size for layer in single) <= budget]
    return math.fsum(layer[max(fitting, default=0)].time for layer in single)


def _tokens(model: nn.Module, call: Call, names: Sequence[str]) -> dict[str, int]:
    """Tokens, or pixels of the result, that every layer makes in one call of the model."""
    found: dict[str, int] = {}

    def counting(name: str, axis: int) -> Callable[[nn.Module, object, Tensor], None]:
        def after(layer: nn.Module, inputs: object, result: Tensor) -> None:
            found[name] = found.get(name, 0) + result.numel() // max(1, result.shape[axis])

        return after

    with ExitStack() as stack, torch.no_grad():
        for name in names:
            axis = 1 if packed.weight_of(model, name).dim() == 4 else -1
            handle = model.get_submodule(name).register_forward_hook(counting(name, axis))
            stack.callback(handle.remove)
        model(*call[0], **call[1])
    return found
