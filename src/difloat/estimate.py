"""What a run will take, found by trying a little of it: two denoiser calls, and the recipe on one block of every kind."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from difloat import api, estimate_training, recipes
from difloat.calibration.collect import Calibration, CalibrationSettings, finish_recording, sampling_of
from difloat.calibration.row_store import Shelf
from difloat.calibration.rows import Recorder, recording
from difloat.layers import packed
from difloat.layers.exclude import excluded
from difloat.methods import mixed_rows
from difloat.methods.task import Sequencing, Task
from difloat.pipelines import quiet
from difloat.plan.plan import Plan
from difloat.plan.rules import Bits
from difloat.plan.specs import weight_formats

_TRIAL_STEPS = (2, 6)  # two lengths tell the cost of a step from the cost of a block
_LEARNING_BYTES = (
    40  # per weight of a block in training: neighbours, variable, its gradient and moments, the soft weight
)
_PASSES = 4  # over all rows: full precision, quantized, and the block errors before and after


@dataclass(frozen=True)
class Forecast:
    """What a run will take.

    Attributes:
        calibration: See `probe`.
        trial: Plan of the layers that were tried.
        counts: By name of a tried layer, how many of its kind there are.
        weights: In all layers that will be quantized.
        float_bytes: Of the denoiser as it is.
        packed_bytes: Of the denoiser as it will be, if every adapter is used.
        learning_bytes: Of the largest block whose rounding is learned, in training; 0 without.
        tuning_bytes: Of fine-tuning beside both denoisers and the rows, roughly (`forecast_tuning`); 0 without.
        search_s: Choice of widths, search over weights, and over activations where they are static.
        rounding_s: Learned rounding of all blocks, its forward passes included; 0 without.
        training_s: Fine-tuning of the whole denoiser, roughly; 0 without.
    """

    calibration: Mapping[str, float]
    trial: Plan
    counts: Mapping[str, int]
    weights: int
    float_bytes: int
    packed_bytes: float
    learning_bytes: int
    tuning_bytes: int
    search_s: float
    rounding_s: float
    training_s: float

    @property
    def seconds(self) -> float:
        """Of the whole run, from the first calibration call to the plan."""
        return self.calibration["seconds"] + self.search_s + self.rounding_s + self.training_s

    def rows(self) -> list[tuple[str, int, str, str]]:
        """The plan by kinds of layers: first layer of the kind, how many, weight grid, input grid or the reason to skip."""
        result = []
        for name, count in self.counts.items():
            if name in self.trial.skipped:
                result.append((name, count, "-", self.trial.skipped[name]))
                continue
            layer = self.trial.layers[name]
            part = layer.parts[0]
            spec = part.weight
            size = f" per {spec.group_size}" if spec.group_size else f" per {spec.granularity}"
            taken, way = part.activation, "-"
            if taken is not None:
                found = "online" if taken.online else "static"
                way = f"{taken.format.name} {found} per {taken.granularity}"
            names = weight_formats(layer.shape[0], layer.parts, layer.bands)
            result.append((name, count, names + size, way))
        return result


def probe(
    pipeline: Any,
    prompts: Sequence[str] | None,
    settings: CalibrationSettings,
    *,
    call_kwargs: Mapping[str, Any] | None = None,
) -> tuple[dict[str, float], Calibration]:
    """What `collect` will need, from two timed denoiser calls of a run that is then broken off, and the rows of these calls.

    Returns:
        `rows`, `batches` (pipeline runs), `steps` (of the sampler in each), `calls` (of the denoiser in all; guidance may take
        two per step), `ram_bytes` (peak of the rows held), `disk_bytes` (of the cache, or of the temporary files above
        the budget), `seconds`, and `row_seconds` (of the denoiser, per row). The rows are held in RAM.
    """
    sampling = sampling_of(pipeline, prompts, settings, call_kwargs)
    ticks = [time.perf_counter()]

    def tick() -> None:
        if sampling.device.type == "cuda":
            torch.cuda.synchronize(sampling.device)
        ticks.append(time.perf_counter())
        if len(ticks) == 4:
            raise _Enough

    everything = 1 << 30
    recorder = Recorder(sampling.denoiser, everything, torch.Generator().manual_seed(0), on_call=tick)
    with quiet(pipeline), recording(sampling.denoiser, recorder, sampling.seed(0)):
        try:
            sampling.run(0)
            ticks.append(time.perf_counter())
        except _Enough:
            pass
    finish_recording(recorder)
    size = {key: blob.nbytes for key, blob in recorder.blobs.items()}
    shown_at: dict[str, set[float]] = {key: set() for key in size}
    for row in recorder.rows:
        for leaf in row.leaves:
            shown_at[leaf].add(row.timestep)
    # What one timestep alone shows is taken as new in every row (halves of guidance may share it); what several show
    # comes once per batch.
    passing = [sum(size[key] for key in row.leaves if len(shown_at[key]) == 1) for row in recorder.rows]
    own_bytes = sum(passing) / len(recorder.rows)
    batch_bytes = sum(size[key] for key, seen in shown_at.items() if len(seen) > 1)
    calls = sampling.batches * sampling.steps * recorder.calls_per_step
    total_bytes = int(own_bytes * settings.samples + batch_bytes * sampling.batches)
    per_batch_bytes = int(own_bytes * 2 * -(-settings.samples // sampling.batches) + batch_bytes)
    shelf = Shelf(None, everything, {})
    shelf.put("probe", recorder.rows, recorder.blobs)
    rows_per_call = len(recorder.rows) / recorder.calls
    need = {
        "rows": settings.samples,
        "batches": sampling.batches,
        "steps": sampling.steps,
        "calls": calls,
        "ram_bytes": min(total_bytes, settings.memory_bytes) + per_batch_bytes,
        "disk_bytes": total_bytes,
        "seconds": (ticks[-1] - ticks[-2]) * calls + (ticks[1] - ticks[0]) * sampling.batches,
        "row_seconds": (ticks[-1] - ticks[-2]) / rows_per_call,
    }
    return need, Calibration(shelf.rows, shelf, sampling.device)


class _Enough(Exception):
    """Breaks off the run of `estimate`."""


def forecast(
    pipeline: Any,
    module: nn.Module,
    prompts: Sequence[str] | None,
    settings: CalibrationSettings,
    recipe: str,
    bits: str,
    options: Mapping[str, Any],
    call_kwargs: Mapping[str, Any] | None = None,
    exclude: Sequence[str] = (),
) -> Forecast:
    """Try a little of a run and extrapolate; nothing is changed.

    Args:
        pipeline: What calibration samples with.
        module: Its denoiser.
        prompts: Of calibration.
        settings: Of calibration.
        recipe: Name of the recipe.
        bits: Like "w4a8".
        options: Of the recipe.
        call_kwargs: Further arguments of the pipeline's call.
        exclude: Layers that stay as they are, see `exclusion`.
    """
    need, rows = probe(pipeline, prompts, settings, call_kwargs=call_kwargs)
    alike = _alike(module, excluded(packed.quantizable(module), exclude))
    counts = {name: len(names) for name, names in alike.items()}
    parsed = Bits.parse(bits)
    task = api.task_of(pipeline, rows, parsed)
    task = replace(task, seed=settings.seed, progress=False, memory_bytes=settings.memory_bytes)
    task = replace(task, only=frozenset(counts), exclude=tuple(exclude))
    made = recipes.make_options(recipes.lookup(recipe), options, bits)
    learns = getattr(made, "rounding", "nearest") == "learned" and parsed.weight <= 4
    plans = _tried(task, recipe, bits, options, learns)
    plan = plans[0]
    sizes = {name: packed.weight_of(module, name).numel() for name in plan.layers}
    weights = sum(size * counts[name] for name, size in sizes.items())
    float_bytes = sum(tensor.nbytes for tensor in module.state_dict().values())
    of_layers = sum(packed.weight_of(module, name).nbytes * counts[name] for name in plan.layers)
    packed_bytes = sum(layer.nbytes * counts[name] for name, layer in plan.layers.items())
    used = min(getattr(made, "rounding_rows", 0), settings.samples)
    tuned = estimate_training.tuning(task, made, plan, alike, need)
    return Forecast(
        need,
        plan,
        counts,
        weights,
        float_bytes,
        float_bytes - of_layers + packed_bytes + tuned.adapter_bytes,
        _LEARNING_BYTES * max(_learned(plan, sizes).values()) if learns else 0,
        tuned.ram_bytes,
        _search_s(task, made, plan, counts, need, weights / sum(sizes.values())),
        _learning_s(plans, counts, made.iterations) + _PASSES * used * need["row_seconds"] if learns else 0.0,
        tuned.seconds,
    )


def _tried(task: Task, recipe: str, bits: str, options: Mapping[str, Any], learns: bool) -> list[Plan]:
    """The recipe on the layers of `task.only`, without fine-tuning; with learned rounding both lengths of a trial."""
    trials: list[dict[str, Any]] = [{"iterations": steps} for steps in _TRIAL_STEPS] if learns else [{}]
    # A few rows have no pairs of guidance.
    of_training = {"epochs": 0, "guidance_weight": 0.0, "compare_at": 0.0}
    known = recipes.lookup(recipe).options
    untuned = {name: value for name, value in of_training.items() if hasattr(known, name)}
    return [recipes.plan(task, recipe, bits, {**options, **untuned, **each}) for each in trials]


def _search_s(
    task: Task, made: Any, plan: Plan, counts: Mapping[str, int], need: Mapping[str, float], times: float
) -> float:
    """Seconds of all searches, over `times` as many weights as were tried, and of their forward passes over rows."""
    seconds, row_s = plan.measured["seconds"]["search weights"] * times, need["row_seconds"]
    if any("input_scale" in layer.tensors for layer in plan.layers.values()):
        seconds += row_s * min(Sequencing.activation_rows, need["rows"])
    if not getattr(made, "mixed", False):
        return seconds
    tried, rows = (min(mixed_rows.AllocationSettings.rows, n) for n in (len(task.calibration), need["rows"]))
    free = max(1, task.memory_bytes // mixed_rows.HELD_SHARE)
    held = sum(min(free, mixed_rows.vectors_of(task.model, name)[1]) * counts[name] for name in plan.layers)
    passes = math.ceil(held / free)
    passed_s = tried * (1 + made.scale_inputs) * row_s  # the few inputs of a trial are held in one pass
    searched_s = max(0.0, plan.measured["seconds"]["choose widths"] - passed_s)
    return seconds + searched_s * times + rows * (passes + made.scale_inputs) * row_s


def _alike(module: nn.Module, left_out: set[str]) -> dict[str, list[str]]:
    """By layer of one block of every kind the layers at its place in all blocks of that kind, itself first."""
    kinds: dict[tuple[Any, ...], list[list[str]]] = {}
    for unit, members in packed.blocks(module).items():
        shapes = [
            (name.removeprefix(unit), tuple(packed.weight_of(module, name).shape), name in left_out)
            for name in members
        ]
        kinds.setdefault(tuple(shapes), []).append(members)
    return {names[0]: list(names) for units in kinds.values() for names in zip(*units, strict=True)}


def _learned(plan: Plan, sizes: Mapping[str, int]) -> dict[str, int]:
    """Weights of every block that was tried."""
    return {
        unit: sum(size for name, size in sizes.items() if _inside(name, unit))
        for unit in plan.measured["blocks"]
    }


def _inside(name: str, unit: str) -> bool:
    return name == unit or name.startswith(unit + ".")


def _learning_s(plans: Sequence[Plan], counts: Mapping[str, int], iterations: int) -> float:
    """Seconds of all steps of all blocks, from two trials of different length."""
    first, second = (plan.measured["blocks"] for plan in plans)
    steps = _TRIAL_STEPS[1] - _TRIAL_STEPS[0]
    total = 0.0
    for unit in first:
        count = next(n for name, n in counts.items() if _inside(name, unit))
        total += max(0.0, second[unit]["seconds"] - first[unit]["seconds"]) / steps * count
    return total * iterations
