"""What rotated inputs bring: error of the output on rows that nothing was calibrated on, no pictures drawn.

    python benchmarks/rotation.py                          # both embedded models
    python benchmarks/rotation.py --models emoji-pixart    # one of them
    python benchmarks/rotation.py --models --times         # only what a rotation costs beside a float layer

Every arm is recipe auto with one width for all layers (`widths=same`), so that arms differ in the rotation alone, or
quantization without data. Stored are the signal-to-noise ratio of the output by row, its paired difference to the arm without
rotation, effective bits, and the relative error of the weights.
"""

from __future__ import annotations

import math
import time
from typing import Any

import harness
import torch
from torch import Tensor, nn

from difloat import api, recipes, reference_models
from difloat.checkpoint import data_free
from difloat.evaluation.picture_metrics import mean_interval
from difloat.kernels import rotation
from difloat.layers import install, packed
from difloat.plan.encode import dequantize
from difloat.plan.plan import Plan
from difloat.plan.rules import Bits, block_rotation

STEPS, ROWS, HELD_OUT = 20, 64, 64
SIZES, REPEATS = ((64, 192), (256, 1152), (1024, 1152), (1024, 3072)), 15  # tokens and channels
DATA_FREE = "data-free"
SAME = {"widths": "same", "rows": ROWS}
# By arm: the arm that it is compared with, the recipe, bits and options.
ARMS: dict[str, tuple[str, str, str, dict[str, Any]]] = {
    "w4a4, groups": ("", "auto", "w4a4", SAME),
    "w4a4, groups, all rotated": ("w4a4, groups", "auto", "w4a4", {**SAME, "rotate": "all"}),
    "w4a4, groups, chosen rotated": ("w4a4, groups", "auto", "w4a4", {**SAME, "rotate": "chosen"}),
    "w4a4, per token": ("", "auto", "w4a4", {**SAME, "input_group": 0}),
    "w4a4, per token, all rotated": (
        "w4a4, per token",
        "auto",
        "w4a4",
        {**SAME, "input_group": 0, "rotate": "all"},
    ),
    "w4a4, per token, chosen rotated": (
        "w4a4, per token",
        "auto",
        "w4a4",
        {**SAME, "input_group": 0, "rotate": "chosen"},
    ),
    "w4a8": ("", "auto", "w4a8", SAME),
    "w4a8, all rotated": ("w4a8", "auto", "w4a8", {**SAME, "rotate": "all"}),
    "w2a4, groups": ("", "auto", "w2a4", SAME),
    "w2a4, groups, all rotated": ("w2a4, groups", "auto", "w2a4", {**SAME, "rotate": "all"}),
    "data-free w4a4": ("", DATA_FREE, "w4a4", {}),
    "data-free w4a4, rotated": ("data-free w4a4", DATA_FREE, "w4a4", {"rotate": True}),
    "data-free w4a8": ("", DATA_FREE, "w4a8", {}),
    "data-free w4a8, rotated": ("data-free w4a8", DATA_FREE, "w4a8", {"rotate": True}),
    "orbitquant w4a4": ("data-free w4a4", "orbitquant", "w4a4", {}),
    "orbitquant w4a8": ("data-free w4a8", "orbitquant", "w4a8", {}),
}


def main() -> None:
    """Measure every arm of every model and store it as soon as it is there."""
    parser = harness.parser(
        __doc__, threads=harness.all_threads(), repeats=1, out=harness.RESULTS / "rotation.json"
    )
    parser.add_argument("--times", action="store_true", help="time rotations of several sizes as well")
    parser.add_argument("--models", nargs="*", default=list(reference_models.NAMES))
    parser.add_argument("--arms", nargs="+", default=list(ARMS))
    options = harness.arguments(parser)
    if options.times:
        rows = {f"times | {tokens} x {channels}": times(tokens, channels) for tokens, channels in SIZES}
        harness.add(options.out, {label: {**row, **harness.facts()} for label, row in rows.items()})
    for name in options.models:
        pipeline = reference_models.load(name)
        call = reference_models.call_arguments(name)
        guidance = call.pop("guidance_scale")
        shared = {"steps": STEPS, "guidance_scale": guidance, "call_kwargs": call, "progress": False}
        captions = reference_models.captions()
        data = api.calibrate(pipeline, prompts=captions[::2], samples=ROWS, trajectories=32, **shared)
        held = api.calibrate(
            pipeline, prompts=captions[1::2], samples=HELD_OUT, trajectories=32, seed=1, **shared
        )
        wanted = outputs_of(api.denoiser(pipeline), held)
        known: dict[str, Tensor] = {}
        for label in options.arms:
            base, recipe, bits, chosen = ARMS[label]
            start = time.perf_counter()
            plan = planned(pipeline, data, recipe, bits, chosen)
            seconds = time.perf_counter() - start
            model = install.apply(install.shadow(api.denoiser(pipeline)), plan)
            known[label] = snr(wanted, outputs_of(model, held))
            row = {
                "snr_db": vars(mean_interval(known[label])),
                "weights_snr_db": weights_snr(api.denoiser(pipeline), plan),
                "effective_bits": effective_bits(plan),
                "rotated_layers": sum(layer.rotation is not None for layer in plan.layers.values()),
                "seconds": round(seconds, 1),
            }
            if base in known:
                row["snr_change_db"] = vars(mean_interval(known[label] - known[base]))
            harness.add(options.out, {f"{name} | {label}": {**row, **harness.facts()}})


def times(tokens: int, channels: int) -> dict[str, Any]:
    """Milliseconds of a rotation, by the library and by torch alone, and of a square float layer, in turns."""
    x, weight = torch.randn(tokens, channels), torch.randn(channels, channels)
    kind = block_rotation((channels, channels))
    assert kind is not None
    contestants = {
        "rotation": lambda: rotation.run(x, kind),
        "rotation by torch": lambda: kind.forward(x),
        "float layer": lambda: torch.nn.functional.linear(x, weight),
    }
    found = harness.medians(harness.interleaved(contestants, REPEATS))
    return {"block": kind.block, **{f"{name}_ms": 1000 * seconds for name, seconds in found.items()}}


def planned(pipeline: Any, data: Any, recipe: str, bits: str, chosen: dict[str, Any]) -> Plan:
    """The plan of the denoiser."""
    if recipe == DATA_FREE:
        model = api.denoiser(pipeline)
        return data_free.plan(model, data_free.settings({"bits": bits, **chosen}), progress=False)
    return recipes.plan(api.task_of(pipeline, data, Bits.parse(bits)), recipe, bits, chosen)


@torch.no_grad()
def outputs_of(model: nn.Module, data: Any) -> Tensor:
    """The outputs of the denoiser, [rows, values]."""
    outputs = []
    rows = list(range(len(data)))
    for start in range(0, len(rows), 16):
        args, kwargs = data.batch(rows[start : start + 16])
        found = model(*args, **kwargs)
        found = found[0] if isinstance(found, tuple) else getattr(found, "sample", found)
        outputs.append(found.flatten(1))
    return torch.cat(outputs)


def snr(wanted: Tensor, found: Tensor) -> Tensor:
    """Signal-to-noise ratio of every row in dB, [n]."""
    return 10 * (wanted.square().sum(1) / (found - wanted).square().sum(1)).log10()


def weights_snr(model: nn.Module, plan: Plan) -> float:
    """Signal-to-noise ratio of all quantized weights together in dB."""
    signal = noise = 0.0
    for name, layer in plan.layers.items():
        weight = packed.weight_of(model, name).detach().float()
        signal += float(weight.square().sum())
        noise += float((dequantize(layer) - weight).square().sum())
    return 10 * math.log10(signal / noise)


def effective_bits(plan: Plan) -> float:
    """Bits of a weight in the quantized layers, scales and all."""
    weights = sum(math.prod(layer.shape) for layer in plan.layers.values())
    return 8 * sum(layer.nbytes for layer in plan.layers.values()) / weights


if __name__ == "__main__":
    main()
