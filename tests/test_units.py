"""Every unit of the native library that this machine runs: exact in integers, and the same after rounding.

Inputs and weights take the ends of their grids as often as anything between, since that is where sums of 16 bits overflow. All
scales are 1, so every result is a whole number times a power of two that float32 holds.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
from collections.abc import Iterator
from itertools import product
from pathlib import Path

import pytest
import torch
from torch import Tensor

from difloat.kernels import native_decode, native_int8, native_library, reference
from difloat.kernels.geometry import Geometry
from difloat.numbers.formats import Format, parse
from difloat.plan.encode import plan_layer
from difloat.plan.specs import Part, QuantSpec
from difloat.plan.weight import Inputs

WEIGHTS = [
    "uint1",
    "int2",
    "t2g",
    "int3",
    "t3g",
    "e2m1",
    "int4",
    "uint4",
    "t4g",
    "iq4nl",
    "table(-128,-1,127)",
]
WEIGHTS += [
    "int5",
    "uint5",
    "e3m0",
    "int6",
    "e2m3",
    "uint6",
    "int7",
    "uint7",
    "e1m5",
    "int8",
    "uint8",
    "e1m6",
    "ue1m7",
]
INPUTS = ["e2m1", "e2m3", "int4", "int8", "uint8", "ue3m1", "e3m0"]
CHANNELS = [1, 3, 16, 33, 64, 100, 131]
ROWS = [1, 2, 4, 5, 7, 40]


def on_grid(shape: tuple[int, ...], format: Format, generator: torch.Generator) -> Tensor:
    """Values of a format, every second one at an end of it."""
    values = torch.tensor(format.values)
    places = torch.randint(len(values), shape, generator=generator)
    ends = torch.randint(2, shape, generator=generator) * (len(values) - 1)
    return values[torch.where(torch.rand(shape, generator=generator) < 0.5, ends, places)]


def exact_layer(
    weights: Format, inputs: Format, shape: tuple[int, ...], group: int | None, generator: torch.Generator
) -> tuple[Tensor, list[object]]:
    """A weight on its grid, and it packed with the scales of its inputs."""
    spec = QuantSpec(weights, "group" if group else "channel", group)
    part = Part(shape[1], spec, QuantSpec(inputs))
    weight = on_grid(shape, weights, generator)
    scale = torch.ones(spec.scale_count(*shape[:2]))
    layer = plan_layer(weight, [part], [scale], input_scales=[torch.ones(1)])
    return weight, [layer.weight(), Inputs(torch.ones(1)), None]


def check_linear(weights: Format, inputs: Format, number: int, generator: torch.Generator) -> None:
    """One linear layer against float64."""
    channels, rows = CHANNELS[number % len(CHANNELS)], ROWS[number % len(ROWS)]
    group = 16 if number % 5 == 0 and channels > 16 else None
    weight, stored = exact_layer(weights, inputs, (37, channels), group, generator)
    x = on_grid((rows, channels), inputs, generator)
    expected = (x.double() @ weight.double().t()).float()
    result = native_int8.linear(x, *stored)
    assert torch.equal(result, expected), (weights.name, inputs.name, channels, rows, group)


def check_conv2d(weights: Format, inputs: Format, number: int, generator: torch.Generator) -> None:
    """One convolution against float64."""
    channels, kernel = CHANNELS[number % 5], 1 + number % 3
    weight, stored = exact_layer(weights, inputs, (19, channels, kernel, kernel), None, generator)
    x = on_grid((2, channels, 5, 4), inputs, generator)
    geometry = Geometry((1 + number % 2,) * 2, (number % 2,) * 2)
    expected = geometry.convolve(x.double(), weight.double()).float()
    result = native_int8.conv2d(x, *stored, geometry)
    assert torch.equal(result, expected), (weights.name, inputs.name, channels, kernel)


@pytest.mark.parametrize(
    ("channels", "group"), [(330, None), (330, 80), (330, 96), (352, 176), (208, 48), (64, 16)]
)
def test_blocks_of_rows_and_channels_are_exact(unit: str, channels: int, group: int | None) -> None:
    """Several blocks of rows, panels and tiles, and groups that end inside a tile."""
    generator = torch.Generator().manual_seed(channels)
    for inputs in ("int8", "uint8"):
        weights, grid = parse("int8"), parse(inputs)
        weight, stored = exact_layer(weights, grid, (200, channels), group, generator)
        for rows in (19, 1100):
            x = on_grid((rows, channels), grid, generator)
            expected = (x.double() @ weight.double().t()).float()
            assert torch.equal(native_int8.linear(x, *stored), expected), (inputs, rows)


@pytest.mark.parametrize(
    ("width", "stride", "padding"), [(37, 1, 1), (37, 2, 1), (8, 1, 0), (64, 1, 1), (33, 1, 0)]
)
def test_lines_of_pictures_are_exact(unit: str, width: int, stride: int, padding: int) -> None:
    """Lines that are cut into stacks of rows of different heights, and lines that go on in the next one."""
    generator, grid = torch.Generator().manual_seed(width), parse("uint8")
    for kernel in (1, 3):
        weight, stored = exact_layer(parse("int8"), grid, (70, 68, kernel, kernel), None, generator)
        x = on_grid((2, 68, 5, width), grid, generator)
        geometry = Geometry((stride, stride), (padding, padding))
        expected = geometry.convolve(x.double(), weight.double()).float()
        assert torch.equal(native_int8.conv2d(x, *stored, geometry), expected), kernel


def rounding_digest(generator: torch.Generator) -> str:
    """A digest of results with scales, zero points, groups and half precision."""
    digest = hashlib.sha256()
    cases = [
        ("e2m1", False, None),
        ("uint4", True, 32),
        ("int3", False, None),
        ("e3m0", False, 64),
        ("iq4nl", False, 32),
    ]
    for name, zero, group in [*cases, ("int8", False, 32), ("e2m3", False, None), ("uint6", True, 16)]:
        for rows in (1, 5, 40):
            spec = QuantSpec(parse(name), "group" if group else "channel", group, False, zero)
            part = Part(100, spec, QuantSpec(parse("e3m0"), "token", online=True))
            scale = torch.rand(spec.scale_count(70, 100), generator=generator) + 0.5
            weight, shift = torch.randn(70, 100, generator=generator), scale - 1
            layer = plan_layer(weight, [part], [scale], weight_zero_points=[shift] if zero else None)
            x = torch.randn(rows, 100, generator=generator).bfloat16()
            out = native_int8.linear(x, layer.weight(), Inputs(), None)
            digest.update(out.float().numpy().tobytes())
    return digest.hexdigest()


HERE = [name for name in native_library.UNITS if native_library.machine()[name]]
needs_unit = pytest.mark.skipif(not HERE, reason="no unit of the native library here")


@pytest.fixture(params=HERE)
def unit(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The native library on one unit."""
    monkeypatch.setenv("DIFLOAT_CPU_ISA", request.param)
    for found in (native_library.unit, native_library.library):
        found.cache_clear()
    assert native_library.unit() == request.param
    yield request.param
    monkeypatch.undo()
    for found in (native_library.unit, native_library.library):
        found.cache_clear()


def test_sums_are_exact(unit: str) -> None:
    generator = torch.Generator().manual_seed(0)
    for number, (weights, inputs) in enumerate(product(WEIGHTS, INPUTS)):
        check_linear(parse(weights), parse(inputs), number, generator)
        check_conv2d(parse(weights), parse(inputs), number, generator)


@needs_unit
def test_units_round_alike() -> None:
    """What comes after the sums is the same on every unit."""
    digests = {}
    for name in HERE:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("DIFLOAT_CPU_ISA", name)
            native_library.unit.cache_clear(), native_library.library.cache_clear()
            digests[name] = rounding_digest(torch.Generator().manual_seed(0))
    native_library.unit.cache_clear(), native_library.library.cache_clear()
    assert len(set(digests.values())) == 1, digests


def test_weights_are_decoded_as_the_reference_does(unit: str) -> None:
    generator = torch.Generator().manual_seed(0)
    for number, name in enumerate([*WEIGHTS, "e4m3", "e3m2", "e5m2", "e2m2", "e3m3"]):
        channels = CHANNELS[number % len(CHANNELS)]
        group = 16 if channels % 16 == 0 and number % 2 else None
        spec = QuantSpec(parse(name), "group" if group else "channel", group)
        weight = torch.randn(37, channels, generator=generator)
        scale = torch.rand(spec.scale_count(37, channels), generator=generator) + 0.1
        stored = plan_layer(weight, [Part(channels, spec)], [scale]).weight()
        x = torch.randn(3, channels, generator=generator)
        expected = reference.linear(x, stored, Inputs(), None)
        assert torch.equal(native_decode.linear(x, stored, Inputs(), None), expected), name


CONTRACT = Path(__file__).with_name("unit_contract.cpp")
SOURCES = Path(native_library.__file__).parent / "csrc"
FLAGS = ["-std=c++17", "-fopenmp", "-ffp-contract=off", "-fno-math-errno", f"-I{SOURCES}", str(CONTRACT)]


def count_of(command: list[str]) -> str:
    """What the contract prints."""
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@needs_unit
@pytest.mark.skipif(shutil.which("g++") is None, reason="compiles a program with g++")
def test_every_bit_is_that_of_plain_loops(tmp_path: Path) -> None:
    subprocess.run(["g++", "-O1", *FLAGS, "-c", "-o", tmp_path / "contract.o"], check=True)
    for name in HERE:
        library = native_library._FOLDER / f"libdifloat_{name}.so"
        links = [library, f"-Wl,-rpath,{library.parent}", "-fopenmp", "-o", tmp_path / name]
        subprocess.run(["g++", tmp_path / "contract.o", *links], check=True)
        assert count_of([str(tmp_path / name), "400"]).startswith("400 layers")


@pytest.mark.slow
@pytest.mark.skipif(
    not (shutil.which("aarch64-linux-gnu-g++") and shutil.which("qemu-aarch64")),
    reason="compiles for ARM with g++-aarch64-linux-gnu and runs it with qemu-user",
)
def test_every_bit_is_that_of_plain_loops_on_arm(tmp_path: Path) -> None:
    """The ARM unit, whole contract and fuzz, on an emulated processor."""
    unit = ["-march=armv8.2-a+dotprod", str(SOURCES / "unit_neon.cpp"), "-static", "-Wall", "-Wextra"]
    ignored = ["-Wno-uninitialized", "-Wno-maybe-uninitialized"]
    output = ["-o", str(tmp_path / "contract")]
    subprocess.run(["aarch64-linux-gnu-g++", "-O2", *FLAGS, *unit, *ignored, *output], check=True)
    assert count_of(["qemu-aarch64", str(tmp_path / "contract"), "500"]).startswith("500 layers")
