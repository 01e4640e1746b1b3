"""How much of guidance quantized models keep: error and slope of the guidance direction along full-precision trajectories.

    TEN="--recipe msfp --bits w4a4 --steps 20 --set adapters=1 --set epochs=10"
    difloat quantize emoji-unet nearest --recipe msfp --bits w4a4 --steps 20 --set adapters=0
    difloat quantize emoji-unet tuned-10 $TEN --set dfa=false
    difloat quantize emoji-unet kept-10 $TEN --set factor_power=2 --set guidance_weight=9
    python benchmarks/guidance.py emoji-unet nearest tuned-10 kept-10

The guidance direction is the conditional minus the unconditional output for the same sample. What a model keeps of it is the
slope of its direction over full precision's, 1 if it responds to the prompt as strongly. Errors are mean squares, of the output
and of what the sampler gets, ``u + g (c - u)``. Calibration rows of another seed than quantization's. Adds to
benchmarks/results/guidance.json and prints a Markdown table.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import harness
import torch
from torch import Tensor, nn

from difloat import api, checkpoint, run
from difloat.calibration.collect import Calibration
from difloat.calibration.rows import first_tensor
from difloat.reference_models import NAMES

RESULTS = harness.RESULTS / "guidance.json"
STEPS, SEED = 20, 1


def main() -> None:
    """Measure every checkpoint, store, print."""
    parser = harness.parser(__doc__, threads=harness.all_threads())
    parser.add_argument("model", choices=NAMES, help="in full precision")
    parser.add_argument(
        "checkpoints", nargs="+", type=Path, help="quantized from it; the folder's name is the row's"
    )
    parser.add_argument("--rows", type=int, default=640)
    arguments = harness.arguments(parser)
    pipeline = run.load_pipeline(arguments.model)
    guidance, call = run.call_of(arguments.model, None)
    data = api.calibrate(
        pipeline,
        prompts=run.prompts_of(pipeline, arguments.model, None),
        call_kwargs=call,
        samples=arguments.rows,
        steps=STEPS,
        guidance_scale=guidance,
        seed=SEED,
    )
    results = {}
    for folder in arguments.checkpoints:
        quantized = api.denoiser(checkpoint.load(folder))
        results[f"{arguments.model} | {folder.name}"] = {
            **compare(api.denoiser(pipeline), quantized, data, float(guidance or 1)),
            **harness.facts(),
        }
    sys.stdout.write(table(harness.add(RESULTS, results)))


@torch.no_grad()
def compare(exact: nn.Module, quantized: nn.Module, data: Calibration, guidance: float) -> dict[str, Any]:
    """Slope and mean squared errors by timestep, from the first step to the last."""
    pairs: dict[float, list[tuple[int, int]]] = {}
    for row, other in enumerate(data.beside):
        if other is not None:
            pairs.setdefault(data.timesteps[row], []).append((other, row))
    found: dict[str, list[float]] = {"timesteps": [], "kept": [], "error": [], "guided_error": []}
    for timestep, rows in sorted(pairs.items(), reverse=True):
        (one, two), (its_one, its_two) = (halves(model, data, rows) for model in (exact, quantized))
        direction, its_direction = two - one, its_two - its_one
        guided = (its_one - one) + guidance * (its_direction - direction)
        found["timesteps"].append(timestep)
        found["kept"].append(float((its_direction * direction).sum() / direction.square().sum()))
        found["error"].append(float(((its_one - one).square() + (its_two - two).square()).mean() / 2))
        found["guided_error"].append(float(guided.square().mean()))
    return {**found, "pairs": sum(map(len, pairs.values())), "guidance_scale": guidance}


def halves(model: nn.Module, data: Calibration, pairs: list[tuple[int, int]]) -> tuple[Tensor, Tensor]:
    """Outputs for the first rows of some pairs, and for the second."""
    args, kwargs = data.batch([row for pair in pairs for row in pair])
    output = first_tensor(model(*args, **kwargs)).float()
    return output[0::2], output[1::2]


def table(results: dict[str, Any]) -> str:
    """Sums over the steps, and what is kept in the first, middle and last third."""
    lines = [
        "| | error, sum of steps | guided error | guidance kept, first third | middle | last |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in results.items():
        third = -(-len(row["kept"]) // 3)
        means = [
            sum(part) / len(part) for part in (row["kept"][n : n + third] for n in (0, third, 2 * third))
        ]
        cells = [
            f"{sum(row['error']):.3f}",
            f"{sum(row['guided_error']):.3f}",
            *(f"{mean:.1%}" for mean in means),
        ]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
