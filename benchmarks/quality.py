"""The quality tables of docs/papers: every configuration on the same seeds and prompts, one JSON file per paper.

    python benchmarks/quality.py lbfp --samples 1000            # all rows, both reference models; hours on two cores
    python benchmarks/quality.py lbfp --table                   # print the tables from the JSON as Markdown

Finished rows are kept, so a run that was cut off goes on with the next row (the pictures of the full-precision model are kept
in `--work`). Rows measured with other samples, steps or weights are measured again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from quality_tables import seed_table, table

from difloat import api, layers, record, report, study
from difloat.evaluate import Generated
from difloat.methods.task import Bits
from difloat.reference_models import NAMES

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Row:
    """One configuration of a table; `timesteps` as in the calibration settings, `seed` of calibration and recipe."""

    label: str
    recipe: str
    bits: str
    options: dict[str, Any] = field(default_factory=dict)
    timesteps: str = "sampler"
    seed: int = 0


def seeds(label: str, recipe: str, bits: str, options: dict[str, Any], count: int = 3) -> list[Row]:
    """The same configuration with several seeds."""
    return [
        Row(label if seed == 0 else f"{label}, seed {seed}", recipe, bits, options, seed=seed)
        for seed in range(count)
    ]


BASE: dict[str, Any] = {"mixup_sign": False, "adapters": 1, "dfa": False}
GROUPS: dict[str, Any] = {"weight_granularity": "group", "group_size": 128}
EPOCHS: dict[str, Any] = {"epochs": 20}  # half the default, the same for all rows of MPQ-DM's long table
SHORT: dict[str, Any] = {"epochs": 10}  # of the table that has all settings and both models
KEPT: dict[str, Any] = {"factor_power": 2.0, "guidance_weight": 9.0}  # our loss, in place of the papers'
OMQ: dict[str, Any] = {**EPOCHS, "relation": "off"}


def against(bits: str, count: int = 1, budget: dict[str, Any] = EPOCHS) -> list[Row]:
    """MPQ-DM and what it is compared with at one setting; all train the same number of steps and have one weight per layer."""
    return [
        *seeds(f"{bits.upper()} MPQ-DM", "mpqdm", bits, budget, count),
        *seeds(f"{bits.upper()} EfficientDM", "efficientdm", bits, budget, count),
        *seeds(f"{bits.upper()} MSFP, one adapter", "msfp", bits, {**budget, "adapters": 1}, count),
        Row(f"{bits.upper()} nearest", "rtn", bits, {"grid": "int"}),
    ]


PAPERS: dict[str, list[Row]] = {
    "lbfp": [
        Row("FP8/FP8 (LBFP)", "lbfp", "w8a8"),
        Row("INT8/INT8 (Q-Diffusion)", "qdiffusion", "w8a8"),
        Row("FP4/FP8 nearest (LBFP)", "lbfp", "w4a8", {"rounding": "nearest"}),
        Row("FP4/FP8 learned rounding (LBFP)", "lbfp", "w4a8"),
        Row("INT4/INT8 nearest (Q-Diffusion)", "qdiffusion", "w4a8", {"rounding": "nearest"}),
        Row("INT4/INT8 AdaRound (Q-Diffusion)", "qdiffusion", "w4a8"),
        Row("FP4/FP8 learned, per channel", "lbfp", "w4a8", {"weight_granularity": "channel"}),
        Row("INT4/INT8 AdaRound, per tensor", "qdiffusion", "w4a8", {"weight_granularity": "tensor"}),
    ],
    "fp4dit": [
        Row("W4A8 FP4DiT", "fp4dit", "w4a8"),
        Row("W4A6 FP4DiT", "fp4dit", "w4a6"),
        Row("W4A8 Q-Diffusion", "qdiffusion", "w4a8", GROUPS),
        Row("W4A6 Q-Diffusion", "qdiffusion", "w4a6", GROUPS),
        Row("W4A8 ViDiT-Q", "viditq", "w4a8"),
        Row("W4A6 ViDiT-Q", "viditq", "w4a6"),
        Row("W4A8 Q-DiT", "qdit", "w4a8"),
        Row("W4A6 Q-DiT", "qdit", "w4a6"),
        Row("W4A6 FP4DiT, nearest", "fp4dit", "w4a6", {"rounding": "nearest"}),
        Row("W4A6 FP4DiT, E2M1 before GELU", "fp4dit", "w4a6", {"before_gelu": "same"}),
        Row("W4A6 FP4DiT, plain AdaRound", "fp4dit", "w4a6", {"scale_aware": False}),
        Row("W4A6 FP4DiT, static activations", "fp4dit", "w4a6", {"activation": "static"}),
        Row("W4A6 FP4DiT, groups of 64", "fp4dit", "w4a6", {"group_size": 64}),
        Row("W4A6 FP4DiT, per channel", "fp4dit", "w4a6", {"group_size": 0}),
        Row("W4A6 FP4DiT, calibrated on clean latents", "fp4dit", "w4a6", timesteps="clean"),
        Row("W4A6 FP4DiT, inputs of full precision", "fp4dit", "w4a6", {"inputs": "full"}),
        Row("W4A6 FP4DiT, attention in high precision", "fp4dit", "w4a6", {"attention": False}),
        Row("W4A6 FP4DiT, formats and clips searched", "fp4dit", "w4a6", {"weight_format": "search"}),
        Row(
            "W4A6 integer twin: INT4 groups, INT6 tokens",
            "qdiffusion",
            "w4a6",
            {**GROUPS, "activation": "online"},
        ),
        Row("W4A6 ViDiT-Q, one weight per layer", "viditq", "w4a6", {"stretches": 1}),
        Row(
            "W4A6 FP4DiT, all that helped: E2M1 before GELU, searched, inputs of full precision",
            "fp4dit",
            "w4a6",
            {"before_gelu": "same", "weight_format": "search", "inputs": "full"},
        ),
    ],
    "msfp": [
        Row("W6A6 MSFP", "msfp", "w6a6"),
        *seeds("W4A4 base", "msfp", "w4a4", BASE),
        *seeds("W4A4 + mixup-sign", "msfp", "w4a4", {**BASE, "mixup_sign": True}),
        *seeds("W4A4 + TALoRA", "msfp", "w4a4", {"dfa": False}),
        *seeds("W4A4 + DFA (MSFP)", "msfp", "w4a4", {}),
        Row("W4A4 integer twin", "msfp", "w4a4", {"grid": "int"}),
        Row("W4A4 MSFP, narrow search", "msfp", "w4a4", {"search": "narrow"}),
        Row("W4A4 EfficientDM", "efficientdm", "w4a4"),
        Row("W4A4 LBFP", "lbfp", "w4a4"),
        Row("W4A4 Q-Diffusion", "qdiffusion", "w4a4"),
        Row("W4A4 MSFP, not fine-tuned", "msfp", "w4a4", {"adapters": 0}),
        Row(
            "W4A4 MSFP, learned rounding, not fine-tuned",
            "msfp",
            "w4a4",
            {"adapters": 0, "rounding": "learned"},
        ),
        Row("W4A4 MSFP, one adapter, guidance kept", "msfp", "w4a4", {"adapters": 1, **KEPT}),
        Row(
            "W4A4 MSFP, learned rounding, one adapter, guidance kept",
            "msfp",
            "w4a4",
            {"adapters": 1, "rounding": "learned", **KEPT},
        ),
        Row(
            "W4A4 MSFP, one adapter, guidance kept, 10 epochs",
            "msfp",
            "w4a4",
            {"adapters": 1, "epochs": 10, **KEPT},
        ),
        Row(
            "W4A4 MSFP, learned rounding, one adapter, guidance kept, 10 epochs",
            "msfp",
            "w4a4",
            {"adapters": 1, "epochs": 10, "rounding": "learned", **KEPT},
        ),
        Row("W4A4 MSFP, one adapter, 10 epochs", "msfp", "w4a4", {"adapters": 1, "epochs": 10}),
        Row("W4A4 MSFP, one adapter", "msfp", "w4a4", {"adapters": 1}),
        Row(
            "W4A4 MSFP, one adapter, 10 epochs, guidance weighted",
            "msfp",
            "w4a4",
            {"adapters": 1, "epochs": 10, "guidance_weight": 9.0},
        ),
        Row(
            "W4A4 MSFP, one adapter, 10 epochs, squared factors",
            "msfp",
            "w4a4",
            {"adapters": 1, "epochs": 10, "factor_power": 2.0},
        ),
    ],
    "mpqdm": [
        *against("w2a4", 3),
        *against("w3a6", 3),
        *against("w4a4"),
        *against("w3a4"),
        *against("w2a6"),
        *seeds("W2A4 base", "mpqdm", "w2a4", {**OMQ, "mixed": False}),
        *seeds("W2A4 + OMQ", "mpqdm", "w2a4", OMQ),
        Row("W2A4 MPQ-DM, rows by error", "mpqdm", "w2a4", {**EPOCHS, "criterion": "error"}),
        Row("W2A4 MPQ-DM, rows by magnitude", "mpqdm", "w2a4", {**EPOCHS, "criterion": "magnitude"}),
        Row("W2A4 MPQ-DM, rows at random", "mpqdm", "w2a4", {**EPOCHS, "criterion": "random"}),
        Row("W2A4 MPQ-DM, n of 0 and k as released", "mpqdm", "w2a4", {**EPOCHS, "candidates": "release"}),
        Row("W2A4 MPQ-DM+", "mpqdm", "w2a4", {**EPOCHS, "plus": True}),
        Row(
            "W2A4 MPQ-DM, relations detached as released", "mpqdm", "w2a4", {**EPOCHS, "relation": "detached"}
        ),
        Row(
            "W2A4 MPQ-DM, features instead of relations", "mpqdm", "w2a4", {**EPOCHS, "relation": "features"}
        ),
        Row("W2A4 MPQ-DM, adapters from the error", "mpqdm", "w2a4", {**EPOCHS, "adapter_init": "error"}),
        Row("W2A4 MPQ-DM, FP grids", "mpqdm", "w2a4", {**EPOCHS, "grid": "fp"}),
        Row("W3A6 MPQ-DM, FP grids", "mpqdm", "w3a6", {**EPOCHS, "grid": "fp"}),
        Row("W4A4 MPQ-DM, FP grids", "mpqdm", "w4a4", {**EPOCHS, "grid": "fp"}),
        Row("W2A4 + OMQ, inputs not scaled", "mpqdm", "w2a4", {**OMQ, "scale_inputs": False}),
        Row(
            "W2A4 + OMQ, inputs not scaled, rows by error",
            "mpqdm",
            "w2a4",
            {**OMQ, "scale_inputs": False, "criterion": "error"},
        ),
        Row(
            "W2A4 + TRD, inputs not scaled, rows by error",
            "mpqdm",
            "w2a4",
            {**EPOCHS, "scale_inputs": False, "criterion": "error"},
        ),
        Row("W2A4 EfficientDM, guidance kept", "efficientdm", "w2a4", {**EPOCHS, **KEPT}),
        Row(
            "W2A4 EfficientDM, learned rounding, guidance kept",
            "efficientdm",
            "w2a4",
            {**EPOCHS, "rounding": "learned", **KEPT},
        ),
        Row("W3A6 EfficientDM, guidance kept", "efficientdm", "w3a6", {**EPOCHS, **KEPT}),
        Row(
            "W4A4 EfficientDM, compared after guidance", "efficientdm", "w4a4", {**EPOCHS, "compare_at": 3.0}
        ),
        Row(
            "W2A4 EfficientDM, compared after guidance", "efficientdm", "w2a4", {**EPOCHS, "compare_at": 3.0}
        ),
    ],
    "mpqdm-short": [  # with --samples 400
        *(row for bits in ("w4a4", "w3a6", "w3a4", "w2a6", "w2a4") for row in against(bits, budget=SHORT)),
        Row("W2A4 MPQ-DM, rows by error", "mpqdm", "w2a4", {**SHORT, "criterion": "error"}),
        Row("W2A4 MPQ-DM, rows by magnitude", "mpqdm", "w2a4", {**SHORT, "criterion": "magnitude"}),
        Row("W2A4 MPQ-DM, rows at random", "mpqdm", "w2a4", {**SHORT, "criterion": "random"}),
        Row("W2A4 + OMQ, no relations", "mpqdm", "w2a4", {**SHORT, "relation": "off"}),
        Row("W2A4 MPQ-DM, features", "mpqdm", "w2a4", {**SHORT, "relation": "features"}),
        Row(
            "W2A4 MPQ-DM, features, a tenth of the weight",
            "mpqdm",
            "w2a4",
            {**SHORT, "relation": "features", "feature_weight": 0.1},
        ),
    ],
    "guided": [
        Row("W4A4 guided", "guided", "w4a4"),
        Row("W4A4 guided, ranges by timestep", "guided", "w4a4", {"ranges_by_timestep": True}),
        Row("W3A4 guided", "guided", "w3a4"),
        Row("W3A6 guided", "guided", "w3a6"),
        Row("W2A4 guided", "guided", "w2a4"),
        Row("W2A4 guided, ranges by timestep", "guided", "w2a4", {"ranges_by_timestep": True}),
        Row("W2A4 guided, 20 epochs", "guided", "w2a4", EPOCHS),
        Row("W4A8 guided", "guided", "w4a8"),
        Row("W4A4 guided, all timesteps alike", "guided", "w4a4", {"factor_power": 0.0}),
        Row("W4A4 guided, not fine-tuned", "guided", "w4a4", {"epochs": 0}),
    ],
}
MODELS = {
    "lbfp": NAMES,
    "fp4dit": ("emoji-pixart",),
    "msfp": NAMES,
    "mpqdm": NAMES,
    "mpqdm-short": NAMES,
    "guided": NAMES,
}


def main() -> None:
    """Measure what is missing, or print the tables."""
    sys.path.remove(
        str(Path(__file__).resolve().parent)
    )  # kernels.py here is not the package that transformers looks for
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("paper", choices=PAPERS)
    parser.add_argument("--models", nargs="+", choices=NAMES, help="default: those of the paper's table")
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--calibration", type=int, default=256, help="calibration rows")
    parser.add_argument(
        "--work", type=Path, default=Path("build/quality"), help="kept pictures and calibration data"
    )
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--rows", nargs="+", type=int, help="only these rows of the table, counted from 0")
    parser.add_argument("--table", action="store_true", help="print the tables and measure nothing")
    arguments = parser.parse_args()
    path = RESULTS / f"quality-{arguments.paper}.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    if arguments.table:
        order = [row.label for row in PAPERS[arguments.paper]]
        sys.stdout.write(table(results, order) + seed_table(results, order))
        return
    torch.set_num_threads(arguments.threads)
    for model in arguments.models or MODELS[arguments.paper]:
        measure_model(arguments, model, results, path)


def measure_model(arguments: argparse.Namespace, model: str, results: dict[str, Any], path: Path) -> None:
    """Measure the missing rows of one model and store each as soon as it is there."""
    pipeline = study.load_pipeline(model)
    guidance, call = study.call_of(model, None)
    prompts = study.prompts_of(pipeline, model, None)
    sampling = study.Sampling(prompts, arguments.samples, arguments.steps, guidance, call_kwargs=call)
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
            seed=row.seed,
        )
        results[key] = {**setting, **measure_row(row, pipeline, module, data, reference, sampling)}
        store(path, key, results[key])


def store(path: Path, key: str, row: dict[str, Any]) -> None:
    """Add a row to the file, which another process that measures another model may have changed meanwhile."""
    path.parent.mkdir(parents=True, exist_ok=True)
    there = json.loads(path.read_text()) if path.exists() else {}
    part = path.with_suffix(f".{os.getpid()}.part")
    part.write_text(json.dumps({**there, key: row}, indent=1) + "\n")
    os.replace(part, path)


def measure_row(
    row: Row, pipeline: Any, module: Any, data: Any, reference: Generated, sampling: study.Sampling
) -> dict[str, Any]:
    """Quantize by one configuration, draw, judge; the pipeline is as before on return."""
    start = time.perf_counter()
    task = replace(api.task_of(pipeline, data, Bits.parse(row.bits)), seed=row.seed)
    plan = api.plan_calibrated(task, row.recipe, row.bits, row.options)
    seconds = time.perf_counter() - start
    twin = layers.apply(layers.shadow(module), plan)
    name = next(key for key, value in pipeline.components.items() if value is module)
    setattr(pipeline, name, twin)
    try:
        drawn = study.draw(pipeline, sampling)
    finally:
        setattr(pipeline, name, module)
    evaluation = study.judge(reference, drawn, sampling)
    size = record.sizes(twin, plan)
    rows = [record.layer_row(key, layer, layers.weight_of(module, key)) for key, layer in plan.layers.items()]
    weights = sum(r.bytes_before for r in rows)
    return {
        "recipe": row.recipe,
        "bits": row.bits,
        "options": dict(plan.options),
        "metrics": {key: vars(value) for key, value in evaluation.metrics.items()},
        "packed_bytes": size.packed_bytes,
        "original_bytes": size.original_bytes,
        "effective_bits": size.effective_bits,
        "zeros": sum(r.zeros * r.bytes_before for r in rows) / weights,
        "integer_grid_share": sum(r.bytes_before for r in rows if r.integer_grid) / weights,
        "quantize_s": seconds,
        "draw_s": drawn.seconds,
        "draw_full_precision_s": reference.seconds,
        "commit": commit(),
        "machine": report.machine(),
        "command": " ".join(Path(word).name if word.startswith("/") else word for word in sys.argv),
    }


def full_precision(pipeline: Any, sampling: study.Sampling, folder: Path) -> Generated:
    """Pictures of the float model, kept on disk."""
    path = folder / f"{sampling.count}-{sampling.steps}.pt"
    if path.exists():
        return Generated(**torch.load(path, weights_only=True))
    drawn = study.draw(pipeline, sampling)
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


def commit() -> str:
    """The commit the code is at, with a plus if files differ from it."""
    here = Path(__file__).parent
    head = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=here, capture_output=True, text=True)
    dirty = subprocess.run(
        ["git", "status", "--porcelain", "--", "src"], cwd=here.parent, capture_output=True, text=True
    )
    return head.stdout.strip() + ("+" if dirty.stdout.strip() else "")


if __name__ == "__main__":
    main()
