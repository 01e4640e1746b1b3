"""FP4DiT on a transformer of the size of PixArt-XL (28 blocks, 1152 wide, random weights): memory, time per block, forecast.

    python benchmarks/large_model.py --full 2                 # two blocks with all iterations, the rest with few
    python benchmarks/large_model.py --full 2 --work DIR      # keeps calibration and finished blocks: a killed run goes on

Prints what was counted before, and what the run took beside it; writes benchmarks/results/<name>.json.
"""

from __future__ import annotations

import argparse
import os
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import harness
import torch

from difloat import api, job, recipes, reference_models, run
from difloat.calibration.collect import CalibrationSettings
from difloat.calibration.pace import Pace
from difloat.estimate import Forecast, forecast
from difloat.methods import blockwise
from difloat.methods.learned_rounding import RoundingSettings
from difloat.methods.task import Task
from difloat.plan.plan import Plan
from difloat.plan.rules import Bits

PROMPTS = ["a red cat", "a blue house", "a bird on a tree", "two boats"]


def main() -> None:
    """Run once and write the result."""
    parser = harness.parser(__doc__, threads=harness.all_threads())
    parser.add_argument("--blocks", type=int, default=28, help="transformer blocks")
    parser.add_argument("--latent", type=int, default=64, help="latent size; 64 is 512 pixels, 1024 tokens")
    parser.add_argument("--full", type=int, default=2, help="blocks that get all iterations")
    parser.add_argument("--iterations", type=int, default=RoundingSettings.iterations)
    parser.add_argument("--few", type=int, default=4, help="iterations of the other blocks")
    parser.add_argument("--rows", type=int, default=16, help="calibration rows")
    parser.add_argument("--memory-mb", type=int, default=2048, help="for calibration and for activations")
    parser.add_argument("--work", type=Path, help="where calibration and finished blocks are kept")
    parser.add_argument("--name", default="large-model", help="of the file of results")
    arguments = harness.arguments(parser)
    peak = PeakMemory()
    pipeline = build(arguments.blocks, arguments.latent)
    module = pipeline.transformer
    loaded_bytes = peak.take()
    settings = CalibrationSettings(
        samples=arguments.rows, steps=2, prompts_per_batch=2, memory_bytes=arguments.memory_mb << 20
    )
    options = {"iterations": arguments.iterations, "rounding_rows": arguments.rows}
    asked = job.request("fp4dit", "w4a6", options, settings)
    expected = forecast(job.fit(pipeline, asked), PROMPTS)
    sys.stderr.write(run.describe(expected, settings) + "\n")
    start = time.perf_counter()
    data = api.calibrate(pipeline, prompts=PROMPTS, cache_dir=arguments.work, **vars(settings))
    calibration_s = time.perf_counter() - start
    task = Task(module, data, Bits.parse("w4a6"), 0, True, arguments.work, settings.memory_bytes)
    shorten(arguments.full, arguments.few)
    start = time.perf_counter()
    plan = recipes.plan(task, "fp4dit", "w4a6", options)
    seconds = {"calibration": calibration_s, "plan": time.perf_counter() - start}
    result = summary(arguments, plan, expected, data.pace, seconds)
    result["resident_bytes_after_loading"], result["resident_bytes_peak"] = loaded_bytes, peak.take()
    harness.write(harness.RESULTS / f"{arguments.name}.json", result, show=True)


def build(blocks: int, latent: int) -> Any:
    """PixArt-alpha's own configuration in bfloat16 with random weights; text from an embedded model's encoder."""
    from diffusers import PixArtTransformer2DModel

    pipeline = reference_models.load("emoji-pixart").to(torch.bfloat16)
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    pipeline.transformer = PixArtTransformer2DModel(
        num_attention_heads=16,
        attention_head_dim=72,
        in_channels=4,
        out_channels=8,
        num_layers=blocks,
        cross_attention_dim=1152,
        sample_size=latent,
        patch_size=2,
        attention_bias=True,
        norm_type="ada_norm_single",
        caption_channels=pipeline.transformer.config.caption_channels,
        use_additional_conditions=False,
    ).eval()
    torch.set_default_dtype(torch.float32)
    return pipeline


class PeakMemory:
    """Largest resident memory of this process since the last `take`, sampled 20 times a second."""

    def __init__(self) -> None:
        """Start sampling."""
        self._largest = 0
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while True:
            self._largest = max(self._largest, resident_bytes())
            time.sleep(0.05)

    def take(self) -> int:
        """The largest value, in bytes; sampling starts over."""
        largest, self._largest = max(self._largest, resident_bytes()), 0
        return largest


def resident_bytes() -> int:
    """Memory of this process that is in RAM."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def shorten(full: int, few: int) -> None:
    """Give all but the first `full` blocks only `few` iterations; the path through the code is the same."""
    learn, seen = blockwise.learn_rounding, []

    def learn_some(block: Any, drafts: Any, inputs: Any, targets: Any, settings: Any, *rest: Any) -> Any:
        seen.append(block)
        chosen = settings if len(seen) <= full else replace(settings, iterations=few)
        return learn(block, drafts, inputs, targets, chosen, *rest)

    blockwise.learn_rounding = learn_some


def summary(
    arguments: argparse.Namespace, plan: Plan, expected: Forecast, pace: Pace, seconds: dict[str, float]
) -> dict[str, Any]:
    """What was forecast and what was measured; the whole is extrapolated from the blocks with all iterations."""
    blocks = [block["seconds"] for block in plan.measured["blocks"].values()]
    full, few = blocks[: arguments.full], blocks[arguments.full :]
    whole = seconds["plan"] - sum(few) + len(few) * sum(full) / len(full)
    return {
        **{name: str(value) for name, value in vars(arguments).items()},
        "weights": sum(kind.weights for kind in expected.kinds if kind.packed_bytes),
        "packed_bytes": expected.packed_bytes,
        "forecast_rows": dict(expected.computed),
        "forecast_s": None
        if pace.row_seconds is None
        else sum(expected.computed.values()) * pace.row_seconds,
        "measured_s": seconds,
        "plan_s_with_all_iterations_in_every_block": whole,
        "block_s_full": full,
        "block_s_few": few,
        "seconds": plan.measured["seconds"],
        "rounding_rows": plan.measured["rounding_rows"],
        "errors": plan.measured["blocks"],
    }


if __name__ == "__main__":
    main()
