"""One forward pass of a whole denoiser on a CPU: torch in float32 and bfloat16 against packed weights and fast attention.

Real configurations, random weights (speed does not depend on their values): the transformer of PixArt-XL-2-512 (0.6 B
parameters, 1024 tokens, 120 text tokens) and the U-Net of Stable Diffusion 1.5 at 512 pixels, both with classifier-free
guidance (two rows).
Block linears and convolutions get FP4 weights (E2M1 per channel) and INT8 activations, found online. All variants are timed
interleaved, in rotated order, until there are enough repetitions or `--budget-s` is spent; medians count. Weights of one shape
are random once: every layer has its own copy, its rows moved on, so that caches see as much memory as in a trained model.

Writes ``benchmarks/results/whole_model.json``; ``--layers`` cuts the number of blocks for a quick look and writes nothing;
``--profile`` prints where the time of the fastest variant goes, by operator, and measures nothing else.
"""

from __future__ import annotations

import argparse
import copy
import math
import statistics
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import harness
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from difloat.kernels import dispatch
from difloat.layers import attention, install
from difloat.layers import packed as layers
from difloat.numbers.formats import parse
from difloat.plan.encode import plan_layer
from difloat.plan.plan import LayerPlan
from difloat.plan.specs import AttentionPlan, Part, QuantSpec

WEIGHT = QuantSpec(parse("e2m1"), "channel")
TOKEN = QuantSpec(parse("int8"), "token", online=True)
OPERANDS = AttentionPlan(operand=parse("int8"))


def pixart(blocks: int | None) -> tuple[nn.Module, dict[str, Any]]:
    """PixArt-XL-2-512 and a call."""
    from diffusers import PixArtTransformer2DModel

    model = PixArtTransformer2DModel(
        num_layers=blocks or 28,
        sample_size=64,
        out_channels=8,
        caption_channels=4096,
        use_additional_conditions=False,
    )
    call = {
        "hidden_states": torch.randn(2, 4, 64, 64),
        "encoder_hidden_states": torch.randn(2, 120, 4096),
        "encoder_attention_mask": torch.ones(2, 120),
        "timestep": torch.tensor([500, 500]),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }
    return model, call


def stable_diffusion(blocks: int | None) -> tuple[nn.Module, dict[str, Any]]:
    """The U-Net of Stable Diffusion 1.5, channels last, and a call; `blocks` is the number of ResNet blocks per level."""
    from diffusers import UNet2DConditionModel

    model = UNet2DConditionModel(sample_size=64, cross_attention_dim=768, layers_per_block=blocks or 2)
    model = model.to(memory_format=torch.channels_last)
    call = {
        "sample": torch.randn(2, 4, 64, 64).to(memory_format=torch.channels_last),
        "encoder_hidden_states": torch.randn(2, 77, 768),
        "timestep": torch.tensor(500),
    }
    return model, call


MODELS: dict[str, Callable[[int | None], tuple[nn.Module, dict[str, Any]]]] = {
    "pixart-xl-512": pixart,
    "stable-diffusion-1.5": stable_diffusion,
}


class _NoInitialization(TorchFunctionMode):
    """Inside, `torch.nn.init` leaves tensors as they are: 0.6 B weights would take longer than a forward pass."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__module__", None) == "torch.nn.init":
            return args[0] if args else (kwargs or {})["tensor"]
        return func(*args, **(kwargs or {}))


@cache
def random_weight(shape: tuple[int, ...]) -> Tensor:
    """Normal numbers whose product with normal inputs stays of size one."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(shape, generator=generator).mul_(math.prod(shape[1:]) ** -0.5)


@cache
def random_plan(shape: tuple[int, ...]) -> LayerPlan:
    """`random_weight`, packed; the largest magnitude of every channel at the end of the grid."""
    weight = random_weight(shape)
    scale = weight.flatten(1).abs().amax(1) / WEIGHT.format.max
    return plan_layer(weight, [Part(weight.shape[1], WEIGHT, TOKEN)], [scale])


def filled(model: nn.Module) -> nn.Module:
    """The model with random weights; row `n` of the n-th tensor is row 0 of `random_weight`."""
    for number, (name, parameter) in enumerate(model.named_parameters()):
        if parameter.dim() > 1:
            parameter.copy_(random_weight(tuple(parameter.shape)).roll(number, 0))
        else:
            parameter.fill_(float(name.endswith("weight")))  # norms: 1, biases: 0
    return model


def quantized(model: nn.Module) -> nn.Module:
    """A copy whose block layers are packed: the codes of the weights that `filled` gave them."""
    twin = install.shadow(model)
    numbers = {name: number for number, (name, _) in enumerate(model.named_parameters())}
    for name, module in layers.quantizable(model).items():
        if "block" in name:
            plan, number = random_plan(tuple(module.weight.shape)), numbers[f"{name}.weight"]
            moved = {key: tensor.roll(number, 0) for key, tensor in plan.tensors.items()}
            install.install(twin, name, replace(plan, tensors=moved))
    return twin.to(memory_format=torch.channels_last)  # of convolutions, as the float model's


def cast(call: Any, dtype: torch.dtype) -> Any:
    """The call with its floating-point tensors in another dtype."""
    if isinstance(call, dict):
        return {key: cast(value, dtype) for key, value in call.items()}
    return call.to(dtype) if isinstance(call, Tensor) and call.is_floating_point() else call


def variants(
    model: nn.Module, call: dict[str, Any], with_float: bool
) -> tuple[dict[str, Callable[[], Tensor]], dict[str, int]]:
    """One forward pass by every way to compute it, and the bytes of block weights."""
    half = copy.deepcopy(model).bfloat16()
    packed = quantized(half)
    fast_half, fast_packed = install.shadow(half), install.shadow(packed)
    for fast in (fast_half, fast_packed):
        attention.accelerate(fast)
    small = cast(call, torch.bfloat16)

    def forward(module: nn.Module, arguments: dict[str, Any], backend: str) -> Callable[[], Tensor]:
        def run() -> Tensor:
            with dispatch.use_backend(backend):
                return module(**arguments, return_dict=False)[0]  # type: ignore[no-any-return]

        return run

    found = {"torch bf16": forward(half, small, "reference")}
    if with_float:
        found["torch fp32"] = forward(model, call, "reference")
    for name in [name for name in ("torch", "cpu") if name in dispatch.available()]:
        found[f"{name}: packed layers"] = forward(packed, small, name)
        found[f"{name}: bf16 layers, fast attention"] = forward(fast_half, small, name)
        found[f"{name}: packed layers, fast attention"] = forward(fast_packed, small, name)
    if "cpu" in dispatch.available():
        names = [name for name, module in packed.named_modules() if attention.has_processor(module)]
        on_grids = install.shadow(packed)
        attention.install(on_grids, dict.fromkeys(names, OPERANDS))
        found["cpu: packed layers, attention on an int8 grid"] = forward(on_grids, small, "cpu")
    return found, {"bf16": weight_bytes(half), "packed": weight_bytes(packed)}


def weight_bytes(module: nn.Module) -> int:
    """Bytes of the layers that can be quantized, or are, inside blocks."""
    kinds = (nn.Linear, nn.Conv2d)
    found = [m for name, m in module.named_modules() if "block" in name and isinstance(m, kinds)]
    return sum(tensor.nbytes for m in found for tensor in [*m.parameters(), *m.buffers()])


def measure(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """One model: times of all variants, distances of their outputs from float32 or bfloat16, bytes."""
    with _NoInitialization():
        model, call = MODELS[name](options.layers)
    model = filled(model.eval().requires_grad_(False))
    sys.stderr.write(f"{name}: built\n")
    ways, sizes = variants(model, call, not options.no_float)
    outputs = {}
    for way, run in ways.items():  # the untimed first call
        outputs[way] = run().float()
        sys.stderr.write(f"{name}: {way} runs\n")
    times = harness.interleaved(
        ways,
        options.repeats,
        pause_s=0.05,
        budget_s=options.budget_s,
        after_turn=lambda turn, spent: sys.stderr.write(
            f"repetition {turn} of {options.repeats}, {spent:.0f} s\n"
        ),
    )
    base, half = outputs.get("torch fp32", outputs["torch bf16"]), statistics.median(times["torch bf16"])
    rows = {}
    for way, found in times.items():
        median = statistics.median(found)
        distance = float((outputs[way] - base).norm() / base.norm())
        rows[way] = {
            "median_s": median,
            "min_s": min(found),
            "repeats": len(found),
            "speed_vs_bf16": half / median,
            "distance": distance,
        }
        sys.stdout.write(
            f"{name}  {way}: {median:.3f} s, {half / median:.2f}x bf16, distance {distance:.1e}\n"
        )
    return {"model": name, "layers": options.layers, "weight_bytes": sizes, "variants": rows}


def profile(name: str, options: argparse.Namespace) -> None:
    """Print the time of the last variant, by operator."""
    with _NoInitialization():
        model, call = MODELS[name](options.layers)
    run = list(variants(filled(model.eval().requires_grad_(False)), call, False)[0].values())[-1]
    run()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as recorded:
        run()
    sys.stdout.write(recorded.key_averages().table(sort_by="self_cpu_time_total", row_limit=25))


def main() -> None:
    """Run, print and write."""
    parser = harness.parser(__doc__, threads=2, repeats=5, out=harness.RESULTS / "whole_model.json")
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument(
        "--budget-s", type=float, default=900.0, help="per model: no further repetition after it"
    )
    parser.add_argument("--profile", action="store_true", help="print where the time goes instead")
    parser.add_argument("--layers", type=int, help="fewer blocks, for a quick look")
    parser.add_argument("--no-float", action="store_true", help="leave float32 out")
    options = harness.arguments(parser)
    if options.profile:
        with torch.no_grad():
            for name in options.models:
                profile(name, options)
        return
    with torch.no_grad():
        models = [measure(name, options) for name in options.models]
    if options.layers is None:
        harness.write(options.out, {"models": models})


if __name__ == "__main__":
    main()
