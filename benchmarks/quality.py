"""The quality tables of docs/papers: every configuration on the same seeds and prompts, one JSON file per paper.

    python benchmarks/quality.py lbfp --samples 1000            # all rows, both reference models; hours on two cores
    python benchmarks/quality.py lbfp --table                   # print the tables from the JSON as Markdown

Finished rows are kept, so a run that was cut off goes on with the next row (the pictures of the full-precision model are kept
in `--work`). Rows measured with other samples, steps or weights are measured again.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import harness
import torch
from quality_rows import MODELS, PAPERS, Row
from quality_tables import seed_table, table

from difloat import api, recipes, run
from difloat.evaluation.comparison import Generated
from difloat.layers import install, packed
from difloat.layers.exclude import Exclusion
from difloat.plan.layer_bits import layer_bits
from difloat.plan.rules import Bits
from difloat.reference_models import NAMES
from difloat.report import build, render


def main() -> None:
    """Measure what is missing, or print the tables."""
    parser = harness.parser(__doc__, threads=harness.all_threads())
    parser.add_argument("paper", choices=PAPERS)
    parser.add_argument("--models", nargs="+", choices=NAMES, help="default: those of the paper's table")
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--calibration", type=int, default=256, help="calibration rows")
    parser.add_argument(
        "--work", type=Path, default=Path("build/quality"), help="kept pictures and calibration data"
    )
    parser.add_argument("--rows", nargs="+", type=int, help="only these rows of the table, counted from 0")
    parser.add_argument("--table", action="store_true", help="print the tables and measure nothing")
    arguments = harness.arguments(parser)
    path = harness.RESULTS / f"quality-{arguments.paper}.json"
    results = harness.stored(path)
    if arguments.table:
        order = [row.label for row in PAPERS[arguments.paper]]
        sys.stdout.write(table(results, order) + seed_table(results, order))
        return
    for model in arguments.models or MODELS[arguments.paper]:
        measure_model(arguments, model, results, path)


def measure_model(arguments: argparse.Namespace, model: str, results: dict[str, Any], path: Path) -> None:
    """Measure the missing rows of one model and store each as soon as it is there."""
    pipeline = run.load_pipeline(model)
    guidance, call = run.call_of(model, None)
    prompts = run.prompts_of(pipeline, model, None)
    sampling = run.Sampling(prompts, arguments.samples, arguments.steps, guidance, call_kwargs=call)
    module = api.denoiser(pipeline)
    setting = {
        "samples": arguments.samples,
        "steps": arguments.steps,
        "calibration_rows": arguments.calibration,
        "weights": fingerprint(module),
    }
    reference = full_precision(pipeline, sampling, arguments.work / f"{model}-{setting['weights']}")
    for number, row in enumerate(PAPERS[arguments.paper]):
        key = f"{model} | {row.label}"
        if arguments.rows is not None and number not in arguments.rows:
            continue
        if key in results and all(results[key].get(name) == value for name, value in setting.items()):
            continue
        data = api.calibrate(
            pipeline,
            prompts=prompts,
            cache_dir=arguments.work / "calibration",
            call_kwargs=call,
            samples=arguments.calibration,
            steps=arguments.steps,
            guidance_scale=guidance,
            timesteps=row.timesteps,
            trajectories=row.trajectories or recipes.lookup(row.recipe).trajectories,
            seed=row.seed,
        )
        kept = arguments.work / "training" if row.options.get("fresh_rows") else None
        results[key] = {**setting, **measure_row(row, pipeline, module, data, reference, sampling, kept)}
        harness.add(path, {key: results[key]})  # another process may measure another model meanwhile


def measure_row(
    row: Row,
    pipeline: Any,
    module: Any,
    data: Any,
    reference: Generated,
    sampling: run.Sampling,
    kept: Path | None = None,
) -> dict[str, Any]:
    """Quantize by one configuration, draw, judge; the pipeline is as before on return. Training is kept in `kept`."""
    start = time.perf_counter()
    task = replace(api.task_of(pipeline, data, Bits.parse(row.bits)), seed=row.seed, work_dir=kept)
    if row.blocks_only:
        outside = packed.quantizable(module).keys() - packed.inside_blocks(module)
        task = replace(task, exclude=Exclusion(("outside of the blocks",), frozenset(outside)))
    if row.allocated is not None:
        chosen = recipes.plan(task, "auto", row.bits, row.allocated)
        task = replace(task, layer_bits=layer_bits(chosen))
    plan = recipes.plan(task, row.recipe, row.bits, row.options)
    seconds = time.perf_counter() - start
    twin = install.apply(install.shadow(module), plan)
    name = next(key for key, value in pipeline.components.items() if value is module)
    setattr(pipeline, name, twin)
    try:
        drawn = run.draw(pipeline, sampling)
    finally:
        setattr(pipeline, name, module)
    evaluation = run.judge(reference, drawn, sampling)
    size = build.sizes(twin, plan)
    rows = [build.layer_row(key, layer, packed.weight_of(module, key)) for key, layer in plan.layers.items()]
    weights = sum(r.bytes_before for r in rows)
    return {
        "recipe": row.recipe,
        "bits": row.bits,
        "options": dict(plan.options) | ({} if row.allocated is None else {"allocated": row.allocated}),
        "metrics": {key: vars(value) for key, value in evaluation.metrics.items()},
        "packed_bytes": size.packed_bytes,
        "original_bytes": size.original_bytes,
        "effective_bits": size.effective_bits,
        "zeros": sum(r.zeros * r.bytes_before for r in rows) / weights,
        "integer_grid_share": sum(r.bytes_before for r in rows if r.integer_grid) / weights,
        "quantize_s": seconds,
        "draw_s": drawn.seconds,
        "draw_full_precision_s": reference.seconds,
        "commit": harness.commit(),
        "machine": render.machine(),
        "command": " ".join(Path(word).name if word.startswith("/") else word for word in sys.argv),
    }


def full_precision(pipeline: Any, sampling: run.Sampling, folder: Path) -> Generated:
    """Pictures of the float model, kept on disk."""
    path = folder / f"{sampling.count}-{sampling.steps}.pt"
    if path.exists():
        return Generated(**torch.load(path, weights_only=True))
    drawn = run.draw(pipeline, sampling)
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(vars(drawn), path.with_suffix(".part"))
    os.replace(path.with_suffix(".part"), path)
    return drawn


def fingerprint(module: Any) -> str:
    """Short hash of all weights."""
    digest = hashlib.sha256()
    for tensor in module.state_dict().values():
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()[:12]


if __name__ == "__main__":
    main()
