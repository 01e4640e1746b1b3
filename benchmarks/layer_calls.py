"""What a call of a packed layer costs besides its product: microseconds and Python calls of small layers, as JSON.

    python benchmarks/layer_calls.py

Plain layers, layers with rows of two widths and layers with a low-rank branch, at 1 and 64 tokens (or pixels).
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace

import harness
import torch
from torch import Tensor, nn

from difloat.kernels import dispatch
from difloat.layers import install
from difloat.numbers.formats import parse
from difloat.plan.encode import join_rows, plan_layer
from difloat.plan.plan import LayerPlan
from difloat.plan.specs import Part, QuantSpec, Side

CHANNELS, ROUNDS, REPEATS, RANK = 64, 20, 200, 4


def layer_plan(shape: tuple[int, ...], kind: str, generator: torch.Generator) -> LayerPlan:
    """A layer with random weights: "plain", "mixed" (int2 and int4 rows) or "branch"."""

    def rows(count: int, name: str) -> LayerPlan:
        part = Part(
            CHANNELS, QuantSpec(parse(name), "channel"), QuantSpec(parse("int8"), "token", online=True)
        )
        scales = torch.full((count,), 0.1)
        return plan_layer(torch.randn((count, *shape[1:]), generator=generator) * 0.1, [part], [scales])

    if kind == "mixed":
        half = shape[0] // 2
        bands = [rows(half, "int2"), rows(shape[0] - half, "int4")]
        return join_rows(bands, torch.randperm(shape[0], generator=generator))
    plan = rows(shape[0], "int4")
    if kind == "plain":
        return plan
    factors = {
        "side_down": torch.randn((RANK, *shape[1:]), generator=generator).half(),
        "side_up": torch.randn((shape[0], RANK), generator=generator).half(),
    }
    return replace(plan, tensors={**plan.tensors, **factors}, side=Side(RANK))


def python_calls(run: Callable[[], object]) -> int:
    """Python functions that one call of `run` calls, itself not counted."""
    calls = 0

    def seen(frame: object, event: str, argument: object) -> None:
        nonlocal calls
        calls += event == "call"

    run()
    sys.setprofile(seen)
    try:
        run()
    finally:
        sys.setprofile(None)
    return calls - 1


def microseconds(run: Callable[[], object]) -> float:
    """The fastest of several rounds, per call."""
    return 1e6 * harness.fastest(run, ROUNDS, REPEATS)


@torch.no_grad()
def main() -> None:
    """Measure, write and print."""
    options = harness.arguments(
        harness.parser(__doc__, threads=harness.all_threads(), out=harness.RESULTS / "layer-calls.json")
    )
    rows = []
    for layer_type in ("linear", "conv2d"):
        for kind in ("plain", "mixed", "branch"):
            generator = torch.Generator().manual_seed(0)
            picture = layer_type == "conv2d"
            shape = (CHANNELS, CHANNELS, 3, 3) if picture else (CHANNELS, CHANNELS)
            float_layer = (
                nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1) if picture else nn.Linear(CHANNELS, CHANNELS)
            )
            model = nn.Sequential(float_layer)
            install.install(model, "0", layer_plan(shape, kind, generator))
            for tokens in (1, 64):
                side = int(tokens**0.5)
                size = (1, CHANNELS, side, side) if picture else (tokens, CHANNELS)
                x: Tensor = torch.randn(size, generator=generator)
                run = lambda layer=model[0], x=x: layer(x)  # noqa: E731
                facts = {"layer": layer_type, "kind": kind, "tokens": tokens}
                rows.append({**facts, "calls": python_calls(run), "us": round(microseconds(run), 1)})
    harness.write(options.out, {"backend": dispatch.backend(), "rows": rows}, show=True)


if __name__ == "__main__":
    main()
