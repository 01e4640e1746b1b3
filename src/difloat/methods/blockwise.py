"""Learned rounding block by block in the order of execution, where each block reads what quantized blocks before it return.

It takes the memory of the packed copy of the model, of one block's rounding variables, and per calibration row of two held
forward passes (full precision for the targets, quantized for the inputs). `Task.memory_bytes` bounds it by taking fewer rows.
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn
from tqdm.auto import tqdm

from difloat.cache_entries import read_entry, write_entry
from difloat.layers import packed
from difloat.layers.packed import QuantizedLayer
from difloat.methods import malloc_trim
from difloat.methods.learned_rounding import learn_rounding
from difloat.methods.paused_forwards import Passes
from difloat.methods.task import Sequencing, Task
from difloat.methods.trace import Trace
from difloat.plan.coded import Coded
from difloat.plan.plan import LayerPlan
from difloat.plan.rules import Draft

Entry = TypeVar("Entry")


def learn_blocks(
    task: Task,
    twin: nn.Module,
    drafts: Mapping[str, Draft | Coded],
    seen: Trace,
    settings: Sequencing,
    generator: torch.Generator,
    measured: dict[str, Any],
) -> dict[str, LayerPlan]:
    """Learn the rounding of the layers in `drafts`, and return them.

    Args:
        task: The model, its data, and the memory for activations.
        twin: The model with weights rounded to nearest, which takes over the learned ones.
        drafts: The layers whose rounding is learned.
        seen: The trace of a forward pass.
        settings: How rounding is learned, and on how many rows.
        generator: The generator that draws the calibration rows.
        measured: A dict that gets errors and seconds of every block under "blocks", and the rows used under "rounding_rows".

    With `Sequencing.minutes` no block begins after that time, and an interrupt (Ctrl-C) ends learning: blocks that are not done
    keep what they have.
    """
    units = _units(task.model, drafts)
    count = measured["rounding_rows"] = _rows_held(task, settings, seen)
    rows = task.calibration.stratified(count, generator)
    calls = task.calls(rows, seen.row_bytes)
    store = _store(task, drafts, settings, rows)
    steps, done = settings.rounding.iterations, dict[str, LayerPlan]()
    with (
        Passes(task.model, calls) as exact,
        Passes(twin, calls) as rounded,
        tqdm(total=len(units) * steps, desc="learn rounding", disable=not task.progress) as bar,
    ):
        for number, (unit, names) in enumerate(_in_time(units.items(), settings.minutes)):
            start = time.perf_counter()
            inside = {name.removeprefix(unit).removeprefix("."): drafts[name] for name in names}
            path = None if store is None else store / f"{number:04d}.safetensors"
            kept = None if path is None else _read(path)
            if kept is not None:
                codes, errors = kept
                bar.update(steps)
            else:
                try:
                    ends = (exact if settings.inputs == "full" else rounded).enter(unit), exact.leave(unit)
                    malloc_trim.release()
                    codes, errors = _learned(task, unit, inside, ends, settings, number, bar.update)
                except KeyboardInterrupt:
                    if settings.minutes is None:
                        raise
                    tqdm.write(f"interrupted: goes on with {number} of {len(units)} blocks", file=sys.stderr)
                    break
                if path is not None:
                    _write(path, codes, errors)
            for name, short in zip(names, inside, strict=True):
                done[name] = _take_over(twin, name, drafts[name], codes[short])
            malloc_trim.release()
            measured["blocks"][unit] = {**errors, "seconds": time.perf_counter() - start}
    return done


def _rows_held(task: Task, settings: Sequencing, seen: Trace) -> int:
    """The number of rows that memory holds of those asked for. It is said if it is not all of them."""
    wanted = min(settings.rounding_rows, len(task.calibration))
    count = min(wanted, max(1, task.memory_bytes // seen.row_bytes))
    if count < wanted and task.progress:
        needed_mb = -(-wanted * seen.row_bytes // (1 << 20))
        tqdm.write(
            f"rounding is learned on {count} of {wanted} rows, as memory may hold no more; --memory-mb {needed_mb} holds all",
            file=sys.stderr,
        )
    return count


def _in_time(entries: Iterable[Entry], minutes: float | None) -> Iterator[Entry]:
    """The entries until so many minutes have passed, or all of them."""
    begun = time.monotonic()
    for entry in entries:
        if minutes is not None and time.monotonic() - begun >= 60 * minutes:
            return
        yield entry


def _learned(
    task: Task,
    unit: str,
    drafts: Mapping[str, Draft | Coded],
    ends: tuple[Any, Any],
    settings: Sequencing,
    number: int,
    on_step: Callable[[], object],
) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """The codes that a block learns from its inputs and targets (`ends`), and its error before and after."""
    seeded, block = torch.Generator().manual_seed(task.seed + 1000 + number), task.model.get_submodule(unit)
    learned = learn_rounding(block, drafts, *ends, settings.rounding, seeded, on_step)
    codes = {name: draft.plan(learned.weights[name]).tensors["weight"] for name, draft in drafts.items()}
    return codes, {"nearest": learned.error_nearest, "learned": learned.error_learned}


def _take_over(twin: nn.Module, name: str, draft: Draft | Coded, codes: torch.Tensor) -> LayerPlan:
    """Give a layer of `twin` learned codes, and return the layer's plan."""
    nearest = draft.plan()
    plan = replace(nearest, tensors={**nearest.tensors, "weight": codes})
    layer = twin.get_submodule(name)
    assert isinstance(layer, QuantizedLayer)
    layer.load(plan, draft.weight.device)
    return plan


def _units(model: nn.Module, drafts: Mapping[str, Draft | Coded]) -> dict[str, list[str]]:
    """The layers to learn by their block, in the order of execution."""
    order = list(drafts)
    units = {unit: [n for n in names if n in drafts] for unit, names in packed.blocks(model).items()}
    units = {unit: names for unit, names in units.items() if names}
    return dict(sorted(units.items(), key=lambda item: min(order.index(name) for name in item[1])))


def _store(
    task: Task, drafts: Mapping[str, Draft | Coded], settings: Sequencing, rows: Sequence[int]
) -> Path | None:
    """The folder for finished blocks of exactly this task, or None."""
    if task.work_dir is None:
        return None
    facts = [
        "layout 2",
        repr(replace(settings, minutes=None)),
        repr(task.bits),
        task.seed,
        list(rows),
        task.calibration.fingerprint,
    ]
    facts += [[name, draft.error, repr(draft.parts)] for name, draft in drafts.items()]
    name = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]
    folder = task.work_dir / f"rounding-{name}"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _write(path: Path, codes: Mapping[str, torch.Tensor], errors: Mapping[str, float]) -> None:
    tensors = {f".{name}": value.cpu().contiguous() for name, value in codes.items()}
    write_entry(path, _key(path), tensors, {name: repr(value) for name, value in errors.items()})


def _read(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, float]] | None:
    entry = read_entry(path, _key(path), lambda texts: {name: float(value) for name, value in texts.items()})
    if entry is None:
        return None
    tensors, errors = entry
    return {name.removeprefix("."): value for name, value in tensors.items()}, errors


def _key(path: Path) -> str:
    """The key of a block, which belongs to the run that the folder's name says."""
    return f"{path.parent.name}/{path.name}"
