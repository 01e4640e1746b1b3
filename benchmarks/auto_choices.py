"""What single choices of recipe auto bring and cost: one changed at a time, on the same pictures.

    python benchmarks/auto_choices.py                         # both embedded models; minutes on two idle cores
    python benchmarks/auto_choices.py --models emoji-unet     # one of them
    python benchmarks/auto_choices.py --table                 # the tables of docs/papers/auto.md from what is stored

Every row is quantized anew and draws the same pictures as full precision. Stored are the PSNR, its paired difference to the
first row of the same bits, effective bits, seconds of calibration and of all after it, and seconds of a picture: full precision
and packed in turns, the median of `--repeats`. Costs are given in full-precision pictures, too. The load of the machine is
stored beside them, and the table leaves times out where other work ran.
"""

from __future__ import annotations

import math
import os
import re
import time
from dataclasses import replace
from typing import Any

import harness
from torch import Tensor

from difloat import api, evaluate, recipes, reference_models
from difloat.evaluation.picture_metrics import mean_interval, psnr
from difloat.layers import install
from difloat.plan import file_offers
from difloat.plan.layer_bits import layer_bits
from difloat.plan.plan import LayerPlan, Plan
from difloat.plan.rules import Bits
from difloat.plan.target import FILES, Target

STEPS, ROWS = 20, 256
OTHER_LOAD = 0.7
"""Above the threads of a run, the load from which its times are left out of the table."""

PAGE = harness.ROOT / "docs/papers/auto.md"
MARK = re.compile(r"(<!-- choices -->\n)(.*?)(<!-- end choices -->)", re.DOTALL)
TRAJECTORIES, TARGET = "trajectories", "target"
ALLOCATED = "bits of auto"  # by layer, with these options of auto
INTEGER_LAYERS = {"widths": "layers", "grid": "integer"}
CHOICES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "w4a8": ("auto", "w4a8", {}),
    "w4a8, rows of 16 trajectories": ("auto", "w4a8", {TRAJECTORIES: 16}),
    "w4a8, rows of 32 trajectories": ("auto", "w4a8", {TRAJECTORIES: 32}),
    "w4a8, moments of 128 rows": ("auto", "w4a8", {"rows": 128}),
    "w4a8, bits by layer": ("auto", "w4a8", {"widths": "layers"}),
    "w4a8, bits by layer, integers": ("auto", "w4a8", {"widths": "layers", "grid": "integer"}),
    "w4a8, same bits": ("auto", "w4a8", {"widths": "same"}),
    "w4a8, same bits, integers": ("auto", "w4a8", {"widths": "same", "grid": "integer"}),
    "w4a8, gptq": ("gptq", "w4a8", {}),
    "w4a8, gptq, bits of auto": ("gptq", "w4a8", {ALLOCATED: INTEGER_LAYERS}),
    "w4a8, qdiffusion": ("qdiffusion", "w4a8", {}),
    "w4a8, qdiffusion, bits of auto": ("qdiffusion", "w4a8", {ALLOCATED: INTEGER_LAYERS}),
    "w4a8, qdiffusion nearest, bits of auto": (
        "qdiffusion",
        "w4a8",
        {"rounding": "nearest", ALLOCATED: INTEGER_LAYERS},
    ),
    "w4a8, qdiffusion online, bits of auto": (
        "qdiffusion",
        "w4a8",
        {"activation": "online", ALLOCATED: INTEGER_LAYERS},
    ),
    "w4a8, tables fitted to layers": ("auto", "w4a8", {"grid": "fit"}),
    "w4a8, bits by layer, tables fitted to layers": ("auto", "w4a8", {"widths": "layers", "grid": "fit"}),
    "w4a8, polished": ("auto", "w4a8", {"polish": 200}),
    "w4a4": ("auto", "w4a4", {}),
    "w4a4, polished": ("auto", "w4a4", {"polish": 200}),
    "w4a4, inputs in groups of 16": ("auto", "w4a4", {"input_group": 16}),
    "w4a4, inputs per token": ("auto", "w4a4", {"input_group": 0}),
    "w4a8, all inputs rotated": ("auto", "w4a8", {"rotate": "all"}),
    "w4a8, chosen inputs rotated": ("auto", "w4a8", {"rotate": "chosen"}),
    "w4a8, chosen inputs rotated, tables fitted": ("auto", "w4a8", {"rotate": "chosen", "grid": "fit"}),
    "w4a8, bits by layer, branches": ("auto", "w4a8", {"widths": "layers", "branch": 4}),
    "w3a8, chosen inputs rotated": ("auto", "w3a8", {"rotate": "chosen"}),
    "w4a4, all inputs rotated": ("auto", "w4a4", {"rotate": "all"}),
    "w4a4, chosen inputs rotated": ("auto", "w4a4", {"rotate": "chosen"}),
    "w4a4, per token, all rotated": ("auto", "w4a4", {"input_group": 0, "rotate": "all"}),
    "w4a4, per token, chosen rotated": ("auto", "w4a4", {"input_group": 0, "rotate": "chosen"}),
    "w4a4, branches": ("auto", "w4a4", {"branch": 4}),
    "w4a4, bits by layer": ("auto", "w4a4", {"widths": "layers"}),
    "w4a4, bits by layer, branches": ("auto", "w4a4", {"widths": "layers", "branch": 4}),
    "w4a4, svdquant": ("svdquant", "w4a4", {}),
    "w4a4, hsvd": ("hsvd", "w4a4", {}),
    "w2a4": ("auto", "w2a4", {}),
    "w2a4, all inputs rotated": ("auto", "w2a4", {"rotate": "all"}),
    "w2a4, chosen inputs rotated": ("auto", "w2a4", {"rotate": "chosen"}),
    "w2a4, per token": ("auto", "w2a4", {"input_group": 0}),
    "w2a4, per token, all rotated": ("auto", "w2a4", {"input_group": 0, "rotate": "all"}),
    "w2.5a4": ("auto", "w2.5a4", {}),
    "w2.5a4, branches": ("auto", "w2.5a4", {"branch": 4}),
    "w3a8": ("auto", "w3a8", {}),
    "w3a8, polished": ("auto", "w3a8", {"polish": 200}),
    "w3a8, edges up for choice": ("auto", "w3a8", {"keep_8bit": ()}),
    "w3a8, weights in groups of 128": ("auto", "w3a8", {"group_size": 128}),
    "w3a8, tables fitted to layers": ("auto", "w3a8", {"grid": "fit"}),
    "w4a16 for gguf, nearest": ("rtn", "w4a16", {TARGET: "gguf"}),
    "w4a16 for gguf": ("auto", "w4a16", {TARGET: "gguf"}),
    "w5a16 for gguf": ("auto", "w5a16", {TARGET: "gguf"}),
    "w4a16 for comfy, nearest": ("rtn", "w4a16", {TARGET: "comfy"}),
    "w4a16 for comfy": ("auto", "w4a16", {TARGET: "comfy"}),
    "w5a16 for comfy": ("auto", "w5a16", {TARGET: "comfy"}),
}


def main() -> None:
    """Measure every choice of every model and store it as soon as it is there."""
    parser = harness.parser(
        __doc__, threads=harness.all_threads(), repeats=5, out=harness.RESULTS / "auto-choices.json"
    )
    parser.add_argument("--models", nargs="+", default=list(reference_models.NAMES))
    parser.add_argument("--count", type=int, default=32, help="pictures")
    parser.add_argument("--choices", nargs="+", default=list(CHOICES))
    parser.add_argument(
        "--table", action="store_true", help="write the tables of docs/papers/auto.md and stop"
    )
    options = harness.arguments(parser)
    if options.table:
        write_tables(harness.stored(options.out))
        return
    for name in options.models:
        prompts = reference_models.captions()
        shown = prompts[:: len(prompts) // options.count][: options.count]
        reference = drawn(reference_models.load(name), name, shown)
        first: dict[str, Tensor] = {}
        for label in options.choices:
            row, scores = measure(name, label, shown, reference, options.repeats)
            base = first.setdefault(CHOICES[label][1], scores)
            if base is not scores:
                row["psnr_change_db"] = vars(mean_interval(scores - base))
            harness.add(options.out, {f"{name} | {label}": {**row, **harness.facts()}})


def drawn(pipeline: Any, name: str, prompts: list[str]) -> Tensor:
    """Pictures of seeds 0, 1, ... with the sampler that the model was trained for."""
    call = reference_models.call_arguments(name)
    guidance = call.pop("guidance_scale")
    shared = {"steps": STEPS, "guidance_scale": guidance, "call_kwargs": call, "progress": False}
    return evaluate.generate(pipeline, prompts, seeds=range(len(prompts)), **shared).images


def measure(
    name: str, label: str, shown: list[str], reference: Tensor, repeats: int
) -> tuple[dict[str, Any], Tensor]:
    """One choice: what it took, and the PSNR of every picture."""
    recipe, bits, chosen = CHOICES[label]
    own = dict(chosen)
    allocated = own.pop(ALLOCATED, None)
    trajectories = own.pop(TRAJECTORIES, recipes.lookup("auto").trajectories)
    target = own.pop(TARGET, "any")
    pipeline = reference_models.load(name)
    call = reference_models.call_arguments(name)
    guidance = call.pop("guidance_scale")
    start = time.perf_counter()
    data = api.calibrate(
        pipeline,
        prompts=[text for text in reference_models.captions() if text not in shown],
        samples=ROWS,
        steps=STEPS,
        guidance_scale=guidance,
        trajectories=trajectories,
        call_kwargs=call,
        progress=False,
    )
    calibrated = time.perf_counter()
    task = replace(api.task_of(pipeline, data, Bits.parse(bits)), target=target)
    if allocated is not None:
        task = replace(task, layer_bits=layer_bits(recipes.plan(task, "auto", bits, allocated)))
    plan = recipes.plan(task, recipe, bits, own)
    done = time.perf_counter()
    packed = reference_models.load(name)
    install.apply(api.denoiser(packed), plan)
    scores = psnr(reference, drawn(packed, name, shown))
    times = picture_seconds(name, pipeline, packed, shown[:1], repeats)
    row = {
        "psnr_db": vars(mean_interval(scores)),
        "effective_bits": effective_bits(plan, target),
        "calibration_s": round(calibrated - start, 1),
        "after_s": round(done - calibrated, 1),
        "picture_s": times,
        "load": round(os.getloadavg()[0], 1),
        "calibration_pictures": round((calibrated - start) / times["full precision"], 1),
        "after_pictures": round((done - calibrated) / times["full precision"], 1),
    }
    return row, scores


def picture_seconds(name: str, full: Any, packed: Any, prompts: list[str], repeats: int) -> dict[str, float]:
    """Seconds of one picture of either pipeline, drawn in turns; medians."""
    contestants = {
        "full precision": lambda: drawn(full, name, prompts),
        "packed": lambda: drawn(packed, name, prompts),
    }
    return harness.medians(harness.interleaved(contestants, repeats))


def effective_bits(plan: Plan, target: Target) -> float:
    """Bits of a weight in the quantized layers, scales and all, in our checkpoint or in a file of the target."""
    weights = sum(math.prod(layer.shape) for layer in plan.layers.values())
    return 8 * sum(stored_bytes(layer, target) for layer in plan.layers.values()) / weights


def stored_bytes(layer: LayerPlan, target: Target) -> int:
    """The bytes of a layer in our checkpoint, or in a file of the target."""
    if target not in FILES:
        return layer.nbytes
    spec = layer.parts[0].weight
    made_for = file_offers.offers(layer.shape, layer.parts[0].activation is not None, target)
    rule = next(rule for rule in made_for if rule.spec(rule.formats[0]) == spec)
    return file_offers.file_bytes(layer.shape, rule, target)


def write_tables(stored: dict[str, Any]) -> None:
    """A table per model on the page of recipe auto, between its marks."""
    tables = [table_of(name, stored) for name in reference_models.NAMES]
    text = MARK.sub(
        lambda match: f"{match[1]}\n{''.join(filter(None, tables))}{match[3]}", PAGE.read_text("utf-8")
    )
    PAGE.write_text(text, "utf-8")


def table_of(name: str, stored: dict[str, Any]) -> str:
    """The rows of one model in Markdown; nothing where there are none."""
    rows = {label: stored[f"{name} | {label}"] for label in CHOICES if f"{name} | {label}" in stored}
    if not rows:
        return ""
    lines = [
        f"**{name}**",
        "",
        "| choice | PSNR dB | change dB | bits | calibration s | after s | both in pictures | packed / float, s a picture |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for label, row in rows.items():
        change = _interval(row["psnr_change_db"], 2) if "psnr_change_db" in row else ""
        both = row["calibration_pictures"] + row["after_pictures"]
        speed = row["picture_s"]["packed"] / row["picture_s"]["full precision"]
        cells = (label, _interval(row["psnr_db"], 1), change, f"{row['effective_bits']:.2f}")
        costs = (f"{row['calibration_s']:g}", f"{row['after_s']:g}", f"{both:.0f}", f"{speed:.2f}")
        if row.get("load", 0) > row["machine"]["threads"] + OTHER_LOAD:
            costs = ("", "", "", "")
        lines.append(f"| {' | '.join((*cells, *costs))} |")
    commits = ", ".join(dict.fromkeys(row["commit"] for row in rows.values()))
    threads = ", ".join(dict.fromkeys(str(row["machine"]["threads"]) for row in rows.values()))
    cpu = next(iter(rows.values()))["machine"]["cpu"]
    return "\n".join(
        [*lines, "", f"Commits {commits}; {cpu}, threads {threads}. Without times: other work ran.", "", ""]
    )


def _interval(found: dict[str, float], digits: int) -> str:
    value, low, high = (f"{found[key]:.{digits}f}" for key in ("value", "low", "high"))
    return f"{value} [{low}, {high}]"


if __name__ == "__main__":
    main()
