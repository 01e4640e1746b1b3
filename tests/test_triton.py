"""Triton kernels: exact operands, exact rounding, products as near to float64 as half precision allows.

Without a GPU the kernels run in Triton's interpreter on small shapes; `pytest -m gpu` runs the same contract on a device.
"""

from __future__ import annotations

import math
import operator
import os
import struct
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="the GPU backend needs Triton, which this platform has no wheel of")

from difloat.kernels import reference
from difloat.kernels.dispatch import use_backend
from difloat.kernels.geometry import Geometry
from difloat.kernels.triton import backend
from difloat.kernels.triton import operands as triton_operands
from difloat.kernels.triton import tiles as triton_tiles
from difloat.layers import install
from difloat.numbers.formats import candidates, parse
from difloat.numbers.packing import pack
from difloat.plan.encode import dequantize, plan_layer
from difloat.plan.plan import LayerPlan
from difloat.plan.scales import row_places
from difloat.plan.specs import Part, QuantSpec, Side
from difloat.plan.weight import Branch, Inputs, PackedWeight, Weight

ALL = [f for bits in range(2, 9) for signed in (True, False) for f in candidates(bits, signed)]
ALL += [parse(f"{u}int{n}") for u in ("", "u") for n in range(1 if u else 2, 9)] + [parse("e4m3fn")]
FP32_ERROR = 1e-6  # sums of some hundred float32 terms, each rounded to 24 bits
TENSOR_CORE_ERROR = {
    "int8": 1e-6,
    "bf16": 1e-5,
    "fp16": 1e-5,
    "e4m3": 2.0**-10,
}  # sums exact, truncated, of 14 bits


@pytest.fixture(autouse=True)
def runs_here(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIFLOAT_CACHE", str(tmp_path))
    triton_tiles._known.cache_clear()
    if "device" in request.fixturenames:
        device = request.getfixturevalue("device")
        if device.type == "cpu" and not backend.interpreting():
            pytest.skip("the interpreter is for machines without a GPU: set TRITON_INTERPRET=1 to force it")


class Case:
    """A layer with random weights on its grid, an input, and what float64 makes of them."""

    def __init__(
        self,
        weight: str | QuantSpec,
        activation: str | QuantSpec | None,
        shape: tuple[int, ...],
        x: Tensor,
        conv: dict[str, tuple[int, int]] | None = None,
        seed: int = 0,
    ) -> None:
        g = torch.Generator().manual_seed(seed)
        spec = QuantSpec(parse(weight), "channel") if isinstance(weight, str) else weight
        act = (
            QuantSpec(parse(activation), "token", online=True) if isinstance(activation, str) else activation
        )
        self.part = Part(shape[1], spec, act)
        count = spec.scale_count(*shape[:2])
        scale = (torch.rand(count, generator=g) + 0.5) * 3 / max(spec.format.max, -spec.format.min)
        zero = torch.randn(count, generator=g) - (1.5 if not spec.format.signed else 0)
        stored = act is not None and not act.online
        self.input_scale = torch.tensor([2.5 / act.format.max]) if act is not None and stored else None
        self.input_zero = torch.tensor([-0.3]) if act is not None and act.zero_point else None
        self.plan: LayerPlan = plan_layer(
            torch.randn(shape, generator=g),
            [self.part],
            [scale],
            weight_zero_points=[zero] if spec.zero_point else None,
            input_scales=[self.input_scale],
            input_zero_points=[self.input_zero],
        )
        self.bias = torch.randn(shape[0], generator=g)
        self.x, self.shape, self.conv = x, shape, conv

    def inputs(self) -> Tensor:
        if self.part.activation is None:
            return self.x.float()
        spec = self.part.activation
        return reference.fake_quantize_input(
            self.x.float(), self.input_scale, self.input_zero, spec.format.name, spec.granularity == "token"
        )

    def truth(self, dtype: torch.dtype = torch.float64) -> Tensor:
        x, w, b = (t.to(dtype) for t in (self.inputs(), dequantize(self.plan), self.bias))
        if self.conv is None:
            return torch.nn.functional.linear(x, w, b)
        return torch.nn.functional.conv2d(x, w, b, **self.conv)

    def arguments(self, device: torch.device) -> tuple[object, ...]:
        tensors = self.plan.tensors
        given = (self.x, tensors["weight"], tensors["weight_scale"], tensors.get("weight_zero_point"),
                 self.input_scale, self.input_zero, self.bias)  # fmt: skip
        x, packed, scale, zero, input_scale, input_zero, bias = (
            None if t is None else t.to(device) for t in given
        )
        piece = PackedWeight(packed, scale, zero, self.part)
        return x, Weight(((piece,),)), Inputs(input_scale, input_zero), bias

    def result(self, device: torch.device, branch: Branch | None = None) -> Tensor:
        x, weight, *rest = self.arguments(device)
        assert backend.supports(self.part, self.shape, x)
        if self.conv is None:
            return backend.linear(x, Weight(weight.columns, branch=branch), *rest).cpu()
        geometry = {"stride": (1, 1), "padding": (0, 0), "dilation": (1, 1), **self.conv}
        return backend.conv2d(x, weight, *rest, Geometry(**geometry)).cpu()

    def error(self, device: torch.device) -> float:
        return relative(self.result(device), self.truth())

    def tolerance(self, device: torch.device) -> float:
        """What sums may lose: hardly anything in the interpreter, more in a tensor core."""
        operands = triton_operands.choose(
            self.part.weight.format,
            self.part.activation and self.part.activation.format,
            self.x.dtype,
            backend.capability(device),
            group_size=self.part.weight.group_size or 0,
        )
        return FP32_ERROR if device.type == "cpu" else TENSOR_CORE_ERROR[operands.kind]


def relative(result: Tensor, truth: Tensor) -> float:
    assert result.shape == truth.shape
    return float((result.double() - truth).norm() / truth.norm())


def tokens(count: int, channels: int, seed: int = 1) -> Tensor:
    return torch.randn(count, channels, generator=torch.Generator().manual_seed(seed))


# Operands: every code of every format, exactly.


def number(bits: int, kind: str) -> float:
    """What an operand of a tensor core is worth."""
    if kind == "int8":
        return float(bits - 256 if bits > 127 else bits)
    if kind == "e4m3":
        return parse("e4m3fn").decode_table[bits]
    return struct.unpack("<f", struct.pack("<I", bits << 16))[0] if kind == "bf16" else half(bits)


def half(bits: int) -> float:
    return struct.unpack("<e", struct.pack("<H", bits))[0]


def bits_of(value: float, kind: str) -> int:
    """The bits of a value that must be exact in 16 bits."""
    if kind == "fp16":
        return struct.unpack("<H", struct.pack("<e", value))[0]
    word = struct.unpack("<I", struct.pack("<f", value))[0]
    assert word & 0xFFFF == 0
    return word >> 16


PTX = {
    "shl": operator.lshift,
    "shr": operator.rshift,
    "and": operator.and_,
    "or": operator.or_,
    "xor": operator.xor,
}


def run_ptx(text: str, source: int, outputs: int, kind: str) -> list[int]:
    """What a straight piece of PTX leaves in $0 (and $1); written from the instruction set's description."""
    registers = {f"${outputs}": source}

    def read(operand: str) -> int:
        return registers[operand] if operand in registers else int(operand, 0)

    for statement in text.strip("{ }").split(";"):
        operation, _, rest = statement.strip().partition(" ")
        if not operation or operation == ".reg":
            continue
        to, *operands = [part.strip() for part in rest.split(",")]
        a = [read(operand) for operand in operands]
        name = operation.split(".")[0]
        if name == "prmt":
            pool = a[0].to_bytes(4, "little") + a[1].to_bytes(4, "little")
            value = sum(pool[a[2] >> 4 * n & 7] << 8 * n for n in range(4))
        elif name == "fma":
            parts = [[number(word >> s & 0xFFFF, kind) for word in a] for s in (0, 16)]
            low, high = (bits_of(x * y + z, kind) for x, y, z in parts)
            value = low | high << 16
        else:
            value = a[0] if name == "mov" else PTX[name](*a)
        registers[to] = value & 0xFFFFFFFF
    return [registers[f"${n}"] for n in range(outputs)]


@pytest.mark.parametrize("kind", ["e4m3", "int8", "bf16", "fp16"])
def test_ptx_decodes_every_code_of_every_format_exactly(kind) -> None:
    checked = 0
    for format in ALL:
        operands = triton_operands.Operands(kind, format, None, 1, 0)
        if not triton_operands.fits(format, kind) or not operands.swift:
            continue
        factor = triton_operands._factor(format, kind, weight=True)
        for start in range(9 - format.bits):
            noise = 0xFF ^ ((2**format.bits - 1) << start)  # other codes of the same byte must not leak in
            for code in range(0, 2**format.bits):
                others = [(code * 7 + n) % 2**format.bits for n in (1, 2, 3)]
                codes = [code, *others]
                source = sum((c << start | noise) << 8 * n for n, c in enumerate(codes))
                outputs = 1 if kind in ("e4m3", "int8") else 2
                words = run_ptx(operands.ptx[start], source, outputs, kind)
                width = 8 if outputs == 1 else 16
                found = [words[n * width // 32] >> n * width % 32 & (2**width - 1) for n in range(4)]
                got = [number(bits, kind) * factor for bits in found]
                true = [format.decode_table[c] for c in codes]
                same = [
                    g == t or math.isnan(t) for g, t in zip(got, true, strict=True)
                ]  # nothing is encoded as NaN
                assert all(same), (format.name, start, codes, got, true)
        checked += 1
    assert checked > 10


@pytest.mark.parametrize(
    ("weight", "activation", "capability", "kind"),
    [
        ("e2m1", "e4m3fn", (9, 0), "e4m3"),
        ("e2m1", "e4m3", (9, 0), "bf16"),  # its 480 is a NaN in hardware
        ("e2m1", "e2m1", (8, 9), "e4m3"),
        ("e2m1", "e2m1", (8, 0), "int8"),
        ("e2m1", "int8", (9, 0), "int8"),
        ("int4", "int8", (9, 0), "int8"),
        ("e3m2", "e3m2", (8, 0), "bf16"),
        ("e5m2", "int8", (9, 0), "bf16"),
        ("e2m1", "e2m1", (7, 5), None),
        ("e2m1", None, (9, 0), "fp16"),
        ("iq4nl", "int8", (9, 0), "int8"),
        ("iq4nl", "e4m3fn", (9, 0), "bf16"),
        ("t4g", None, (9, 0), "fp16"),
    ],
)
def test_operand_type_is_the_fastest_exact_one(weight, activation, capability, kind) -> None:
    found = triton_operands.choose(parse(weight), activation and parse(activation), torch.float16, capability)
    assert (found and found.kind) == kind


@pytest.mark.parametrize(
    ("group_size", "kind"), [(128, "e4m3"), (64, "e4m3"), (32, "bf16"), (16, None), (33, None)]
)
def test_groups_need_a_whole_step_of_the_tensor_core(group_size, kind) -> None:
    found = triton_operands.choose(
        parse("e2m1"), parse("e4m3fn"), torch.bfloat16, (9, 0), group_size=group_size
    )
    assert (found and found.kind) == kind


# The quantizer: bit for bit the reference.


def dequantized(given, operands, channels: int) -> Tensor:
    """The values that the quantizer's operands and scales stand for, in channel order."""
    format = operands.activation
    factor = triton_operands._factor(format, operands.kind, weight=False)
    values = given.values.cpu().float().permute(0, 2, 1).flatten(1)
    assert not values[:, channels:].any()
    return values[:, :channels] * factor * given.token_scale.cpu()[:, None]


@pytest.mark.parametrize(
    "name", ["e2m1", "e4m3fn", "e3m0", "e2m3", "ue2m2", "e1m2", "int4", "int8", "e4m3", "e3m2", "e5m2"]
)
@pytest.mark.parametrize("capability", [(9, 0), (8, 0)], ids=str)
def test_online_quantizer_equals_the_reference_bit_for_bit(name, capability, device) -> None:
    from difloat.kernels.triton import launch

    operands = triton_operands.choose(parse("e2m1"), parse(name), torch.float32, capability)
    if device.type == "cuda" and capability != (9, 0):
        pytest.skip("operands of another device")
    x = tokens(6, 83) * torch.exp2(torch.arange(6.0) * 4 - 12)[:, None]
    x[1] = 0
    x[2, :40] = parse(name).max * torch.arange(40) / 80  # ties
    x[2, 40] = parse(name).max
    source = launch.rows_source(x.to(device))
    spec = QuantSpec(parse(name), "token", online=True)
    given = launch.quantized(source, operands, spec, None, None, 0, None)
    assert torch.equal(
        dequantized(given, operands, 83), reference.fake_quantize_input(x, None, None, name, True)
    )


@pytest.mark.parametrize("name", ["ue2m2", "int8", "e4m3fn"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_stored_scale_and_zero_point_equal_the_reference(name, dtype, device) -> None:
    from difloat.kernels.triton import launch

    x, scale, zero = tokens(5, 40).to(dtype), torch.tensor([0.013]), torch.tensor([-0.4])
    operands = triton_operands.choose(parse("e2m1"), parse(name), dtype, (9, 0))
    spec = QuantSpec(parse(name), zero_point=True)
    source = launch.rows_source(x.to(device))
    given = launch.quantized(source, operands, spec, scale.to(device), zero.to(device), 1, None)
    expected = reference.fake_quantize_input(x.float(), scale, zero, name, False)
    values = dequantized(given, operands, 40)
    assert torch.equal(values + zero, expected)
    grid = values.double().sum(1) / scale
    torch.testing.assert_close(given.token_sum.cpu()[:, 0].double(), grid, rtol=1e-6, atol=1e-4)


# Products.

FORMATS = [
    ("e2m1", "e4m3fn"),
    ("e2m1", "e2m1"),
    ("e2m1", "e2m3"),
    ("int4", "int8"),
    ("e2m1", "int8"),
    ("e3m2", "e4m3"),
]
FORMATS += [("e3m0", "e3m0"), ("ue2m2", "ue3m1"), ("e4m3fn", "e4m3fn"), ("e5m2", "e5m2"), ("int8", "int8")]


@pytest.mark.parametrize(("weight", "activation"), FORMATS, ids=str)
def test_linear_equals_float64(weight, activation, device) -> None:
    case = Case(weight, activation, (40, 72), tokens(5, 72))
    assert case.error(device) < case.tolerance(device)


@pytest.mark.parametrize("shape", [(1, 1, 1), (17, 3, 9), (2, 70, 130), (130, 65, 33)], ids=str)
@pytest.mark.parametrize("name", ["e2m1", "int3"])
def test_ragged_shapes(name, shape, device) -> None:
    count, rows, channels = shape
    case = Case(name, "int8", (rows, channels), tokens(count, channels))
    assert case.error(device) < case.tolerance(device)


@pytest.mark.parametrize(
    "name",
    ["uint1", "int2", "int3", "e1m1", "e2m1", "e2m2", "int5", "e2m3", "uint6", "int7", "uint8"]
    + ["t2g", "t3g", "t4g", "iq4nl", "table(-128,-3,5,127)"],
)
def test_every_width(name, device) -> None:
    case = Case(name, "int8", (20, 75), tokens(3, 75))
    assert case.error(device) < case.tolerance(device)


@pytest.mark.parametrize("weight", ["e2m1", "int4", "int8", "e2m3", "iq4nl"])
@pytest.mark.parametrize("count", [5, 70])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weight_only_is_as_near_as_half_precision(dtype, count, weight, device) -> None:
    case = Case(weight, None, (24, 66), tokens(count, 66).to(dtype))
    plain = relative(case.truth(dtype), case.truth())
    assert case.error(device) <= 2 * plain


@pytest.mark.parametrize("activation", ["e4m3fn", "int8"])
def test_half_precision_input_and_output(activation, device) -> None:
    case = Case("e2m1", activation, (24, 66), tokens(9, 66).bfloat16())
    assert case.result(device).dtype == torch.bfloat16
    assert case.error(device) <= 2 * relative(case.truth(torch.bfloat16), case.truth())


@pytest.mark.parametrize("zero_point", [False, True])
@pytest.mark.parametrize(
    ("name", "group_size"),
    [("e2m1", 128), ("e2m1", 64), ("e2m1", 32), ("int3", 128), ("e2m3", 128), ("uint2", 64)],
)
def test_groups(name, group_size, zero_point, device) -> None:
    spec = QuantSpec(parse(name), "group", group_size, zero_point=zero_point)
    case = Case(spec, "e2m1", (20, 200), tokens(5, 200))
    assert case.error(device) < case.tolerance(device)


@pytest.mark.parametrize("stored", [True, False])
@pytest.mark.parametrize("granularity", ["tensor", "channel"])
def test_unsigned_formats_with_zero_points(granularity, stored, device) -> None:
    weight = QuantSpec(parse("uint4"), granularity, zero_point=True)
    activation = (
        QuantSpec(parse("ue2m2"), zero_point=True) if stored else QuantSpec(parse("int8"), online=True)
    )
    case = Case(weight, activation, (20, 90), tokens(7, 90))
    assert case.error(device) < case.tolerance(device)


CONVOLUTIONS = {
    "3x3": ((2, 24, 7, 6), (3, 3), {"padding": (1, 1)}),
    "1x1": ((2, 24, 5, 4), (1, 1), {}),
    "strided": ((1, 24, 7, 6), (3, 3), {"padding": (1, 1), "stride": (2, 2)}),
    "dilated": ((1, 24, 6, 7), (3, 2), {"padding": (2, 3), "dilation": (2, 3)}),
}


@pytest.mark.parametrize("zero_points", [False, True])
@pytest.mark.parametrize(("size", "kernel", "conv"), CONVOLUTIONS.values(), ids=CONVOLUTIONS)
@pytest.mark.parametrize("last", [False, True], ids=["channels first", "channels last"])
def test_convolution_equals_float64(last, size, kernel, conv, zero_points, device) -> None:
    if last and zero_points:
        pytest.skip("covered by channels first")
    x = torch.randn(size, generator=torch.Generator().manual_seed(2))
    x = x.contiguous(memory_format=torch.channels_last) if last else x
    weight = QuantSpec(parse("uint4" if zero_points else "e2m1"), "channel", zero_point=zero_points)
    activation = QuantSpec(parse("ue2m2"), zero_point=True) if zero_points else "e4m3fn"
    case = Case(weight, activation, (20, 24, *kernel), x, conv)
    assert case.error(device) < case.tolerance(device)


def test_convolution_in_groups_of_channels_with_zero_points(device) -> None:
    x = torch.randn(1, 80, 4, 5, generator=torch.Generator().manual_seed(2))
    spec = QuantSpec(parse("e2m1"), "group", 64, zero_point=True)
    case = Case(spec, "int8", (12, 80, 3, 3), x, {"padding": (1, 1)})
    assert case.error(device) < case.tolerance(device)


@pytest.mark.parametrize("conv", [None, {"padding": (1, 1)}], ids=["linear", "convolution"])
def test_programs_that_share_the_k_axis_give_the_same(conv, device, monkeypatch) -> None:
    tile = triton_tiles.Tile(64, 16, 32, splits=3)
    monkeypatch.setattr(triton_tiles, "rule", lambda problem, device: tile)
    x = (
        tokens(5, 260)
        if conv is None
        else torch.randn(1, 24, 4, 4, generator=torch.Generator().manual_seed(3))
    )
    shape = (70, 260) if conv is None else (70, 24, 3, 3)
    weight = QuantSpec(parse("uint4"), "channel", zero_point=True)
    case = Case(weight, "e4m3fn", shape, x, conv)
    assert case.error(device) < case.tolerance(device)


def test_rows_of_mixed_widths_share_one_quantized_input(device) -> None:
    x, bias = tokens(6, 100).to(device), torch.randn(30, generator=torch.Generator().manual_seed(5))
    cases = [
        Case(name, "int8", (10, 100), x.cpu(), seed=n) for n, name in enumerate(("int3", "int4", "int5"))
    ]
    pieces = tuple(case.arguments(device)[1].bands[0] for case in cases)
    row_band = torch.arange(3).repeat_interleave(10)[
        torch.randperm(30, generator=torch.Generator().manual_seed(6))
    ]
    packed = Weight((pieces,), row_band.to(device, torch.uint8))
    order = row_places(row_band)
    result = backend.linear(x, packed, Inputs(), bias.to(device))
    weight = torch.cat([dequantize(case.plan) for case in cases]).double()
    truth = (cases[0].inputs().double() @ weight.T)[:, order] + bias.double()
    assert relative(result.cpu(), truth) < cases[0].tolerance(device)


@pytest.mark.parametrize("activation", ["e4m3fn", None])
@pytest.mark.parametrize("count", [3, 40])
def test_adapter_sees_the_input_before_it_is_rounded(count, activation, device) -> None:
    dtype = torch.float32 if activation else torch.bfloat16
    case = Case("e2m1", activation, (20, 70), tokens(count, 70).to(dtype))
    down, up = (tokens(*size, seed=7).to(dtype) for size in ((5, 70), (20, 5)))
    result = case.result(device, Branch(down.to(device), up.to(device)))
    truth = case.truth() + case.x.double() @ down.double().T @ up.double().T
    assert relative(result, truth) < (case.tolerance(device) if activation else 1e-2)


def test_a_layer_with_a_pair_beside_reads_its_input_once(device, monkeypatch) -> None:
    case = Case("e2m1", "e4m3fn", (20, 70), tokens(3, 70))
    factors = {"side_down": tokens(5, 70, seed=7).half(), "side_up": tokens(20, 5, seed=8).half()}
    plan = replace(case.plan, tensors={**case.plan.tensors, **factors}, side=Side(5))
    model = torch.nn.Sequential(torch.nn.Linear(70, 20)).to(device)
    model[0].bias.data.copy_(case.bias)
    install.install(model, "0", plan)
    seen, product = [], backend.linear
    monkeypatch.setattr(
        backend, "linear", lambda x, weight, *rest: seen.append(weight.branch) or product(x, weight, *rest)
    )
    with use_backend("triton"), torch.no_grad():
        result = model(case.x.to(device)).cpu()
    truth = case.truth() + case.x.double() @ factors["side_down"].double().T @ factors["side_up"].double().T
    assert len(seen) == 1 and seen[0] is not None and relative(result, truth) < case.tolerance(device)


# Edges.


def test_a_slice_of_a_layers_weight_is_read_in_place(device) -> None:
    case = Case("e2m1", "int8", (20, 72), tokens(4, 72))
    wide = torch.full((20, 50), 255, dtype=torch.uint8)
    wide[:, 7:43] = case.plan.tensors["weight"]
    x, weight, *rest = case.arguments(device)
    piece = replace(weight.bands[0], codes=wide.to(device)[:, 7:43])
    result = backend.linear(x, Weight(((piece,),)), *rest)
    assert torch.equal(result.cpu(), case.result(device))


def test_leading_axes_strides_and_empty_inputs(device) -> None:
    case = Case("e2m1", "int8", (20, 72), tokens(6, 72))
    x, *rest = case.arguments(device)
    flat = backend.linear(x, *rest)
    assert torch.equal(backend.linear(x.reshape(2, 3, 72), *rest), flat.reshape(2, 3, 20))
    assert torch.equal(backend.linear(x.t().contiguous().t(), *rest), flat)
    assert backend.linear(x[:0], *rest).shape == (0, 20)


@pytest.mark.parametrize(
    "spec", [QuantSpec(parse("int8"), "token", online=True), QuantSpec(parse("int8"))], ids=str
)
def test_nan_stays_nan_in_its_token_and_nowhere_else(spec, device) -> None:
    x = tokens(4, 40)
    x[2, 33] = float("nan")
    result = Case("e2m1", spec, (8, 40), x).result(device)
    assert result[2].isnan().all() and result[[0, 1, 3]].isfinite().all()


def test_nan_stays_nan_where_a_kernel_meets_it(device) -> None:
    x = torch.randn(1, 8, 5, 5, generator=torch.Generator().manual_seed(3))
    x[0, 3, 0, 0] = float("nan")
    result = Case("e2m1", QuantSpec(parse("int8")), (4, 8, 3, 3), x, {"padding": (1, 1)}).result(device)
    met = torch.zeros(5, 5, dtype=torch.bool)
    met[:2, :2] = True
    assert torch.equal(result[0].isnan(), met.expand(4, 5, 5))


UNSUPPORTED = {
    "float64": (Part(8, QuantSpec(parse("e2m1"))), (4, 8), torch.zeros(2, 8, dtype=torch.float64)),
    "weight-only float32": (Part(8, QuantSpec(parse("e2m1"))), (4, 8), torch.zeros(2, 8)),
    "grouped convolution": (Part(8, QuantSpec(parse("e2m1"))), (4, 4, 1, 1), torch.zeros(1, 8, 2, 2).half()),
    "odd groups": (Part(9, QuantSpec(parse("e2m1"), "group", 3)), (4, 9), torch.zeros(2, 9).half()),
}


@pytest.mark.parametrize(("part", "shape", "x"), UNSUPPORTED.values(), ids=UNSUPPORTED)
def test_what_is_not_supported_is_refused(part, shape, x, device) -> None:
    x = x.to(device)
    assert not backend.supports(part, shape, x)
    if len(shape) == 2:
        packed = pack(torch.zeros(shape, dtype=torch.uint8), part.weight.format.bits).to(device)
        if x.dtype != torch.float64:
            with pytest.raises(ValueError, match="supports"):
                piece = PackedWeight(packed, torch.ones(4, device=device), None, part)
                backend.linear(x, Weight(((piece,),)), Inputs(), None)


# Tiles.


def problem(tokens: int, rows: int = 1152) -> triton_tiles.Problem:
    operands = triton_operands.choose(parse("e2m1"), parse("e4m3fn"), torch.bfloat16, (9, 0))
    return triton_tiles.Problem(operands, rows, tokens, 576)


@pytest.mark.parametrize("shared_bytes", [227 << 10, 99 << 10])
@pytest.mark.parametrize("count", [1, 16, 17, 256, 1024, 8192])
def test_tiles_fit_the_device_and_fill_it(count, shared_bytes) -> None:
    device = triton_tiles.Device("some GPU", 132, shared_bytes)
    tile = triton_tiles.rule(problem(count), device)
    for each in (tile, *triton_tiles.candidates(problem(count), device)):
        assert triton_tiles.shared_bytes(each, problem(count).operands) <= shared_bytes
        assert each.words & (each.words - 1) == 0 and each.tokens >= 16
    programs = -(-1152 // tile.rows) * -(-count // tile.tokens) * tile.splits
    assert programs >= 64


def test_measured_tiles_are_kept_on_disk(tmp_path, monkeypatch) -> None:
    best = triton_tiles.Tile(64, 64, 64, stages=2)
    device = triton_tiles.Device("some GPU", 132, 227 << 10)
    monkeypatch.setattr(triton_tiles, "device_of", lambda index: device)
    monkeypatch.setattr(triton_tiles, "fastest", lambda tiles, run: best)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert triton_tiles.choose(problem(1000), 0, lambda tile: None) == triton_tiles.rule(
        problem(1000), device
    )
    with triton_tiles.tuning():
        assert triton_tiles.choose(problem(1000), 0, lambda tile: None) == best
    triton_tiles._known.cache_clear()
    assert triton_tiles.choose(problem(1024), 0, lambda tile: None) == best  # the same power of two
    triton_tiles._known.cache_clear()
    triton_tiles.cache_file("some GPU").write_text("[]")
    with pytest.raises(ValueError, match="delete it"):
        triton_tiles.choose(problem(1024), 0, lambda tile: None)


def test_importing_the_package_does_not_import_triton() -> None:
    code = "import sys, difloat, difloat.kernels.triton; print('triton' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"


@pytest.mark.parametrize(
    "target", [90, pytest.param(80, marks=pytest.mark.slow), pytest.param(89, marks=pytest.mark.slow)]
)
def test_the_compiler_accepts_the_kernels(target) -> None:
    """The interpreter allows more than the compiler does, and a compiler needs no GPU."""
    script = Path(__file__).with_name("compile_triton.py")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, str(script), str(target)], capture_output=True, text=True, env=environment
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert "largest_magnitude matmul quantize weight_sums" in result.stdout
    assert "another number of tokens compiles nothing" in result.stdout
    if target == 90:  # FP8 products of registers (the weight) with shared memory, loads ahead of them
        assert "wgmma e4m3 from registers, pipelined" in result.stdout
