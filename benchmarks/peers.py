"""Low-bit linear layers of other libraries against difloat and torch on a CPU, on the shapes of PixArt and FLUX.

Everything of one shape runs in one process, interleaved as in `kernels.py`; medians count. Every library gets its own way of
taking inputs: OpenVINO and ONNX Runtime float32 arrays, the others bfloat16 tensors; quantization of activations is inside
the measured call wherever a library quantizes them at run time. A library that is not installed is listed as such, never
skipped in silence; so is one that fails.

Needs ``pip install difloat[bench]``. Writes ``benchmarks/results/peers.json``.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import harness
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from difloat.kernels import operators

SHAPES = [  # tokens, in, out
    (120, 1152, 1152),
    (120, 1152, 4608),
    (120, 4608, 1152),
    (256, 1152, 4608),
    (512, 3072, 3072),
    (512, 3072, 12288),
    (512, 12288, 3072),
    (1024, 1152, 1152),
    (1024, 1152, 4608),
    (1024, 4608, 1152),
]
GROUP = 128
Call = Callable[[], object]


def _benchmark_of_kernels() -> Any:
    """`kernels.py` beside this file, under another name: other libraries look for a package called kernels."""
    spec = importlib.util.spec_from_file_location("linear_layers", Path(__file__).with_name("kernels.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


OWN = _benchmark_of_kernels()


def difloat_layer(weight: str, activation: str, group: int | None = None) -> Callable[[Tensor, Tensor], Call]:
    """Our own layer, as a model runs it."""

    def build(x: Tensor, values: Tensor) -> Call:
        arguments = OWN.layer(tuple(values.shape), weight, activation, group)
        return lambda: operators.linear(x, *arguments)

    return build


def torch_layer(dtype: torch.dtype) -> Callable[[Tensor, Tensor], Call]:
    """A layer of torch in one dtype."""

    def build(x: Tensor, values: Tensor) -> Call:
        left, right = x.to(dtype), values.to(dtype)
        return lambda: functional.linear(left, right)

    return build


def _module(values: Tensor) -> nn.Sequential:
    """A float layer with these weights, for libraries that convert modules."""
    layer = nn.Linear(values.shape[1], values.shape[0], bias=False, dtype=torch.bfloat16)
    layer.weight = nn.Parameter(values.bfloat16(), requires_grad=False)
    return nn.Sequential(layer)


def bitsandbytes_nf4(x: Tensor, values: Tensor) -> Call:
    """NF4 weights in blocks of 64."""
    from bitsandbytes.nn import Linear4bit

    layer = Linear4bit(
        values.shape[1], values.shape[0], bias=False, compute_dtype=torch.bfloat16, quant_type="nf4"
    )
    layer.load_state_dict({"weight": values.bfloat16()})
    layer = layer.requires_grad_(False).to("cpu")
    return lambda: layer(x)


def quanto(bits: int) -> Callable[[Tensor, Tensor], Call]:
    """Weights of optimum-quanto; activations stay as they are."""

    def build(x: Tensor, values: Tensor) -> Call:
        from optimum import quanto as library

        module = _module(values)
        library.quantize(module, weights={4: library.qint4, 8: library.qint8}[bits])
        library.freeze(module)
        module.requires_grad_(False)
        return lambda: module(x)

    return build


def torchao_w8a8(x: Tensor, values: Tensor) -> Call:
    """INT8 weights and activations, found online."""
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    module = _module(values)
    quantize_(module, Int8DynamicActivationInt8WeightConfig())
    return lambda: module(x)


def sdnq(weights: str) -> Callable[[Tensor, Tensor], Call]:
    """SDNQ with its quantized product."""

    def build(x: Tensor, values: Tensor) -> Call:
        from sdnq import SDNQConfig, sdnq_quantize_layer

        config = SDNQConfig(weights_dtype=weights, use_quantized_matmul=True)
        layer, _ = sdnq_quantize_layer(_module(values)[0], config)
        return lambda: layer(x)

    return build


def _grouped(values: Tensor) -> tuple[Any, Any]:
    """Codes 0 to 15 (8 is zero) [o, groups, size], and float32 scales [o, groups, 1]."""
    groups = values.reshape(values.shape[0], -1, GROUP)
    scale = groups.abs().amax(2, keepdim=True) / 7
    codes = (groups / scale).round().clamp(-8, 7).add(8).to(torch.uint8)
    return codes.numpy(), scale.numpy()


def _nibbles(codes: Any) -> Any:
    return (codes[..., 0::2] | codes[..., 1::2] << 4).astype(np.uint8)


def openvino(kind: str) -> Callable[[Tensor, Tensor], Call]:
    """OpenVINO: "int4" weights in groups with activations quantized online, or "int8" weights and static activations."""

    def build(x: Tensor, values: Tensor) -> Call:
        import openvino as ov
        from openvino import opset13 as op

        parameter = op.parameter([-1, values.shape[1]], np.float32)
        left = parameter
        settings: dict[str, Any] = {"INFERENCE_NUM_THREADS": torch.get_num_threads()}
        settings |= {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"}
        if kind == "int4":
            codes, scale = _grouped(values)
            packed = ov.Tensor(_nibbles(codes).reshape(-1), ov.Shape(list(codes.shape)), ov.Type.u4)
            zero = ov.Tensor(np.full(1, 0x88, np.uint8), ov.Shape([1, 1, 1]), ov.Type.u4)
            numbers = [op.convert(op.constant(tensor), np.float32) for tensor in (packed, zero)]
            weight = op.multiply(op.subtract(*numbers), op.constant(scale))
            weight = op.reshape(weight, op.constant(list(values.shape)), False)
            settings["DYNAMIC_QUANTIZATION_GROUP_SIZE"] = str(GROUP)
        else:
            step = (values.abs().amax(1, keepdim=True) / 127).numpy()
            codes = np.clip(np.round(values.numpy() / step), -127, 127).astype(np.int8)
            weight = op.multiply(op.convert(op.constant(codes), np.float32), op.constant(step))
            reach = float(x.abs().max())
            ends = [op.constant(np.float32(end)) for end in (-reach, reach * 127 / 128)] * 2
            left = op.fake_quantize(parameter, *ends, 256)
        model = ov.Model([op.matmul(left, weight, False, True)], [parameter])
        request = ov.Core().compile_model(model, "CPU", settings).create_infer_request()
        wide = x.float().numpy()
        return lambda: request.infer([wide], share_inputs=True, share_outputs=True)

    return build


def onnxruntime(kind: str) -> Callable[[Tensor, Tensor], Call]:
    """ONNX Runtime: MatMulNBits with int8 arithmetic ("int4"), or DynamicQuantizeMatMul ("int8")."""

    def build(x: Tensor, values: Tensor) -> Call:
        import onnxruntime as library
        from onnx import TensorProto, helper, numpy_helper

        out, channels = values.shape
        if kind == "int4":
            codes, scale = _grouped(values)
            tensors = {"b": _nibbles(codes), "scale": scale.reshape(-1)}
            options = {"K": channels, "N": out, "bits": 4, "block_size": GROUP, "accuracy_level": 4}
            node = helper.make_node("MatMulNBits", ["a", *tensors], ["y"], domain="com.microsoft", **options)
        else:
            step = float(values.abs().max()) / 127
            codes = (values.t() / step).round().to(torch.int8).contiguous().numpy()
            tensors = {"b": codes, "scale": np.float32(step), "zero": np.int8(0)}
            node = helper.make_node("DynamicQuantizeMatMul", ["a", *tensors], ["y"], domain="com.microsoft")
        graph = helper.make_graph(
            [node],
            "linear",
            [helper.make_tensor_value_info("a", TensorProto.FLOAT, [None, channels])],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, [None, out])],
            [numpy_helper.from_array(np.asarray(array), name) for name, array in tensors.items()],
        )
        opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=9)
        options = library.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        session = library.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        wide = {"a": x.float().numpy()}
        return lambda: session.run(None, wide)[0]

    return build


CONTESTANTS: dict[str, Callable[[Tensor, Tensor], Call]] = {
    "torch bf16": torch_layer(torch.bfloat16),
    "difloat w4a4": difloat_layer("e2m1", "e2m1"),
    "difloat w4a8": difloat_layer("e2m1", "int8"),
    "difloat w4a8 groups of 128": difloat_layer("e2m1", "int8", GROUP),
    "openvino int4 groups of 128, dynamic int8": openvino("int4"),
    "openvino w8a8 static": openvino("int8"),
    "onnxruntime MatMulNBits 4 bits": onnxruntime("int4"),
    "onnxruntime dynamic int8": onnxruntime("int8"),
    "bitsandbytes nf4": bitsandbytes_nf4,
    "optimum-quanto qint4": quanto(4),
    "optimum-quanto qint8": quanto(8),
    "torchao w8a8 dynamic": torchao_w8a8,
    "sdnq int8": sdnq("int8"),
    "sdnq uint4": sdnq("uint4"),
}
PACKAGES = ("torch", "openvino", "onnxruntime", "bitsandbytes", "optimum-quanto", "torchao", "sdnq")


def _first(result: object) -> Tensor:
    """The output as a tensor, whatever a library returns."""
    if isinstance(result, Tensor):
        return result.float()
    return torch.from_numpy(np.asarray(result if isinstance(result, np.ndarray) else result[0])).float()  # type: ignore[index]


def race(shape: tuple[int, int, int], options: argparse.Namespace) -> dict[str, Any]:
    """Times of one shape, errors of the outputs, and why who is missing."""
    tokens, channels, out = shape
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(out, channels, generator=generator) * 0.02
    x = torch.randn(tokens, channels, generator=generator).bfloat16()
    exact = x.float() @ values.t()
    calls: dict[str, Call] = {}
    missing, errors = {}, {}
    for name, build in CONTESTANTS.items():
        try:
            calls[name] = build(x, values)
            result = _first(calls[name]())
        except Exception as failure:  # one library's failure is a result, and the others still run
            calls.pop(name, None)
            missing[name] = f"{type(failure).__name__}: {failure}".splitlines()[0][:200]
        else:
            errors[name] = float((result - exact).norm() / exact.norm())
    times = OWN.interleaved(calls, options.repeats, options.pause_s)
    row: dict[str, Any] = OWN.entry("linear", shape, 2.0 * tokens * channels * out, times)
    for name, found in row["times"].items():
        if not name.startswith("difloat"):  # ours have weights of their own
            found["error"] = errors[name]
        sys.stdout.write(
            f"{shape} {name}: {found['median_ms']:.3f} ms, {found['speed_vs_bf16']:.2f}x torch bf16\n"
        )
    for name, reason in missing.items():
        sys.stdout.write(f"{shape} {name}: {reason}\n")
    return {**row, "missing": missing}


def table(result: dict[str, Any]) -> str:
    """Speed over torch's bfloat16, as Markdown; the last column is their geometric mean."""
    rows = result["rows"]
    lines = [
        "| speed over torch bf16 | " + " | ".join("x".join(map(str, r["shape"])) for r in rows) + " | mean |"
    ]
    lines.append("|" + "---|" * (len(rows) + 2))
    for name in CONTESTANTS:
        speeds = [r["times"].get(name, {}).get("speed_vs_bf16") for r in rows]
        known = [speed for speed in speeds if speed is not None]
        mean = f"{statistics.geometric_mean(known):.2f}" if known else ""
        cells = ["-" if speed is None else f"{speed:.2f}" for speed in speeds]
        lines.append(f"| {name} | " + " | ".join(cells) + f" | {mean} |")
    libraries = ", ".join(f"{name} {number}" for name, number in result["versions"].items())
    lines.append(
        f"\n{libraries}. Commit {result['commit']}, {result['machine']['cpu']}, `{result['command']}`."
    )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run, print and write."""
    warnings.simplefilter("ignore")  # of the other libraries
    parser = harness.parser(__doc__, threads=2, repeats=11, out=harness.RESULTS / "peers.json")
    parser.add_argument("--pause-s", type=float, default=0.012, help="before every call")
    parser.add_argument("--quick", action="store_true", help="one shape, no results written")
    parser.add_argument(
        "--table", action="store_true", help="print the table of the last run, measure nothing"
    )
    options = harness.arguments(parser)
    if options.table:
        sys.stdout.write(table(json.loads(options.out.read_text())))
        return
    with torch.no_grad():
        rows = [race(shape, options) for shape in (SHAPES[1:2] if options.quick else SHAPES)]
    result = {**harness.facts(), "versions": harness.versions(PACKAGES), "rows": rows}
    sys.stdout.write(table(result))
    if not options.quick:
        harness.write(options.out, result)


if __name__ == "__main__":
    main()
