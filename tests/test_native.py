"""The native library: its interface, its refusals, and its machine code."""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from difloat.cli import kernel_summary
from difloat.kernels import dispatch, native_int8, native_library
from difloat.numbers.formats import parse
from difloat.plan.specs import Part, QuantSpec

FOLDER = Path(native_library.__file__).parent
TOKEN = QuantSpec(parse("int8"), "token", online=True)
needs_library = pytest.mark.skipif(not native_library.built(), reason="the native library was not built")


def test_structs_follow_the_header() -> None:
    text = (FOLDER / "csrc/difloat.h").read_text(encoding="utf-8")
    assert int(re.search(r"DIFLOAT_ABI (\d+)", text).group(1)) == native_library.ABI
    for kind in (
        native_library.Grid,
        native_library.Input,
        native_library.Weight,
        native_library.Output,
        native_library.Geometry,
        native_library.Attention,
    ):
        body = re.search(rf"typedef struct {{([^{{}}]*)}} difloat_{kind.__name__.lower()};", text).group(1)
        code = re.sub(r"//[^\n]*", "", body)
        fields = []
        for declaration in filter(None, (part.strip() for part in code.split(";"))):
            kind_name, rest = re.match(r"((?:const )?\w+\s*\*?)\s*(.*)", declaration, re.DOTALL).groups()
            for item in rest.split(","):
                pointer = "*" in kind_name or item.strip().startswith("*")
                fields.append((re.sub(r"[*\[\]\d\s]", "", item), "pointer" if pointer else kind_name.strip()))
        assert [name for name, _ in fields] == [name for name, *_ in kind._fields_], kind
        sizes = {
            "float": 4,
            "int32_t": 4,
            "int64_t": 8,
            "pointer": 8,
            "difloat_grid": ctypes.sizeof(native_library.Grid),
        }
        for (name, c_type), (_, field_type) in zip(fields, kind._fields_, strict=True):
            base = getattr(field_type, "_type_", None)
            array = isinstance(field_type, type) and issubclass(field_type, ctypes.Array)
            assert ctypes.sizeof(base if array else field_type) == sizes[c_type], (kind, name)


@pytest.mark.parametrize("name", ["e2m1", "int8", "uint8", "e3m0", "e1m6", "int3", "uint1"])
def test_tables_hold_every_code_again_and_again(name) -> None:
    format = parse(name)
    found = native_library.codes(format)
    for code in range(256):
        value = format.decode_table[code % 2**format.bits]
        assert (found.table[code] + found.minimum) * found.unit == value


def test_what_the_library_leaves_alone() -> None:
    part = Part(48, QuantSpec(parse("e2m1"), "group", 16), TOKEN)
    odd = Part(48, QuantSpec(parse("e2m1"), "group", 24), TOKEN)
    x, picture = torch.zeros(2, 48), torch.zeros(1, 48, 4, 4)
    assert native_int8.supports(part, (8, 48), x) and not native_int8.supports(odd, (8, 48), x)
    assert native_int8.supports(part, (8, 48, 3, 3), picture)
    assert not native_int8.supports(odd, (8, 48, 3, 3), picture)
    ranged = QuantSpec(parse("uint4"), "group", 16, online=True, zero_point=True)
    assert native_int8.supports(Part(48, QuantSpec(parse("e2m1"), "channel"), ranged), (8, 48), x)
    for size in (24, 32):  # no whole vectors; no whole number of them in a group of the weight
        other = replace(ranged, group_size=size)
        assert not native_int8.supports(Part(48, part.weight, other), (8, 48), x)
    shifted = replace(ranged, format=parse("uint8"))
    assert not native_int8.supports(Part(48, part.weight, shifted), (8, 48), x)
    assert not native_int8.supports(part, (8, 48), x.double())
    assert not native_int8.supports(part, (8, 48), x.to("meta"))
    assert not native_int8.supports(Part(48, QuantSpec(parse("e4m3"), "channel"), TOKEN), (8, 48), x)


def run(code: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **variables}
    )


@needs_library
def test_the_instruction_set_can_be_capped(monkeypatch) -> None:
    choose = native_library.unit.__wrapped__  # past its cache
    machine = native_library.machine()
    monkeypatch.setenv("DIFLOAT_CPU_ISA", "avx2")
    assert choose() == ("avx2" if machine["avx2"] else None)
    monkeypatch.setenv("DIFLOAT_CPU_ISA", "none")
    assert choose() is None
    monkeypatch.setenv("DIFLOAT_CPU_ISA", "sse")
    with pytest.raises(
        ValueError,
        match="DIFLOAT_CPU_ISA must be one of amx, avx512, avx512vl, avxvnni, avx2, neon or none, got 'sse'",
    ):
        choose()


@needs_library
def test_refused_tiles_are_said(monkeypatch) -> None:
    """Where the operating system keeps AMX from the process the unit is left out, and the summary says so."""
    machine = native_library.machine()
    assert not (machine["amx"] and native_library.tiles_refused())
    monkeypatch.setattr(native_library, "tiles_refused", lambda: True)
    if native_library.unit() is not None:
        assert "AMX refused by the operating system" in kernel_summary.machine()


def test_a_backend_that_cannot_run_here_is_refused(monkeypatch) -> None:
    monkeypatch.setattr(native_library, "unit", lambda: None)
    message = r"backend must be one of reference, torch(, triton)? here, got 'cpu': the native library"
    with pytest.raises(ValueError, match=message):
        dispatch._checked.__wrapped__("cpu", "backend")


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="the system has no taskset")
def test_no_more_threads_than_cores_that_a_process_may_use() -> None:
    """Torch counts them, and the library takes its number from torch, whose pool it shares."""
    code = """
import os
os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])
import torch
from difloat.kernels import native_library
print(torch.get_num_threads(), native_library.threads())
"""
    free = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "MKL_"))}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=free)
    assert result.stdout.split() == ["1", "1"], result.stderr


@needs_library
def test_units_agree_bit_for_bit() -> None:
    """Sums are exact and the float operations after them are the same, whatever the width of a vector."""
    if not (native_library.machine()["avx512"] and native_library.machine()["avx2"]):
        pytest.skip("this machine has one unit")
    code = """
import hashlib, torch
from difloat.kernels import native_int8
from difloat.numbers.formats import parse
from difloat.plan.encode import plan_layer
from difloat.plan.specs import Part, QuantSpec
from difloat.plan.weight import Inputs
generator, digest = torch.Generator().manual_seed(0), hashlib.sha256()
token = QuantSpec(parse("e3m0"), "token", online=True)
ranged = QuantSpec(parse("uint4"), "group", 32, online=True, zero_point=True)
for name, zero, group in [("e2m1", False, None), ("uint4", True, 32), ("int3", False, None), ("e3m0", False, 64)]:
    for rows in (1, 5, 40):
        spec = QuantSpec(parse(name), "group" if group else "channel", group, False, zero)
        scale = torch.rand(spec.scale_count(70, 100), generator=generator) + 0.5
        weight, shift = torch.randn(70, 100, generator=generator), scale - 1
        x = torch.randn(rows, 100, generator=generator).bfloat16()
        for inputs in (token, ranged):
            part = Part(100, spec, inputs)
            layer = plan_layer(weight, [part], [scale], weight_zero_points=[shift] if zero else None)
            out = native_int8.linear(x, layer.weight(), Inputs(), None)
            digest.update(out.float().numpy().tobytes())
print(digest.hexdigest())
"""
    first, second = run(code, DIFLOAT_CPU_ISA="avx512"), run(code, DIFLOAT_CPU_ISA="avx2")
    assert first.stdout and first.stdout == second.stdout, first.stderr + second.stderr


def test_products_of_torch_that_saturate_are_not_used() -> None:
    """Without VNNI, oneDNN adds two products of 8 bits in 16: exact for weights up to 64, not for INT8 ones."""
    code = """
import torch
from difloat.numbers.formats import parse
from difloat.kernels import integer_operands, torch_int8
from difloat.plan.specs import Part, QuantSpec
x, found = torch.zeros(2, 256), []
for name in ("e2m1", "e3m0", "int8"):
    part = Part(256, QuantSpec(parse(name), "channel"), QuantSpec(parse("int8"), "token", online=True))
    if torch_int8.supports(part, (64, 256), x):
        found.append(name)
        ends = integer_operands.operand_table(part.weight.format).int()
        weight = torch.stack([ends.min(), ends.max()]).to(torch.int8)[:, None].repeat(32, 256)
        rows = torch.tensor([-128, 127], dtype=torch.int8)[:, None].repeat(32, 256)
        assert torch.equal(torch._int_mm(rows, weight.t()).double(), rows.double() @ weight.double().t())
print(*found)
"""
    capped = run(code, ATEN_CPU_CAPABILITY="avx2", ONEDNN_MAX_CPU_ISA="AVX2")
    assert capped.stdout.split()[:2] == ["e2m1", "e3m0"], capped.stderr
    assert run(code).stdout.split()[:2] == ["e2m1", "e3m0"]


@needs_library
@pytest.mark.skipif(shutil.which("objdump") is None, reason="reads machine code with objdump")
@pytest.mark.parametrize(
    ("library", "function", "instruction", "vectors"),
    [
        ("avx512", r"tile<6, [012], 4,[^\n]*Dot>", "vpdpbusd", 4),
        ("avx512", r"tile<6, [012], 2,[^\n]*Dot>", "vpdpbusd", 2),
        ("avx512", r"sum_stepped<6, 4,[^\n]*Dot>", "vpdpbusd", 4),
        ("avx512", r"sum_stepped<6, 2,[^\n]*Dot>", "vpdpbusd", 2),
        ("attention", r"panel_product<false, 6, 4>", "vdpbf16ps", 4),
        ("attention", r"panel_product<true, 6, 4>", "vpdpbusd", 4),
    ],
)
def test_accumulators_stay_in_registers(library, function, instruction, vectors) -> None:
    """No store to the stack between the multiply-adds of an inner loop: a spill there halves the speed."""
    path = FOLDER / f"libdifloat_{library}.so"
    text = subprocess.run(
        ["objdump", "-dC", "--no-show-raw-insn", path], capture_output=True, text=True
    ).stdout
    bodies = re.findall(rf"^\w+ <[^\n]*{function}[^\n]*>:\n(.*?)\n\n", text, re.MULTILINE | re.DOTALL)
    assert bodies
    for body in bodies:
        lines = body.splitlines()
        at = [number for number, line in enumerate(lines) if instruction in line]
        assert len(at) == 6 * vectors  # for 6 rows, once
        inner = lines[at[0] : at[-1] + 1]
        assert len(inner) <= 6 * vectors + 12  # five broadcasts, a counter or two
        assert not [line for line in inner if re.search(r"%zmm\d+,[^%]*\(%r[sb]p", line)]
