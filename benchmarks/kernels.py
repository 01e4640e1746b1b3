r"""Speed of quantized linear layers, convolutions and attention on a CPU, against torch.

Everything of one shape runs in one process, interleaved: every repetition calls each contestant once, in rotated order, after a
pause in which other libraries' threads stop spinning and one call that is not timed. Medians count. For comparison the same run
measures a plain int8 product of torch, and what a core can multiply at most in registers (`limits.py`).

Numbers without ``--quick`` go into ``benchmarks/results/kernels.json``; ``--dispatch`` also writes the table by which backends
are chosen, from those of W4A8. ``--table`` names the layers that run slower than bfloat16 by that table.

Other units than the machine's best, each in a process of its own with torch held to the same instructions::

    python benchmarks/kernels.py --isa avx2 avxvnni --only linear conv2d

writes ``benchmarks/results/kernels-avx2.json`` and so on, and prints how fast every kind of layer is against torch's fastest
float, with the layers that break the rule: 0.95 of it from 64 tokens on, 0.8 for one token.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import harness
import torch
from limits import measured
from torch import Tensor
from torch.nn import functional

from difloat.kernels import attention, dispatch, integer_operands, operators
from difloat.kernels.geometry import Geometry
from difloat.numbers.formats import parse
from difloat.plan.encode import plan_layer
from difloat.plan.specs import AttentionPlan, Granularity, Part, QuantSpec
from difloat.plan.weight import Inputs, PackedWeight, Weight

LINEAR = [  # in, out: PixArt's and FLUX's
    (1152, 1152),
    (1152, 4608),
    (4608, 1152),
    (3072, 3072),
    (3072, 12288),
    (12288, 3072),
]
TOKENS = [1, 120, 256, 1024, 4096]
FLUX_TOKENS = [1, 512]
CONV = [  # batch, in, out, side, kernel: Stable Diffusion's U-Net at 512 pixels
    (2, 320, 320, 64, 3),
    (2, 640, 640, 32, 3),
    (2, 1280, 1280, 16, 3),
    (2, 320, 320, 64, 1),
    (2, 640, 640, 32, 1),
]
ATTENTION = [(2, 16, 1024, 1024, 72), (2, 16, 1024, 120, 72), (2, 8, 4096, 4096, 40), (2, 8, 1024, 1024, 80)]
FLOAT_ATTENTION = [
    (1, 8, 1024, 1024, 64),
    (1, 8, 1024, 1024, 72),
    (1, 1, 4096, 4096, 64),
    (1, 1, 4096, 4096, 72),
]
CAPS = {  # what holds torch to the instructions of a unit
    "avx2": {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"},
    "avxvnni": {
        "ATEN_CPU_CAPABILITY": "avx2",
        "ONEDNN_MAX_CPU_ISA": "AVX2_VNNI",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    },
    "avx512vl": {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_VNNI"},
    "avx512": {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16"},
    "amx": {},
    "neon": {},
}
ONE_TOKEN, TOKENS_OF_RULE = 0.8, {"from": 64, "speed": 0.95}
Contestants = dict[str, Callable[[], object]]


def interleaved(contestants: Contestants, options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Median and minimum of every contestant, in milliseconds."""
    clock = time.process_time if options.cpu_time else time.perf_counter
    times = harness.interleaved(
        contestants, options.repeats, pause_s=options.pause_s, prelude=True, clock=clock
    )
    found = harness.medians(times)
    return {name: {"median_ms": 1000 * found[name], "min_ms": 1000 * min(times[name])} for name in times}


def layer(
    shape: tuple[int, ...], weight: str, activation: str, group: int | None = None, inputs: int | None = None
) -> list[Any]:
    """The arguments of an operator after its input: random weights on a grid.

    With `inputs` so many channels of a token share a scale and a zero point, else all share a scale.
    """
    granularity: Granularity = "group" if group else "channel"
    spec = QuantSpec(parse(weight), granularity, group)
    token = QuantSpec(parse(activation), "token", online=True)
    ranged = QuantSpec(parse(activation), "group", inputs, online=True, zero_point=True) if inputs else token
    part = Part(shape[1], spec, ranged)
    values = torch.randn(shape) * 0.02
    scale = torch.full((spec.scale_count(*shape[:2]),), 0.06 / spec.format.max)
    stored = plan_layer(values, [part], [scale]).tensors
    piece = PackedWeight(stored["weight"], stored["weight_scale"], None, part)
    return [Weight(((piece,),)), [Inputs()], None]


def on(backend: str, call: Callable[[], object]) -> Callable[[], object]:
    """The call, on one backend."""

    def run() -> object:
        with dispatch.use_backend(backend):
            return call()

    return run


def ours(
    operator: Callable[..., Tensor], x: Tensor, settings: dict[str, list[Any]], *geometry: Any
) -> Contestants:
    """The operator with every setting on every fast backend that supports it."""
    found: Contestants = {}
    for label, arguments in settings.items():
        part, shape = arguments[0].part, arguments[0].bands[0].shape
        for name in dispatch.available():
            exact = integer_operands.reason_against(part) is None
            if name in ("reference", "decoded" if exact else ""):
                continue
            if dispatch.BACKENDS[name].supports(part, shape, x):
                call = lambda a=arguments: operator(x, *a, *geometry)  # noqa: E731
                found[f"difloat {name} {label}"] = on(name, call)
    return found


def linear(rows: int, channels: int, out: int) -> Contestants:
    """Contestants of one linear shape; inputs in bfloat16."""
    shape, x = (out, channels), torch.randn(rows, channels, dtype=torch.bfloat16)
    weight = torch.randn(shape) * 0.02
    half = weight.bfloat16()
    settings = {
        "w4a4": layer(shape, "e2m1", "e2m1"),
        "w4a6": layer(shape, "e2m1", "e2m3"),
        "w4a8": layer(shape, "e2m1", "int8"),
        "w6a8": layer(shape, "e2m3", "int8"),
        "w8a8": layer(shape, "int8", "int8"),
        "w3a8": layer(shape, "int3", "int8"),
        "w4 e3m4": layer(shape, "e2m1", "e3m4"),
        "w8 e4m3": layer(shape, "e4m3", "e4m3"),
        **{
            f"w4a8 groups of {g}": layer(shape, "e2m1", "int8", g) for g in (128, 64, 32) if channels % g == 0
        },
        "w4a4 inputs in groups of 32": layer(shape, "t4g", "uint4", inputs=32),
    }
    wide = x.float()
    found: Contestants = {
        "torch bf16": lambda: functional.linear(x, half),
        "torch fp32": lambda: functional.linear(wide, weight),
        "difloat reference w4a8": on("reference", lambda: operators.linear(x, *settings["w4a8"])),
    }
    return found | ours(operators.linear, x, settings)


def conv(batch: int, channels: int, out: int, side: int, kernel: int) -> Contestants:
    """Contestants of one convolution; inputs in bfloat16, channels last."""
    shape = (out, channels, kernel, kernel)
    x = torch.randn(batch, channels, side, side).bfloat16().to(memory_format=torch.channels_last)
    weight = (torch.randn(shape) * 0.02).to(memory_format=torch.channels_last)
    half, padding = weight.bfloat16(), kernel // 2
    settings = {
        "w4a4": layer(shape, "e2m1", "e2m1"),
        "w4a8": layer(shape, "e2m1", "int8"),
        "w4a4 inputs in groups of 32": layer(shape, "t4g", "uint4", inputs=32),
    }
    geometry = Geometry(padding=(padding, padding))
    wide = x.float()
    return {
        "torch bf16": lambda: functional.conv2d(x, half, None, 1, padding),
        "torch fp32": lambda: functional.conv2d(wide, weight, None, 1, padding),
        "difloat reference w4a8": on("reference", lambda: operators.conv2d(x, *settings["w4a8"], geometry)),
        **ours(operators.conv2d, x, settings, geometry),
    }


def attend(
    batch: int, heads: int, queries: int, keys: int, width: int, dtype: torch.dtype = torch.bfloat16
) -> Contestants:
    """Contestants of one attention shape, in bfloat16 or float32."""
    q, k, v = (torch.randn(batch, n, heads, width).to(dtype).transpose(1, 2) for n in (queries, keys, keys))
    rival = "torch bf16" if dtype == torch.bfloat16 else "torch fp32"
    found: Contestants = {rival: lambda: functional.scaled_dot_product_attention(q, k, v)}
    for name in ("torch", "cpu") if dtype == torch.bfloat16 else ("cpu",):
        if name in dispatch.available():
            found[f"difloat {name}"] = on(name, lambda: attention.attend(q, k, v, None, width**-0.5))
    for operand, softmax in (("int8", ""), ("int8", "uint8"), ("e2m3", "ue4m4"), ("e3m4", "")):
        plan = AttentionPlan(parse(operand), parse(softmax) if softmax else None)
        if attention.carries_out(plan, q, k, v, None):
            call = lambda o=operand, s=softmax: attention.attend_on_grids(q, k, v, None, width**-0.5, o, s)  # noqa: E731
            found[f"difloat cpu q, k, v {operand}" + f", map {softmax}" * bool(softmax)] = call
    return found


def peak() -> Contestants:
    """A plain int8 product: what torch reaches of the machine's peak."""
    a = torch.randint(-100, 100, (768, 2048), dtype=torch.int8)
    b = torch.randint(-100, 100, (768, 2048), dtype=torch.int8)
    return {"torch int8 product": lambda: torch._int_mm(a, b.t())}


def entry(kind: str, shape: tuple[int, ...], operations: float, times: dict[str, Any]) -> dict[str, Any]:
    """One row of the results: times, operations per second, speed over torch bf16, or over the first where that is absent."""
    base = times.get("torch bf16", next(iter(times.values())))["median_ms"]
    for found in times.values():
        found["gops"] = operations / found["median_ms"] / 1e6
        found["speed_vs_bf16"] = base / found["median_ms"]
    return {"kind": kind, "shape": list(shape), "times": times}


def run(options: argparse.Namespace) -> list[dict[str, Any]]:
    """All shapes that were asked for."""
    rows = []

    def race(kind: str, shape: tuple[int, ...], operations: float, contestants: Contestants) -> None:
        row = entry(kind, shape, operations, interleaved(contestants, options))
        rows.append(row)
        text = "  ".join(
            f"{n} {t['median_ms']:.3f} ms ({t['speed_vs_bf16']:.2f}x)" for n, t in row["times"].items()
        )
        sys.stdout.write(f"{kind} {shape}: {text}\n")

    race("peak", (768, 2048, 768), 2.0 * 768 * 2048 * 768, peak())
    if "linear" in options.only:
        for channels, out in LINEAR[:2] if options.quick or options.few else LINEAR:
            counts = TOKENS if max(channels, out) <= 4608 else FLUX_TOKENS
            for tokens in (1, 120) if options.quick else (1, 120, 256) if options.few else counts:
                contestants = linear(tokens, channels, out)
                race("linear", (tokens, channels, out), 2.0 * tokens * channels * out, contestants)
    if "conv2d" in options.only:
        for shape in CONV[-1:] if options.quick else CONV[1::3] if options.few else CONV:
            batch, channels, out, side, kernel = shape
            operations = 2.0 * batch * channels * out * side**2 * kernel**2
            race("conv2d", shape, operations, conv(*shape))
    if "attention" in options.only:
        for shape in ATTENTION[1:2] if options.quick or options.few else ATTENTION:
            race("attention", shape, 4.0 * math.prod(shape), attend(*shape))
        for shape in FLOAT_ATTENTION[:1] if options.quick else FLOAT_ATTENTION:
            race("attention in float32", shape, 4.0 * math.prod(shape), attend(*shape, torch.float32))
    return rows


def dispatch_table(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Backends from fastest to slowest, by kind and number of tokens: geometric means over the shapes measured."""
    table: dict[str, Any] = {}
    for kind in ("linear", "conv2d"):
        by_rows: dict[int, dict[str, list[float]]] = {}
        for row in (row for row in rows if row["kind"] == kind):
            count = row["shape"][0] if kind == "linear" else row["shape"][0] * row["shape"][3] ** 2
            speeds = by_rows.setdefault(count, {})
            for name, found in row["times"].items():
                if name.endswith(" w4a8"):
                    speeds.setdefault(name.split()[1], []).append(found["speed_vs_bf16"])
        entries: list[dict[str, Any]] = []
        for count in sorted(by_rows):
            means = {name: statistics.geometric_mean(v) for name, v in by_rows[count].items()}
            order = sorted(means, key=lambda name: -means[name])
            order = [*(name for name in order if name != "reference"), "decoded", "reference"]
            if entries and entries[-1]["order"] == order:
                entries.pop()
            elif entries:
                entries[-1]["rows_below"] = count
            entries.append({"rows_below": None, "order": order})
        table[kind] = entries
    return table


def slower(rows: list[dict[str, Any]]) -> list[str]:
    """Layers and shapes that run slower than torch's bfloat16 although the fastest way measured is taken."""
    found = []
    for row in (row for row in rows if row["kind"] in ("linear", "conv2d")):
        best: dict[str, float] = {}
        for name, found_time in row["times"].items():
            if name.startswith("difloat ") and name.split()[1] != "reference":
                label = name.split(maxsplit=2)[2]
                best[label] = max(best.get(label, 0.0), found_time["speed_vs_bf16"])
        shape = "x".join(map(str, row["shape"]))
        found += [
            f"{row['kind']} {shape} {label}: {speed:.2f}x" for label, speed in best.items() if speed < 1
        ]
    return found


def speeds_over_float(rows: list[dict[str, Any]]) -> dict[str, list[tuple[int, str, float]]]:
    """By kind of layer: tokens, shape and speed of the fastest backend over torch's fastest float of every row."""
    found: dict[str, list[tuple[int, str, float]]] = {}
    for row in (row for row in rows if row["kind"] != "peak"):
        times = {name: time["median_ms"] for name, time in row["times"].items()}
        rival = min(times[name] for name in ("torch bf16", "torch fp32") if name in times)
        best: dict[str, float] = {}
        for name, time_ms in times.items():
            if name.startswith("difloat ") and name.split()[1] != "reference":
                label = " ".join(name.split(maxsplit=2)[2:])  # attention as it is has none
                best[label] = min(best.get(label, time_ms), time_ms)
        shape = row["shape"]
        tokens = shape[0] if row["kind"] == "linear" else shape[0] * shape[3] ** 2  # or queries of attention
        if row["kind"].startswith("attention"):
            tokens = shape[2]
        text = "x".join(map(str, shape))
        for label, time_ms in best.items():
            found.setdefault(f"{row['kind']} {label}".strip(), []).append((tokens, text, rival / time_ms))
    return found


def rule(rows: list[dict[str, Any]]) -> str:
    """Median and range of every kind of layer against torch's fastest float, and what is slower than it may be."""
    lines = ["| over torch's fastest float | one token | from 64 tokens | range |", "|---|---|---|---|"]
    broken = []
    for name, speeds in speeds_over_float(rows).items():
        one = [speed for tokens, _, speed in speeds if tokens == 1]
        many = [speed for tokens, _, speed in speeds if tokens >= TOKENS_OF_RULE["from"]]
        cells = [name, f"{statistics.median(one):.2f}" if one else ""]
        cells += (
            [f"{statistics.median(many):.2f}", f"{min(many):.2f} to {max(many):.2f}"] if many else ["", ""]
        )
        lines.append("| " + " | ".join(cells) + " |")
        for tokens, shape, speed in speeds:
            if speed < (
                ONE_TOKEN
                if tokens == 1
                else TOKENS_OF_RULE["speed"]
                if tokens >= TOKENS_OF_RULE["from"]
                else 0
            ):
                broken.append(f"{name} {shape}: {speed:.2f}x")
    lines.append("\nSlower than the rule: " + ("; ".join(broken) or "nothing") + ".")
    return "\n".join(lines) + "\n"


def run_unit(unit: str, options: argparse.Namespace) -> None:
    """The same run in a process whose native library and torch are held to a unit, and its table."""
    out = options.out.with_name(f"{options.out.stem}-{unit}.json")
    command = [sys.executable, __file__, "--threads", str(options.threads), "--repeats", str(options.repeats)]
    command += ["--only", *options.only, "--pause-s", str(options.pause_s), "--out", str(out)]
    environment = {**os.environ, "DIFLOAT_CPU_ISA": unit, **CAPS[unit]}
    command += ["--few"] * options.few + ["--cpu-time"] * options.cpu_time
    subprocess.run(command, env=environment, check=True)
    sys.stdout.write(f"\nunit {unit}\n\n{rule(json.loads(out.read_text())['rows'])}")


def tables(result: dict[str, Any]) -> str:
    """The results as Markdown: one table per kind, speed over torch's bfloat16."""
    lines = []
    for kind in ("linear", "conv2d", "attention", "attention in float32"):
        rows = [row for row in result["rows"] if row["kind"] == kind]
        if not rows:
            continue
        rival, *names = rows[0]["times"]  # the first contestant is the one that speeds are over
        heads = [kind, f"{rival} ms", *(name.removeprefix("difloat ") for name in names)]
        lines += ["", "| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
        for row in rows:
            cells = ["x".join(map(str, row["shape"])), f"{row['times'][rival]['median_ms']:.3g}"]
            found = (row["times"].get(name) for name in names)
            cells += ["" if time is None else f"{time['speed_vs_bf16']:.2f}" for time in found]
            lines.append("| " + " | ".join(cells) + " |")
    lines.append("\nSlower than torch's bfloat16: " + ("; ".join(slower(result["rows"])) or "nothing") + ".")
    lines.append(f"\nCommit {result['commit']}, {result['machine']['cpu']}, `{result['command']}`.")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run, print and write."""
    parser = harness.parser(__doc__, threads=2, repeats=11, out=harness.RESULTS / "kernels.json")
    parser.add_argument("--pause-s", type=float, default=0.012, help="before every call")
    parser.add_argument("--only", nargs="+", default=["linear", "conv2d", "attention"], help="kinds")
    parser.add_argument("--quick", action="store_true", help="a few shapes, no results written")
    parser.add_argument("--dispatch", action="store_true", help="write the table that chooses backends")
    parser.add_argument(
        "--table", action="store_true", help="print the tables of the last run, measure nothing"
    )
    parser.add_argument("--few", action="store_true", help="a few shapes")
    parser.add_argument(
        "--cpu-time",
        action="store_true",
        help="seconds that the process computed, on a core that others use, too; with one thread",
    )
    parser.add_argument(
        "--isa", nargs="+", choices=CAPS, default=[], help="units, each in a process of its own"
    )
    options = harness.arguments(parser)
    for unit in options.isa:
        run_unit(unit, options)
    if options.isa:
        return
    if options.table:
        sys.stdout.write(tables(json.loads(options.out.read_text())))
        return
    limits = {} if options.quick else measured()
    with torch.no_grad():
        rows = run(options)
    where = f"{harness.machine()['cpu']}, {options.threads} threads"
    if options.dispatch:
        table = {"measured_on": where, **dispatch_table(rows)}
        path = harness.ROOT / "src/difloat/kernels/dispatch.json"
        path.write_text(json.dumps(table, indent=2) + "\n")
    if not options.quick:
        harness.write(options.out, {"rows": rows, "limits_gops_of_a_core": limits})


if __name__ == "__main__":
    main()
