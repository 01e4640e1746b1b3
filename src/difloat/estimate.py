"""What a run will take, counted from the model's structure and the recipe's own cost: the denoiser is not called for it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from difloat.calibration.collect import sampling_of
from difloat.components import denoiser
from difloat.job import Job
from difloat.layers import dtype_readers, packed
from difloat.layers.exclude import EXCLUDED, Exclusion
from difloat.methods.cost import Cost
from difloat.methods.file_forecast import Ahead, rank_of
from difloat.methods.post_training import keeps_8bit
from difloat.methods.structure import likely, structure, unread
from difloat.numbers import formats
from difloat.plan.rules import Rule
from difloat.plan.target import Target

_WIDE = "8bit"  # what becomes of a layer: this, nothing special, or the reason why it stays


@dataclass(frozen=True)
class Kind:
    """Layers that are alike: the first one's name, their number, weights, packed bytes (0 if they stay) and grids in words."""

    name: str
    count: int
    weights: int
    packed_bytes: int
    weight: str
    inputs: str


@dataclass(frozen=True)
class Forecast:
    """What a run will take.

    Attributes:
        kinds: The kinds of layers.
        float_bytes: The bytes of the denoiser as it is.
        packed_bytes: The bytes of the quantized denoiser, if every packed weight of a layer is used; where a kind of file is
            asked for, those of its tensors.
        target: What is asked for, which may be a kind of file.
        rows: Calibration rows; 0 for a recipe that looks at no data.
        pictures: That calibration samples for them.
        steps: The steps of the sampler for each picture.
        computed: Rows that the denoiser computes after calibration, by stage (`Cost.computed`).
    """

    kinds: tuple[Kind, ...]
    float_bytes: int
    packed_bytes: int
    target: Target
    rows: int
    pictures: int
    steps: int
    computed: Mapping[str, float]


def forecast(
    fitted: Job, prompts: Sequence[str] | None, call_kwargs: Mapping[str, Any] | None = None
) -> Forecast:
    """Count what a run will take for the first denoiser; nothing is run or changed.

    Args:
        fitted: What is asked for, and of which pipeline.
        prompts: The texts to calibrate with, as `difloat.plan` takes them.
        call_kwargs: Further arguments of the pipeline's call, as `difloat.plan` takes them.
    """
    name, bits = next(iter(fitted.denoisers.items()))
    pipeline, settings, module = fitted.model, fitted.request.calibration, denoiser(fitted.model, name)
    own, needs_data = fitted.layer_bits[name], fitted.needs_data(bits)
    costs = {width: fitted.cost(replace(bits, weight=width)) for width in {*own.values()}} | {
        bits.weight: fitted.cost(bits)
    }
    asked, target = costs[min(costs)], fitted.request.target
    fates = _fates(module, asked, fitted.exclusions[name], needs_data)
    shapes = [packed.weight_of(module, layer).shape for layer, fate in fates.items() if not fate]
    ahead = Ahead(target, type(module).__name__, bits, rank_of(asked, shapes))
    alike = _alike(module, fates, own)
    kinds = tuple(
        _kind(module, names, costs[own.get(names[0], bits.weight)], fates[names[0]], ahead) for names in alike
    )
    taken = [name for names, kind in zip(alike, kinds, strict=True) if kind.packed_bytes for name in names]
    float_bytes = sum(tensor.nbytes for tensor in module.state_dict().values())
    counted = ahead.others_bytes(module, taken) + sum(kind.packed_bytes for kind in kinds)
    total = getattr(fitted.request.options, "size", None) or counted
    if not needs_data:
        return Forecast(kinds, float_bytes, total, target, 0, 0, 0, asked.computed(0, 0))
    sampling = sampling_of(pipeline, prompts, settings, call_kwargs)
    computed, pictures = asked.computed(settings.samples, sampling.steps), sampling.batches * sampling.images
    return Forecast(kinds, float_bytes, total, target, settings.samples, pictures, sampling.steps, computed)


def _fates(module: nn.Module, asked: Cost, exclude: Exclusion, needs_data: bool) -> dict[str, str]:
    """What becomes of every layer. The edges are read off the structure, which may differ from what a run shows."""
    layers, seen = packed.quantizable(module), (likely if needs_data else structure)(module)
    outside = layers.keys() - packed.inside_blocks(module)
    of_outside = {"keep": "outside of the blocks", "8bit": _WIDE, "as others": ""}[asked.outside]
    fates = dict.fromkeys(layers, "") | dict.fromkeys(outside, of_outside)
    fates |= {name: _WIDE for name in layers if keeps_8bit(name, seen, asked.keep_8bit)}
    fates |= dict.fromkeys(exclude.names, EXCLUDED)
    return fates | ({} if needs_data else unread(module)) | dtype_readers.kept(module)


def _alike(module: nn.Module, fates: Mapping[str, str], bits: Mapping[str, int]) -> list[list[str]]:
    """The layers at one place in blocks alike. A layer in no block is alone."""
    kinds: dict[tuple[Any, ...], list[list[str]]] = {}
    for unit, members in packed.blocks(module).items():
        shapes = [
            (n.removeprefix(unit) or n, packed.weight_of(module, n).shape, fates[n], bits.get(n))
            for n in members
        ]
        kinds.setdefault(tuple(shapes), []).append(members)
    return [list(names) for units in kinds.values() for names in zip(*units, strict=True)]


def _kind(module: nn.Module, names: Sequence[str], asked: Cost, fate: str, ahead: Ahead) -> Kind:
    shape, count = tuple(packed.weight_of(module, names[0]).shape), len(names)
    weights = math.prod(shape) * count
    if fate not in ("", _WIDE):
        return Kind(names[0], count, weights, 0, "-", fate)
    weight, inputs = asked.weight, asked.activation
    if fate == _WIDE:
        weight, inputs = _of_8_bits(weight), inputs and _of_8_bits(inputs)
    held = ahead.rule(names[0], asked, weight, shape, fate == _WIDE)
    if isinstance(held, str):
        return Kind(names[0], count, weights, 0, "-", held)
    size = ahead.layer_bytes(asked, held, inputs, shape, fate == _WIDE)
    return Kind(names[0], count, weights, size * count, _words(held), _words(inputs) if inputs else "-")


def _of_8_bits(rule: Rule) -> Rule:
    grids = tuple(formats.parse("int8" if own.signed else "uint8") for own in rule.formats)
    return replace(rule, formats=grids)


def _words(rule: Rule) -> str:
    shared = f"{rule.granularity} of {rule.group_size}" if rule.group_size else rule.granularity
    return f"{rule.formats[0].bits} bits per {shared}{', online' * rule.online}"
