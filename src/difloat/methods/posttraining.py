"""Post-training quantization from end to end: trace, search weights, learn rounding block by block, search inputs.

The recipes that do not fine-tune are settings of this one sequence.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from tqdm.auto import tqdm

from difloat import layers
from difloat.calibration import Calibration
from difloat.methods import observe
from difloat.methods.adaround import Learned, RoundingSettings, learn_rounding
from difloat.methods.assign import Draft, Rule, draft_layer, search_inputs
from difloat.methods.observe import Trace
from difloat.methods.target import Target, restrict
from difloat.quantizer import LayerPlan

_TARGETS_AT_ONCE = 8  # blocks whose full-precision outputs are held at a time


@dataclass(frozen=True)
class Bits:
    """Widths of weights and activations; `activation` None leaves activations as they are."""

    weight: int
    activation: int | None

    @staticmethod
    def parse(text: str) -> Bits:
        """Read "w4a8"; 16 or 32 activation bits mean unquantized. ValueError on anything else."""
        match = re.fullmatch(r"w(\d+)a(\d+)", text.strip().lower())
        if not match:
            raise ValueError(
                f"bits must look like 'w4a8', got {text!r}; write weight bits and activation bits"
            )
        weight, activation = int(match.group(1)), int(match.group(2))
        if not 2 <= weight <= 8 or not (2 <= activation <= 8 or activation in (16, 32)):
            raise ValueError(
                f"bits must be 2 to 8 for weights and 2 to 8, 16 or 32 for activations, got {text!r}"
            )
        return Bits(weight, activation if activation <= 8 else None)


@dataclass(frozen=True)
class Task:
    """What every recipe is given.

    Attributes:
        model: The float denoiser; stays untouched.
        calibration: Its inputs along trajectories.
        bits: What the user asked for.
        seed: Of everything random.
        progress: Show progress bars.
        work_dir: Where finished blocks are kept, so that a killed run goes on after them; None keeps nothing.
        target: The machine whose fast formats the recipe's candidates are restricted to.
    """

    model: nn.Module
    calibration: Calibration
    bits: Bits
    seed: int = 0
    progress: bool = True
    work_dir: Path | None = None
    target: Target = "any"


@dataclass(frozen=True)
class LayerRules:
    """What is asked of one layer; `learn` says whether its rounding is learned."""

    weight: Rule
    activation: Rule | None
    learn: bool = False


@dataclass(frozen=True)
class Sequencing:
    """Settings of the sequence that are not about one layer.

    Attributes:
        split: Quantize the pieces of skip concatenations apart.
        rounding: How rounding is learned where a layer asks for it.
        inputs: Block inputs during learning: from the quantized or from the full-precision prefix.
        rounding_rows: Calibration rows for learning.
        activation_rows: Calibration rows for the search over activations (one forward pass holds them all).
    """

    split: bool = True
    rounding: RoundingSettings = field(default_factory=RoundingSettings)
    inputs: Literal["quantized", "full"] = "quantized"
    rounding_rows: int = 256
    activation_rows: int = 128


@dataclass(frozen=True)
class Outcome:
    """Layers and reasons for a plan, and what was measured on the way."""

    layers: dict[str, LayerPlan]
    skipped: dict[str, str]
    measured: dict[str, Any]


def keeps_8bit(name: str, seen: Trace, keep: Sequence[str]) -> bool:
    """Whether `keep` names this layer: itself, "first" (reads the sample) or "last" (called last)."""
    return name in keep or ("first" in keep and name in seen.first) or ("last" in keep and name == seen.last)


def run(task: Task, rules_for: Callable[[str, Trace], LayerRules], settings: Sequencing) -> Outcome:
    """Carry out the sequence.

    Args:
        task: Model and data.
        rules_for: What is asked of a layer, given its name and the trace.
        settings: See there.

    Raises:
        ValueError: if the model has no layer to quantize, or a weight is not finite (the layer is named).
    """
    generator = torch.Generator().manual_seed(task.seed)
    measured: dict[str, Any] = {"seconds": {}, "blocks": {}}
    candidates = layers.quantizable(task.model)
    if not candidates:
        raise ValueError(
            "model must have linear or convolution layers to quantize, got none; is it quantized already?"
        )
    seen = observe.trace(task.model, task.calibration.batch(task.calibration.stratified(2, generator)))
    skipped = {name: "not called by the forward pass" for name in candidates if name not in seen.order}
    rules = {name: _on_target(rules_for(name, seen), task.target) for name in seen.order}
    with _timed(measured, "search weights"):
        drafts = _search_weights(task, rules, seen, settings)
    twin = layers.shadow(task.model)
    for name, draft in drafts.items():
        layers.install(twin, name, draft.plan())
    if any(rule.learn for rule in rules.values()):
        with _timed(measured, "learn rounding"):
            drafts = _learn_blocks(task, twin, drafts, rules, settings, generator, measured["blocks"])
    input_rules = {name: rule.activation for name, rule in rules.items() if rule.activation is not None}
    if input_rules:
        with _timed(measured, "search activations"):
            rows = task.calibration.stratified(
                min(settings.activation_rows, len(task.calibration)), generator
            )
            drafts = search_inputs(twin, task.calibration.batch(rows), drafts, input_rules, generator)
    return Outcome({name: draft.plan() for name, draft in drafts.items()}, skipped, measured)


def _on_target(rules: LayerRules, target: Target) -> LayerRules:
    activation = None if rules.activation is None else restrict(rules.activation, target)
    return replace(rules, weight=restrict(rules.weight, target), activation=activation)


@contextmanager
def _timed(measured: dict[str, Any], name: str) -> Any:
    start = time.perf_counter()
    yield
    measured["seconds"][name] = time.perf_counter() - start


def _search_weights(
    task: Task, rules: Mapping[str, LayerRules], seen: Trace, settings: Sequencing
) -> dict[str, Draft]:
    drafts = {}
    for name in tqdm(seen.order, desc="search weights", disable=not task.progress):
        weight = layers.weight_of(task.model, name)
        if not torch.isfinite(weight).all():
            raise ValueError(
                f"weights must be finite, got NaN or Inf in layer {name!r}; repair the checkpoint"
            )
        splits = list(seen.splits.get(name, ())) if settings.split else []
        fits = sum(splits) == weight.shape[1]  # not so for grouped convolutions
        drafts[name] = draft_layer(weight, splits if fits else [weight.shape[1]], rules[name].weight)
    return drafts


def _learn_blocks(
    task: Task,
    twin: nn.Module,
    drafts: Mapping[str, Draft],
    rules: Mapping[str, LayerRules],
    settings: Sequencing,
    generator: torch.Generator,
    measured: dict[str, Any],
) -> dict[str, Draft]:
    """Learn the rounding of every block in the order of execution; each is installed in `twin` before the next."""
    order = list(drafts)
    units = {
        unit: [n for n in names if n in rules and rules[n].learn]
        for unit, names in layers.blocks(task.model).items()
    }
    units = {unit: names for unit, names in units.items() if names}
    units = dict(sorted(units.items(), key=lambda item: min(order.index(name) for name in item[1])))
    rows = task.calibration.stratified(min(settings.rounding_rows, len(task.calibration)), generator)
    calls = [task.calibration.batch(rows[at : at + 32]) for at in range(0, len(rows), 32)]
    store = _store(task, drafts, settings, rows)
    done = dict(drafts)
    targets: dict[str, Any] = {}
    bar = tqdm(
        total=len(units) * settings.rounding.iterations, desc="learn rounding", disable=not task.progress
    )
    for number, (unit, names) in enumerate(units.items()):
        saved = _restore(store, number)
        if saved is None:
            if unit not in targets:
                ahead = list(units)[number : number + _TARGETS_AT_ONCE]
                targets = observe.outputs_of(task.model, ahead, calls)
            source = twin if settings.inputs == "quantized" else task.model
            inputs = observe.inputs_of(source, unit, calls)
            inside = {name.removeprefix(unit).removeprefix("."): done[name] for name in names}
            seeded = torch.Generator().manual_seed(task.seed + 1000 + number)
            block = task.model.get_submodule(unit)
            learned = learn_rounding(
                block, inside, inputs, targets[unit], settings.rounding, seeded, bar.update
            )
            _keep(store, number, learned)
        else:
            learned = saved
            bar.update(settings.rounding.iterations)
        for name in names:
            value = learned.weights[name.removeprefix(unit).removeprefix(".")]
            done[name] = replace(done[name], rounded=value)
            layers.install(twin, name, done[name].plan())
        measured[unit] = {"nearest": learned.error_nearest, "learned": learned.error_learned}
    bar.close()
    return done


def _store(task: Task, drafts: Mapping[str, Draft], settings: Sequencing, rows: Sequence[int]) -> Path | None:
    """The folder for finished blocks of exactly this task, or None."""
    if task.work_dir is None:
        return None
    facts = [repr(settings), repr(task.bits), task.seed, list(rows), task.calibration.timesteps]
    facts += [[name, draft.error, repr(draft.parts)] for name, draft in drafts.items()]
    name = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]
    folder = task.work_dir / f"rounding-{name}"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _keep(folder: Path | None, number: int, learned: Learned) -> None:
    if folder is None:
        return
    path = folder / f"{number:04d}.safetensors"
    errors = {"nearest": repr(learned.error_nearest), "learned": repr(learned.error_learned)}
    tensors = {f".{name}": weight.contiguous() for name, weight in learned.weights.items()}
    save_file(tensors, path.with_suffix(".part"), metadata=errors)
    os.replace(path.with_suffix(".part"), path)


def _restore(folder: Path | None, number: int) -> Learned | None:
    path = None if folder is None else folder / f"{number:04d}.safetensors"
    if path is None or not path.exists():
        return None
    with safe_open(path, "pt") as file:
        errors = file.metadata()
    weights = {name.removeprefix("."): weight for name, weight in load_file(path).items()}
    return Learned(weights, float(errors["nearest"]), float(errors["learned"]))
