"""What scaling a layer's input at run time costs (MPQ-DM's pre-scale, ViDiT-Q's smoothing), with and without in turn.

    python benchmarks/smoothing_cost.py

W4A4 layers of PixArt-XL at 512 px (2,048 tokens with guidance) and of Stable Diffusion 1.5, bfloat16 inputs, medians. Prints
and writes benchmarks/results/smoothing-cost.json.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import harness
import torch
from torch import nn

from difloat.layers import install
from difloat.numbers import formats
from difloat.plan.encode import plan_layer
from difloat.plan.specs import Part, QuantSpec

WARMUP, REPEATS = 3, 30
CASES = {
    "linear 1152 -> 1152, 2048 tokens": ((1152, 1152), (2048, 1152)),
    "linear 1152 -> 4608, 2048 tokens": ((4608, 1152), (2048, 1152)),
    "linear 4608 -> 1152, 2048 tokens": ((1152, 4608), (2048, 4608)),
    "convolution 3x3 320 -> 320, 64 x 64, 2 pictures": ((320, 320, 3, 3), (2, 320, 64, 64)),
    "convolution 3x3 1280 -> 1280, 16 x 16, 2 pictures": ((1280, 1280, 3, 3), (2, 1280, 16, 16)),
}


def layer_of(shape: tuple[int, ...], smoothed: bool) -> nn.Module:
    """A quantized layer with random weights."""
    layer: nn.Module = (
        nn.Linear(shape[1], shape[0]) if len(shape) == 2 else nn.Conv2d(shape[1], shape[0], 3, 1, 1)
    )
    model = nn.Sequential(layer.bfloat16())
    part = Part(
        shape[1],
        QuantSpec(formats.parse("uint4"), "channel", zero_point=True),
        QuantSpec(formats.parse("uint4"), zero_point=True),
    )
    weight = torch.randn(shape)
    scale, zero = torch.full((shape[0],), 0.3), torch.full((shape[0],), -2.2)
    plan = plan_layer(
        weight,
        [part],
        [scale],
        weight_zero_points=[zero],
        input_scales=[torch.tensor(0.4)],
        input_zero_points=[torch.tensor(-3.0)],
    )
    if smoothed:
        factors = {"input_factor": torch.rand(shape[1]) + 0.5}
        plan = replace(plan, smoothed=True, tensors={**plan.tensors, **factors})
    install.install(model, "0", plan)
    return model


def measured(shape: tuple[int, ...], x_shape: tuple[int, ...]) -> dict[str, Any]:
    """Medians in seconds, with and without, one after the other."""
    x = torch.randn(x_shape).bfloat16()
    if x.dim() == 4:
        x = x.to(memory_format=torch.channels_last)
    models = {"plain": layer_of(shape, False), "scaled": layer_of(shape, True)}
    calls = {name: partial(model, x) for name, model in models.items()}
    with torch.no_grad():
        harness.interleaved(calls, WARMUP)
        found = harness.medians(harness.interleaved(calls, REPEATS))
    return {"plain_s": found["plain"], "scaled_s": found["scaled"], "ratio": found["scaled"] / found["plain"]}


def main() -> None:
    """Measure all cases."""
    options = harness.arguments(harness.parser(__doc__, out=harness.RESULTS / "smoothing-cost.json"))
    results = {name: measured(*shapes) for name, shapes in CASES.items()}
    for name, found in results.items():
        print(f"{name}: {found['ratio']:.3f}")
    harness.write(options.out, {"layers": results})


if __name__ == "__main__":
    main()
