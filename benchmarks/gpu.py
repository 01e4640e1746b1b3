"""The GPU kernels against torch on one device: first checked, then timed, within a few minutes.

    python benchmarks/gpu.py                       # everything; under 8 minutes on an H200
    python benchmarks/gpu.py --only linears        # one part: checks, linears, convolutions, models
    TRITON_INTERPRET=1 python benchmarks/gpu.py --rehearse   # tiny shapes on a CPU; its times mean nothing

Limits of the device (copy bandwidth, bf16, FP8 and int8 products) are measured in the same run, and every time is given
beside its ratio to torch bf16 and to the nearer limit. Layers are timed as CUDA graphs over several copies of the weights,
so that neither launches nor the cache decide. A failed check ends the run before anything is timed.

Prints tables and writes ``benchmarks/results/gpu-<device>.json``.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import harness
import torch
from torch import Tensor, nn

from difloat.kernels import reference
from difloat.kernels.geometry import Geometry
from difloat.kernels.triton import backend, tiles
from difloat.kernels.triton import operands as triton_operands
from difloat.numbers.formats import parse
from difloat.numbers.packing import packed_channels
from difloat.plan.specs import Part, QuantSpec
from difloat.plan.weight import Inputs, PackedWeight, Weight

LINEARS = {  # in, out
    "PixArt attention": (1152, 1152),
    "PixArt MLP in": (1152, 4608),
    "PixArt MLP out": (4608, 1152),
    "FLUX attention": (3072, 3072),
    "FLUX MLP in": (3072, 12288),
    "FLUX MLP out": (12288, 3072),
}
TOKENS = (1, 16, 256, 1024, 4096, 8192)
CONVOLUTIONS = {  # batch, channels, size, kernel: Stable Diffusion 1.5 at 512 pixels with guidance
    "320 at 64, 3x3": (2, 320, 64, 3),
    "640 at 32, 3x3": (2, 640, 32, 3),
    "1280 at 16, 3x3": (2, 1280, 16, 3),
    "320 at 64, 1x1": (2, 320, 64, 1),
}
FORMATS = {  # weight, activation
    "W4A8 e2m1 e4m3fn": ("e2m1", "e4m3fn"),
    "W4A4 e2m1 e2m1": ("e2m1", "e2m1"),
    "W4A8 int4 int8": ("int4", "int8"),
    "W4A16 e2m1": ("e2m1", None),
}
COLD_BYTES = (
    128 << 20
)  # weights that are touched between two uses of the same copy: more than any cache holds
MOST_COPIES = 128
REPEATS = 7


@dataclass
class Run:
    """Where, for how long, and what came out."""

    device: torch.device
    end: float
    rehearse: bool
    limits: dict[str, float]
    rows: list[dict[str, Any]]

    @property
    def late(self) -> bool:
        """Whether the time is used up; what is left out is listed in the result."""
        return time.monotonic() > self.end


def part_of(weight: str, activation: str | None, channels: int, group_size: int | None = None) -> Part:
    """Per channel or group, with an online scale per token."""
    spec = QuantSpec(parse(weight), "group" if group_size else "channel", group_size)
    act = None if activation is None else QuantSpec(parse(activation), "token", online=True)
    return Part(channels, spec, act)


def random_weight(shape: Sequence[int], part: Part, device: torch.device) -> tuple[Tensor, Tensor]:
    """Random codes, packed, and scales that give outputs of about the size of the inputs."""
    rows, channels, *kernel = shape
    size = (rows, packed_channels(channels, part.weight.format.bits), *kernel)
    packed = torch.randint(0, 256, size, device=device, dtype=torch.int32).to(torch.uint8)
    if kernel:
        packed = packed.contiguous(memory_format=torch.channels_last)
    fan_in = channels * (kernel[0] * kernel[1] if kernel else 1)
    count = part.weight.scale_count(rows, channels)
    scale = (torch.rand(count, device=device) + 0.5) / (part.weight.format.max * fan_in**0.5)
    return packed, scale


def milliseconds(run: Run, calls: Sequence[Callable[[], object]]) -> float:
    """Median time of one call when all follow each other, as a CUDA graph."""
    for call in (*calls[:2], calls[0]):
        call()
    if run.device.type != "cuda":
        start = time.perf_counter()
        calls[0]()
        return (time.perf_counter() - start) * 1e3
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    times = []
    for _ in range(REPEATS + 2):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop) / len(calls))
    return statistics.median(times[2:])


def measure_limits(run: Run) -> dict[str, float]:
    """Bytes per second of a copy (read and written), operations per second of large products."""
    n, size = (64, 1 << 20) if run.rehearse else (8192, 1 << 31)
    source = torch.randint(0, 127, (size,), dtype=torch.int8, device=run.device)
    target = torch.empty_like(source)
    limits = {"copy_bytes_per_s": 2 * size / (milliseconds(run, [lambda: target.copy_(source)]) / 1e3)}
    a, b = (torch.randn(n, n, device=run.device, dtype=torch.bfloat16) for _ in range(2))
    limits["bf16_ops_per_s"] = 2 * n**3 / (milliseconds(run, [lambda: a @ b]) / 1e3)
    i, j = (t.mul(30).clamp(-127, 127).to(torch.int8) for t in (a, b))
    limits["int8_ops_per_s"] = 2 * n**3 / (milliseconds(run, [lambda: torch._int_mm(i, j.t())]) / 1e3)
    if has_fp8(run):
        f, g = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn)
        one = torch.ones((), device=run.device)

        def fp8() -> Tensor:
            return torch._scaled_mm(f, g.t(), one, one, out_dtype=torch.bfloat16)

        limits["fp8_ops_per_s"] = 2 * n**3 / (milliseconds(run, [fp8]) / 1e3)
    return limits


def has_fp8(run: Run) -> bool:
    """Whether the device multiplies FP8."""
    return run.device.type == "cuda" and torch.cuda.get_device_capability(run.device) >= (8, 9)


def check(run: Run) -> None:
    """Every format on ragged shapes against float64; RuntimeError names the first that is off."""
    pairs = [*FORMATS.values(), ("e2m3", "e2m3"), ("int3", "int8"), ("e3m2", "e4m3"), ("e2m1", "int8")]
    shapes = [(5, 70, 200)] if run.rehearse else [(1, 1152, 1152), (77, 200, 1160), (1000, 1152, 4608)]
    for weight, activation in pairs:
        for tokens, rows, channels in shapes:
            for group_size in (None, 128):
                part = part_of(weight, activation, channels, group_size)
                packed, scale = random_weight((rows, channels), part, run.device)
                x = torch.randn(tokens, channels, device=run.device, dtype=torch.bfloat16)
                y = backend.linear(x, packed_weight(packed, scale, part), Inputs(), None)
                w = reference.dequantize(packed, scale, None, weight, channels, group_size or 0)
                rounded = x.float()
                if activation is not None:
                    rounded = reference.fake_quantize_input(rounded, None, None, activation, True)
                truth = rounded.double() @ w.double().T
                plain = (rounded.bfloat16() @ w.bfloat16().T).double()
                error, allowed = ((t.double() - truth).norm() / truth.norm() for t in (y, plain))
                name = f"{weight} {activation} {tokens}x{channels}x{rows} groups of {group_size or 'a row'}"
                run.rows.append({"part": "checks", "name": name, "error": float(error)})
                if not error <= 2 * allowed:
                    raise RuntimeError(f"{name} must be within {2 * allowed:.1e} of float64, got {error:.1e}")


def record(
    run: Run, part: str, name: str, method: str, kind: str, ms: float, base: float, ops: float, moved: float
) -> None:
    """One row: time, ratio to bf16, share of the nearer limit for operands of type `kind`."""
    floor = max(ops / run.limits[f"{kind}_ops_per_s"], moved / run.limits["copy_bytes_per_s"]) * 1e3
    row = {
        "part": part,
        "name": name,
        "method": method,
        "ms": ms,
        "vs_bf16": base / ms,
        "of_limit": floor / ms,
    }
    run.rows.append(row)
    sys.stdout.write(
        f"{name:34} {method:28} {ms:9.4f} ms {base / ms:6.2f}x bf16 {floor / ms:6.0%} of limit\n"
    )
    sys.stdout.flush()


def kind_of(run: Run, part: Part, x: Tensor) -> str:
    """Name of the limit for a layer: the operand type that the kernels use for it."""
    operands = triton_operands.choose(
        part.weight.format,
        None if part.activation is None else part.activation.format,
        x.dtype,
        backend.capability(x.device),
    )
    assert operands is not None
    name = {"e4m3": "fp8", "int8": "int8"}.get(operands.kind, "bf16")
    return name if f"{name}_ops_per_s" in run.limits else "bf16"


def linears(run: Run) -> None:
    """Linear layers, quantization of the input included."""
    shapes = {"tiny": (128, 64)} if run.rehearse else LINEARS
    for name, (channels, rows) in shapes.items():
        for tokens in (3,) if run.rehearse else TOKENS:
            if run.late:
                run.rows.append({"part": "linears", "name": f"{name}, {tokens} tokens", "skipped": "time"})
                continue
            one_linear(run, f"{name}, {tokens} tokens", tokens, channels, rows)


def one_linear(run: Run, name: str, tokens: int, channels: int, rows: int) -> None:
    """All methods on one shape."""
    x = torch.randn(tokens, channels, device=run.device, dtype=torch.bfloat16)
    ops, activations = 2.0 * tokens * channels * rows, 2 * tokens * (channels + rows)

    def copies(size: float) -> int:
        return 1 if run.rehearse else max(2, min(MOST_COPIES, int(COLD_BYTES // (size + activations)) + 1))

    base = torch.randn(rows, channels, device=run.device, dtype=torch.bfloat16)
    dense = [base.clone() for _ in range(copies(2 * rows * channels))]
    bf16 = milliseconds(run, [lambda w=w: nn.functional.linear(x, w) for w in dense])
    record(run, "linears", name, "torch bf16", "bf16", bf16, bf16, ops, activations + 2 * rows * channels)
    for label, (kind, weight_bytes, calls) in peers(run, x, dense).items():
        moved = activations + weight_bytes * rows * channels
        record(run, "linears", name, label, kind, milliseconds(run, calls), bf16, ops, moved)
    for label, (weight, activation) in FORMATS.items():
        part = part_of(weight, activation, channels)
        stored = [
            random_weight((rows, channels), part, run.device) for _ in range(copies(rows * channels / 2))
        ]
        calls = [lambda s=s, p=part: backend.linear(x, packed_weight(*s, p), Inputs(), None) for s in stored]
        with tiles.tuning() if not run.late else nullcontext():
            calls[0]()
        moved = activations + rows * channels / 2
        kind = kind_of(run, part, x)
        record(run, "linears", name, label, kind, milliseconds(run, calls), bf16, ops, moved)


Peer = tuple[str, float, list[Callable[[], object]]]  # limit, bytes per weight, calls


def fp8_layer(x: Tensor, weight: Tensor, weight_scale: Tensor) -> Tensor:
    """W8A8 in FP8 as users of torch write it: scale per token, round, multiply."""
    scale = x.abs().amax(1, keepdim=True).float() / 448
    rounded = (x / scale).to(torch.float8_e4m3fn)
    return torch._scaled_mm(rounded, weight, scale, weight_scale, out_dtype=torch.bfloat16)


compiled_fp8_layer = torch.compile(fp8_layer, dynamic=True)  # nothing is compiled before the first call


def peers(run: Run, x: Tensor, dense: list[Tensor]) -> dict[str, Peer]:
    """What else there is for the same layer: FP8 weights and inputs, dequantization before a bf16 product, torchao."""
    found: dict[str, Peer] = {}
    rows, channels = dense[0].shape
    if has_fp8(run) and x.shape[0] >= 16:
        one = torch.ones(x.shape[0], 1, device=x.device)
        scale = torch.ones(1, rows, device=x.device)
        ready = x.to(torch.float8_e4m3fn)
        weights = [w.to(torch.float8_e4m3fn).t() for w in dense]

        def product(w: Tensor) -> Tensor:
            return torch._scaled_mm(ready, w, one, scale, out_dtype=torch.bfloat16)

        whole = [lambda w=w: compiled_fp8_layer(x, w, scale) for w in weights]
        found["W8A8 FP8, product alone"] = ("fp8", 1, [lambda w=w: product(w) for w in weights])
        found["W8A8 FP8, torch.compile"] = ("fp8", 1, whole)
    part = part_of("e2m1", None, channels)
    packed, s = random_weight((rows, channels), part, x.device)

    def dequantized() -> Tensor:
        w = reference.dequantize(packed, s, None, "e2m1", channels, 0)
        return nn.functional.linear(x, w.to(x.dtype))

    found["dequantize + torch bf16"] = ("bf16", 0.5, [dequantized])
    if find_spec("torchao") is not None and run.device.type == "cuda":
        found["torchao int4 groups of 128"] = ("bf16", 0.5, [torchao_int4(x, rows, channels)])
    return found


def torchao_int4(x: Tensor, rows: int, channels: int) -> Callable[[], object]:
    """Torchao's weight-only int4."""
    from torchao.quantization import Int4WeightOnlyConfig, quantize_

    layer = nn.Linear(channels, rows, bias=False, device=x.device, dtype=x.dtype)
    quantize_(layer, Int4WeightOnlyConfig(group_size=128))
    return lambda: layer(x)


def convolutions(run: Run) -> None:
    """Convolutions, channels last, quantization of the input included."""
    shapes = {"tiny": (1, 32, 4, 3)} if run.rehearse else CONVOLUTIONS
    for name, (batch, channels, size, kernel) in shapes.items():
        if run.late:
            run.rows.append({"part": "convolutions", "name": name, "skipped": "time"})
            continue
        x = torch.randn(batch, channels, size, size, device=run.device, dtype=torch.bfloat16)
        x = x.contiguous(memory_format=torch.channels_last)
        w = torch.randn(channels, channels, kernel, kernel, device=run.device, dtype=torch.bfloat16)
        w = w.contiguous(memory_format=torch.channels_last)
        pad = (kernel // 2, kernel // 2)
        calls = [lambda x=x, w=w, pad=pad: nn.functional.conv2d(x, w, padding=pad)] * (
            1 if run.rehearse else 8
        )
        bf16 = milliseconds(run, calls)
        ops, activations = 2.0 * x.numel() * channels * kernel**2, 4 * x.numel()
        record(run, "convolutions", name, "torch bf16", "bf16", bf16, bf16, ops, activations + 2 * w.numel())
        for label, (weight, activation) in FORMATS.items():
            part = part_of(weight, activation, channels)
            stored = random_weight(w.shape, part, run.device)
            packed, geometry = packed_weight(*stored, part), Geometry(padding=pad)

            def call(x: Tensor = x, packed: Weight = packed, geometry: Geometry = geometry) -> Tensor:
                return backend.conv2d(x, packed, Inputs(), None, geometry)

            with tiles.tuning():
                call()
            ms = milliseconds(run, [call] * len(calls))
            moved = activations + w.numel() / 2
            record(run, "convolutions", name, label, kind_of(run, part, x), ms, bf16, ops, moved)


def packed_weight(codes: Tensor, scale: Tensor, part: Part) -> Weight:
    """A weight of one piece."""
    return Weight(((PackedWeight(codes, scale, None, part),),))


@torch.library.custom_op("difloat_benchmark::linear", mutates_args=())
def packed_linear(
    x: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None, weight: str, activation: str
) -> Tensor:
    """A quantized linear layer as one operator, opaque to the compiler."""
    part = part_of(weight, activation, x.shape[-1])
    return backend.linear(x, packed_weight(packed, scale, part), Inputs(), bias)


@packed_linear.register_fake
def _(x: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None, weight: str, activation: str) -> Tensor:
    return x.new_empty((*x.shape[:-1], packed.shape[0]))


class PackedLinear(nn.Module):
    """A linear layer with random packed weights."""

    def __init__(self, layer: nn.Linear, formats: tuple[str, str]) -> None:
        super().__init__()
        part = part_of(*formats, layer.in_features)
        packed, scale = random_weight(layer.weight.shape, part, layer.weight.device)
        self.register_buffer("packed", packed)
        self.register_buffer("scale", scale)
        self.bias, self.formats = layer.bias, formats

    def forward(self, x: Tensor) -> Tensor:
        """[..., i] to [..., o]."""
        return packed_linear(x, self.packed, self.scale, self.bias, *self.formats)


def pack_linears(model: nn.Module, formats: tuple[str, str]) -> nn.Module:
    """Swap the linear layers of the transformer blocks, in place."""
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and "blocks" in name and module.in_features % 128 == 0:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, PackedLinear(module, formats))
    return model


def pixart(run: Run) -> tuple[nn.Module, dict[str, Any]]:
    """PixArt-alpha at 512 pixels with guidance: 2 x 1024 tokens, 120 of text."""
    from diffusers import PixArtTransformer2DModel

    small = {
        "num_layers": 1,
        "num_attention_heads": 2,
        "attention_head_dim": 64,
        "cross_attention_dim": 128,
        "sample_size": 8,
        "caption_channels": 128,
    }
    config: dict[str, Any] = {
        "num_layers": 28,
        "sample_size": 64,
        "caption_channels": 4096,
        "norm_type": "ada_norm_single",
        "in_channels": 4,
        "out_channels": 8,
    }
    config |= small if run.rehearse else {}
    with torch.device(run.device):
        model = PixArtTransformer2DModel(**config).to(torch.bfloat16).eval().requires_grad_(False)
    like = {"device": run.device, "dtype": torch.bfloat16}
    inputs = {
        "hidden_states": torch.randn(2, 4, config["sample_size"], config["sample_size"], **like),
        "encoder_hidden_states": torch.randn(2, 120, config["caption_channels"], **like),
        "timestep": torch.full((2,), 500, device=run.device),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
        "return_dict": False,
    }
    return model, inputs


def flux(run: Run) -> tuple[nn.Module, dict[str, Any]]:
    """FLUX at 1024 pixels: 4096 tokens and 512 of text, 12 billion weights."""
    from diffusers import FluxTransformer2DModel

    small = {
        "num_layers": 1,
        "num_single_layers": 1,
        "attention_head_dim": 64,
        "num_attention_heads": 2,
        "joint_attention_dim": 128,
        "axes_dims_rope": (16, 24, 24),
    }
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)  # 48 GB of float32 weights are not needed on the way
    with torch.device(run.device):
        model = FluxTransformer2DModel(**(small if run.rehearse else {})).eval().requires_grad_(False)
    torch.set_default_dtype(default)
    tokens, text = (16, 8) if run.rehearse else (4096, 512)
    like = {"device": run.device, "dtype": torch.bfloat16}
    inputs = {
        "hidden_states": torch.randn(1, tokens, model.config.in_channels, **like),
        "encoder_hidden_states": torch.randn(1, text, model.config.joint_attention_dim, **like),
        "pooled_projections": torch.randn(1, model.config.pooled_projection_dim, **like),
        "timestep": torch.full((1,), 0.5, **like),
        "img_ids": torch.zeros(tokens, 3, **like),
        "txt_ids": torch.zeros(text, 3, **like),
        "return_dict": False,
    }
    return model, inputs


def compile_blocks(model: nn.Module) -> None:
    """Compile block by block, which takes seconds where a whole model takes minutes."""
    for name, child in model.named_children():
        if name.endswith("blocks") and isinstance(child, nn.ModuleList):
            for block in child:
                block.compile(fullgraph=True)


def models(run: Run) -> None:
    """Whole transformers as CUDA graphs, eager and with compiled blocks; ratios are to compiled bf16."""
    if find_spec("diffusers") is None:
        run.rows.append({"part": "models", "skipped": "diffusers is not installed"})
        return
    for name, build in {"PixArt-alpha": pixart, "FLUX": flux}.items():
        bf16 = None
        for label, formats in (("bf16", None), *list(FORMATS.items())[:3]):
            if run.late:
                run.rows.append({"part": "models", "name": name, "method": label, "skipped": "time"})
                continue
            model, inputs = build(run)
            model = model if formats is None else pack_linears(model, formats)
            with torch.no_grad(), nullcontext() if run.rehearse else tiles.tuning():
                out = model(**inputs)[0]
            if not out.isfinite().all():
                raise RuntimeError(f"output of {name} {label} must be finite, got NaN or Inf")
            for way in ("eager",) if run.rehearse else ("eager", "torch.compile"):
                if way == "torch.compile":
                    compile_blocks(model)
                with torch.no_grad():
                    ms = milliseconds(run, [lambda m=model, i=inputs: m(**i)])
                bf16 = ms if formats is None else bf16 or ms
                row = {"part": "models", "name": name, "method": f"{label}, {way}", "ms": ms}
                run.rows.append({**row, "vs_bf16": bf16 / ms})
                sys.stdout.write(f"{name:34} {label + ', ' + way:34} {ms:9.3f} ms {bf16 / ms:6.2f}x bf16\n")
            del model, inputs, out
            if run.device.type == "cuda":
                torch.cuda.empty_cache()


def goals(run: Run) -> dict[str, float]:
    """The figures that the project set itself, lowest and median over the shapes; see docs/gpu.md."""
    found = {}
    rows = [row for row in run.rows if row.get("part") == "linears" and "ms" in row]
    for method in FORMATS:
        for label, low, high in (("1024 tokens and more", 1024, 1 << 30), ("16 tokens and fewer", 1, 16)):
            mine = [r for r in rows if r["method"] == method and low <= tokens_of(r["name"]) <= high]
            for key in ("vs_bf16", "of_limit"):
                if values := [r[key] for r in mine]:
                    found[f"{method}, {label}, {key}, lowest"] = min(values)
                    found[f"{method}, {label}, {key}, median"] = statistics.median(values)
    for row in run.rows:
        if row.get("part") == "models" and "vs_bf16" in row:
            found[f"{row['name']}, {row['method']}, vs_bf16"] = row["vs_bf16"]
    return found


def tokens_of(name: str) -> int:
    """The number of tokens in the name of a row."""
    return int(name.split(", ")[1].split()[0])


PARTS = {"linears": linears, "convolutions": convolutions, "models": models}


def machine(run: Run) -> dict[str, Any]:
    """Where this was measured."""
    import triton

    name = torch.cuda.get_device_name(run.device) if run.device.type == "cuda" else "interpreter"
    return {
        "device": name,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": torch.version.cuda,
    }


def write(run: Run, seconds: float, path: Path | None) -> Path:
    """Store everything as JSON."""
    where = machine(run)
    data = {
        "machine": where,
        "seconds": seconds,
        "limits": run.limits,
        "goals": goals(run),
        "rows": run.rows,
    }
    label = "".join(c if c.isalnum() else "-" for c in where["device"].lower())
    path = path or harness.RESULTS / f"gpu-{label}.json"
    harness.write(path, data)
    return path


def main() -> None:
    """Check, measure, write."""
    parser = harness.parser(__doc__)
    parser.add_argument("--only", nargs="+", choices=("checks", *PARTS), help="these parts alone")
    parser.add_argument("--minutes", type=float, default=7.5, help="what is not begun by then is left out")
    parser.add_argument("--rehearse", action="store_true", help="tiny shapes in Triton's interpreter")
    parser.add_argument("--out", type=Path, help="another file for the result")
    options = harness.arguments(parser)
    if not options.rehearse and not torch.cuda.is_available():
        parser.error("a CUDA device must be there, got none; --rehearse runs tiny shapes in the interpreter")
    start = time.monotonic()
    device = torch.device("cpu" if options.rehearse else "cuda")
    run = Run(device, start + 60 * options.minutes, options.rehearse, {}, [])
    run.limits.update(measure_limits(run))
    for name, value in run.limits.items():
        sys.stdout.write(f"{name:20} {value:.3e}\n")
    check(run)
    sys.stdout.write(f"{len(run.rows)} checks passed after {time.monotonic() - start:.0f} s\n")
    for name, measure in PARTS.items():
        if options.only is None or name in options.only:
            measure(run)
    for name, value in goals(run).items():
        sys.stdout.write(f"{name:70} {value:.2f}\n")
    path = write(run, time.monotonic() - start, options.out)
    sys.stdout.write(f"{path} after {time.monotonic() - start:.0f} s\n")


if __name__ == "__main__":
    main()
