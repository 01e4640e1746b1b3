"""What fine-tuning will take, found by trying a step of it on one block of every kind: part of `forecast`."""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from difloat.calibration.batch_axis import first_tensor, rows_in_lists
from difloat.layers import install, packed
from difloat.methods import post_training, trace
from difloat.methods.task import Task
from difloat.methods.training import relation_loss
from difloat.methods.training.student import Student
from difloat.methods.training.twin_layer import stored_bytes
from difloat.plan.plan import Plan

_TRAINING_FORWARDS = 5  # forward passes of the float denoiser that a training step takes as long as
_STUDENT_FORWARDS = 2.5  # the same of a forward pass of the student, without gradient
_TRAINED_COPIES = 4  # of what is trained: itself, its gradient and AdamW's two moments
_HEAP = 1.8  # resident for what a training step keeps, where it lies in the C library's heap: measured on the embedded models
_HEAP_BYTES = 1 << 25  # larger tensors get pages of their own (glibc's largest mmap threshold)


@dataclass(frozen=True)
class Tuning:
    """What fine-tuning will take, roughly.

    Attributes:
        adapter_bytes: That adapters add to the packed denoiser, if every one is used.
        ram_bytes: Beside both denoisers and the rows: the student's frozen weights, what is trained with gradients and
            moments, what a step keeps for its backward pass, the teacher's outputs of all rows, and its features as far
            as they are held.
        seconds: Of all steps.
    """

    adapter_bytes: int = 0
    ram_bytes: int = 0
    seconds: float = 0.0


def tuning(
    task: Task, made: Any, plan: Plan, alike: Mapping[str, list[str]], need: Mapping[str, float]
) -> Tuning:
    """Build the student of one block of every kind, keep what one step of it keeps, and extrapolate.

    Args:
        task: Restricted to the layers that were tried.
        made: Options of the recipe; nothing is trained if it has no epochs.
        plan: Of the layers that were tried.
        alike: By name of a tried layer all layers of its kind.
        need: See `forecast.probe`.
    """
    adapters: int = getattr(made, "adapters", 1) if getattr(made, "epochs", 0) else 0
    if not adapters:
        return Tuning()
    seen = trace.trace(task.model, task.calibration.batch([0]))
    names = [name for like in plan.layers for name in alike[like]]
    bare = [name for name in names if post_training.keeps_8bit(name, seen, made.keep_8bit)]
    student = _student(task, made, plan, alike, bare)
    stored, trained = 0, 0
    for name, layer in plan.layers.items():
        added = stored_bytes(layer, adapters, made.rank, student.carry)
        stored += added * sum(other not in bare for other in alike[name])
        trained += len(alike[name]) * sum(tensor.nbytes for tensor in student.module(name).parameters())
    step_bytes, output_bytes = _step_bytes(task, student, made.rows, made.precision)
    ram_bytes = sum(packed.weight_of(task.model, name).nbytes for name in names) + _TRAINED_COPIES * trained
    ram_bytes += step_bytes + int(need["rows"]) * output_bytes
    steps = min(need["steps"], need["rows"]) * made.epochs
    rows = made.rows * made.accumulation
    forwards = need["rows"] + steps * rows * _TRAINING_FORWARDS  # of a row; the teacher's first
    if getattr(made, "relation", "off") == "off":
        return Tuning(stored, ram_bytes, forwards * need["row_seconds"])
    features = relation_loss.features_of(task, made.features)[1]
    wanted, free = features.nbytes * need["rows"], task.memory_bytes // relation_loss.CACHE_SHARE
    related = steps // made.relation_every * rows
    again = 2 * max(0.0, 1 - free / wanted)  # of a row and the one before it, what is not held
    forwards += need["rows"] + related * (_STUDENT_FORWARDS + again)
    seconds = forwards * need["row_seconds"]
    if made.relation != "features":
        seconds += related * min(_relation_s(features, made.relation) for _ in range(2))  # the first warms up
    return Tuning(stored, ram_bytes + int(min(free, wanted)), seconds)


def _student(task: Task, made: Any, plan: Plan, alike: Mapping[str, list[str]], bare: list[str]) -> Student:
    """A student of the layers that were tried; those like them get copies of their twins, which share all tensors."""
    adapters = getattr(made, "adapters", 1)
    student = Student(
        task.model,
        plan.layers,
        plan.attention,
        post_training.timestep_grid(task),
        adapters=adapters,
        rank=made.rank,
        input_ranges_by_timestep=getattr(made, "ranges_by_timestep", False),
        carry=getattr(made, "carry", "merged"),
        without_adapters=bare,
        generator=torch.Generator().manual_seed(task.seed),
    )
    for name in plan.layers:
        for other in alike[name][1:]:
            twin: Any = copy.copy(student.module(name))
            twin.wrapped = [task.model.get_submodule(other)]
            twin.choice = torch.ones(adapters, device=task.calibration.device)
            install.replace(student.module(""), other, twin)
    return student


def _step_bytes(task: Task, student: Student, rows: int, precision: str) -> tuple[int, int]:
    """RAM that a step of so many rows keeps for its backward pass, from those of one and two; and bytes of a row's output."""
    (one, output), (two, _) = (_kept(student, task.calibration.batch([0] * n), precision) for n in (1, 2))
    kept = 2 * sum(one) - sum(two) + rows * (sum(two) - sum(one))
    on_heap = sum(size for size in two if size * rows < 2 * _HEAP_BYTES) / sum(two)
    on_heap *= task.calibration.device.type == "cpu"
    return int(kept * (1 + (_HEAP - 1) * on_heap)), 4 * output.numel()


def _kept(student: Student, call: trace.Call, precision: str) -> tuple[list[int], Tensor]:
    """Bytes of all storages that a forward pass keeps for the backward pass, but for the model's state; and its output.

    None is kept here: weak references tell new storages from those gone, whatever their addresses.
    """
    sizes: dict[int, int] = {}
    held: list[StorageWeakRef] = []

    def note(tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        held.append(StorageWeakRef(storage))
        sizes.setdefault(held[-1].cdata, storage.nbytes())

    half = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
    cast = torch.autocast(next(student.parameters()).device.type, half, enabled=half is not None)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda _: torch.empty(0)), cast:
        output = first_tensor(student(*call), rows_in_lists(*call))
    own = {StorageWeakRef(t.untyped_storage()).cdata for t in student.module("").state_dict().values()}
    return [size for key, size in sizes.items() if key not in own], output.detach()


def _relation_s(features: Tensor, kind: relation_loss.Kind) -> float:
    """Seconds of a row's relations, with their gradient where it is taken."""
    start = time.perf_counter()
    total = relation_loss.divergence(features.clone().requires_grad_(kind == "attached"), features)
    if kind == "attached":
        total.backward()
    float(total.detach())  # waits for a GPU
    return time.perf_counter() - start
