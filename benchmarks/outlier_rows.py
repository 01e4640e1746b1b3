"""What rows of a layer should be chosen by where weights have outliers: MPQ-DM's regime, made without changing the model.

    python benchmarks/outlier_rows.py --bits w2a4 --seeds 0 1 2
    python benchmarks/outlier_rows.py --table

A norm's channels are divided by the strength and the columns of the weights behind it multiplied ("in weights"), or the other
way round ("in inputs"). In exact arithmetic the model computes the same, and the script checks that. Only the layers behind
such norms are quantized, untrained, by the recipe `mpqdm`, with rows sorted by kurtosis, output error, magnitude or at random,
with its pre-scale of inputs and without, and with all rows alike. The measure is the signal-to-noise ratio of the guided output
on rows of another seed, in dB. Seeds vary calibration, the channels with outliers, and what is random in the choice. Adds to
benchmarks/results/outlier-rows.json. Finished rows are kept.
"""

from __future__ import annotations

import argparse
import copy
import math
import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import harness
import torch
from guidance import halves
from outlier_tables import tables
from torch import Tensor, nn

from difloat import api, recipes, run
from difloat.calibration.collect import Calibration
from difloat.layers import install
from difloat.methods.mixed_rows import kurtosis
from difloat.plan.rules import Bits

MODEL = "emoji-unet"
RESULTS = harness.RESULTS / "outlier-rows.json"
STRENGTHS = (1, 4, 16, 64)
CHANNELS = 2  # with outliers, of every norm
HELD_OUT_SEED = 9
STEPS = 20
SAME_DB = 100  # what rounding in float32 leaves
# What a norm of a block is read by, and by nothing else.
READERS = {
    "norm": ("proj_in",),
    "norm1": ("attn1.to_q", "attn1.to_k", "attn1.to_v"),
    "norm2": ("attn2.to_q",),
    "norm3": ("ff.net.0.proj",),
}
CHOICES: dict[str, dict[str, Any]] = {
    "all rows alike": {"mixed": False},
    "by kurtosis": {"criterion": "kurtosis"},
    "by error": {"criterion": "error"},
    "by magnitude": {"criterion": "magnitude"},
    "at random": {"criterion": "random"},
}
UNTRAINED: dict[str, Any] = {"epochs": 0, "relation": "off"}


def main() -> None:
    """Measure what is missing, or print the tables."""
    parser = harness.parser(__doc__, threads=harness.all_threads())
    parser.add_argument("--bits", default="w2a4")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--strengths", type=int, nargs="+", default=STRENGTHS)
    parser.add_argument(
        "--samples", type=int, default=64, help="calibration rows; twice as many are held out"
    )
    parser.add_argument("--unscaled", action="store_true", help="leave out the rows whose inputs are scaled")
    parser.add_argument("--table", action="store_true", help="print the tables and measure nothing")
    arguments = harness.arguments(parser)
    if arguments.table:
        sys.stdout.write(tables(harness.stored(RESULTS)))
        return
    pipeline = run.load_pipeline(MODEL)
    guidance, call = run.call_of(MODEL, None)
    drawn: dict[str, Any] = {"prompts": run.prompts_of(pipeline, MODEL, None), "call_kwargs": call}
    drawn |= {"samples": arguments.samples, "steps": STEPS, "guidance_scale": guidance, "progress": False}
    held_out = api.calibrate(pipeline, **{**drawn, "samples": 2 * arguments.samples}, seed=HELD_OUT_SEED)
    for seed in arguments.seeds:
        data = api.calibrate(pipeline, **drawn, seed=seed)
        measure(arguments, pipeline, data, held_out, float(guidance or 1), seed)


def measure(
    arguments: argparse.Namespace,
    pipeline: Any,
    data: Calibration,
    held_out: Calibration,
    guidance: float,
    seed: int,
) -> None:
    """Measure what is missing of one seed."""
    results, exact = harness.stored(RESULTS), api.denoiser(pipeline)
    names = [reader for _, readers in norms(exact) for reader in readers]
    for where, strength in regimes(arguments.strengths):
        model = with_outliers(exact, where, strength, seed)
        if (same := signal_to_noise(exact, model, held_out, guidance)) < SAME_DB:
            raise ValueError(
                f"outliers must leave the model's output alone, got {same:.0f} dB at {where} x{strength}"
            )
        rows = torch.cat([kurtosis(model.get_submodule(name).weight) for name in names])
        shape = {"median": rows.median().item(), "high": rows.quantile(0.95).item()}
        task = replace(api.task_of(pipeline, data, Bits.parse(arguments.bits)), progress=False, seed=seed)
        task = replace(task, model=install.workable(model), only=frozenset(names))
        for name, options in CHOICES.items():
            for scaled in (False,) if "mixed" in options or arguments.unscaled else (False, True):
                own = {"scale_inputs": scaled} if "mixed" not in options else {}
                label = f"{name}{', inputs scaled' if scaled else ''}"
                key = f"{arguments.bits} | {where} x{strength} | {label} | seed {seed}"
                if key in results and results[key]["samples"] == arguments.samples:
                    continue
                plan = recipes.plan(task, "mpqdm", arguments.bits, {**UNTRAINED, **options, **own})
                moved = [one["moved"] > 0 for one in plan.measured["widths"].values()]
                found = {
                    "snr_db": signal_to_noise(
                        exact, install.apply(install.shadow(model), plan), held_out, guidance
                    ),
                    "kurtosis": shape,
                    "layers_with_moved_rows": f"{sum(moved)} of {len(names)}",
                    "samples": arguments.samples,
                    "commit": harness.commit(),
                    "cpu": harness.machine()["cpu"],
                }
                results = harness.add(RESULTS, {key: found})
                sys.stderr.write(f"{key}: {found['snr_db']:.2f} dB\n")


def regimes(strengths: list[int]) -> Iterator[tuple[str, int]]:
    """Where outliers are, and how strong. At strength 1 there are none."""
    for strength in strengths:
        yield from [("none", 1)] if strength == 1 else [("in weights", strength), ("in inputs", strength)]


def norms(model: nn.Module) -> list[tuple[str, list[str]]]:
    """The affine norms that are read by linear layers only, with these."""
    found = []
    for name, module in model.named_modules():
        parent, _, own = name.rpartition(".")
        readers = [f"{parent}.{reader}" for reader in READERS.get(own, ())]
        known = dict(model.named_modules())
        if readers and getattr(module, "weight", None) is not None and all(one in known for one in readers):
            found.append((name, readers))
    return found


@torch.no_grad()
def with_outliers(exact: nn.Module, where: str, strength: int, seed: int) -> nn.Module:
    """A copy of the model that computes the same, with outliers in the weights behind norms or in what they read."""
    model = copy.deepcopy(exact)
    generator = torch.Generator().manual_seed(seed)
    factor = float(strength) if where == "in weights" else 1 / strength
    for name, readers in norms(model):
        norm = model.get_submodule(name)
        chosen = torch.randperm(len(norm.weight), generator=generator)[:CHANNELS]
        for parameter in (norm.weight, norm.bias):
            parameter[chosen] /= factor
        for reader in readers:
            model.get_submodule(reader).weight[:, chosen] *= factor
    return model


@torch.no_grad()
def signal_to_noise(exact: nn.Module, other: nn.Module, data: Calibration, guidance: float) -> float:
    """Power of the guided output of the exact model over that of the other's difference from it, in dB."""
    pairs = [(one, two) for two, one in enumerate(data.beside) if one is not None]
    signal = noise = 0.0
    for at in range(0, len(pairs), 16):
        wanted, found = (
            guided(halves(model, data, pairs[at : at + 16]), guidance) for model in (exact, other)
        )
        signal += wanted.square().sum().item()
        noise += (found - wanted).square().sum().item()
    return 10 * math.log10(signal / max(noise, 1e-300))


def guided(outputs: tuple[Tensor, Tensor], guidance: float) -> Tensor:
    """What the sampler makes of the two parts."""
    one, two = outputs
    return one + guidance * (two - one)


if __name__ == "__main__":
    main()
