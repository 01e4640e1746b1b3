"""One quantization run of a model that is larger than the memory: from files to files, block by block."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from difloat import distributed, recipes, sources
from difloat.calibration.collect import Calibration
from difloat.calibration.row_store import Shelf
from difloat.checkpoint import integrity, streaming
from difloat.job import check_layers, needs_data
from difloat.layers import dtype_readers, packed, quantizable
from difloat.layers.exclude import EXCLUDED, Exclusion, excluded
from difloat.methods import structure
from difloat.methods.task import Task
from difloat.plan.plan import LayerPlan, Plan
from difloat.plan.request import Request
from difloat.report import build
from difloat.report.render import LayerRow, Record
from difloat.run import notes_of


def quantize(
    source: sources.Source, out: Path, request: Request, *, overwrite: bool = False
) -> Record | None:
    """Quantize a pipeline by a recipe that needs no data, block by block from files to files, and write the report.

    Memory holds one block in float and one file of what is written; the result is that of quantizing in memory.

    Args:
        source: A directory, or a name on the hub.
        out: Directory of the checkpoint and the report.
        request: Recipe, bits, options, target and exclusions; the rest is about calibration.
        overwrite: Replace a checkpoint that is there.

    Returns:
        What the report shows; None on processes of a launch that do not write.

    Raises:
        ValueError: the recipe needs data, the source is no directory, an exclusion means nothing, or a weight is not finite.
        CheckpointError: the files are damaged, or what was written does not verify.
    """
    _check(source, request)
    streamed = streaming.Streamed(sources.located(source))
    left = excluded(quantizable.quantizable(streamed.model), request.exclude)
    kept = (
        dtype_readers.kept(streamed.model) | structure.unread(streamed.model) | dict.fromkeys(left, EXCLUDED)
    )
    widths = (request.bits_from or {}).get("", {})
    check_layers(streamed.model, widths)
    exclusion, rows = Exclusion(request.exclude, frozenset(left)), dict[str, LayerRow]()

    def plan_block(model: nn.Module, names: frozenset[str]) -> Plan:
        for name in names:
            quantizable.check_weight(name, packed.weight_of(model, name))
        nothing = Calibration([], Shelf(None, 0, {}), torch.device("cpu"))
        task = Task(
            model, nothing, request.bits, progress=False, target=request.target, only=names, exclude=exclusion
        )
        task = replace(task, layer_bits=widths)
        return recipes.decide(task, request.recipe, request.options)

    def note(name: str, layer: LayerPlan, weight: Tensor) -> None:
        rows[name] = build.layer_row(name, layer, weight)

    def work() -> Record:
        start = time.perf_counter()
        plan = streaming.quantize(streamed, out, plan_block, kept, overwrite=overwrite, on_layer=note)
        integrity.check_directory(out)
        timings = {"reading, searching, writing and verifying": time.perf_counter() - start}
        told: dict[str, Any] = {"timings": timings, "notes": notes_of(request.recipe)}
        made = build.build(
            streamed.model, plan, name=source.name, rows=[rows[name] for name in plan.layers], **told
        )
        build.write(made, build.no_pictures(), build.no_pictures(), out)
        return made

    made = distributed.on_main(work)
    return made if distributed.is_main() else None


def _check(source: sources.Source, request: Request) -> None:
    """Refuse what cannot be streamed before anything is read."""
    if needs_data(request, request.bits):
        raise ValueError(
            f"a plan must need no data to be streamed, got {request.recipe} {request.bits}, which is calibrated with the whole "
            "model; take rtn, or leave out --offload"
        )
    if source.embedded or source.base is not None:
        raise ValueError(
            f"source must be a directory or a hub name to be streamed, got {source.name!r}; leave out --offload"
        )
