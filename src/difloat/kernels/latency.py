"""Times of this machine's kernels, measured once per kind of layer and kept in the user's cache.

A kind of layer is a format of the weight, a format of the input, and a class of shapes: tokens and channels are rounded to
powers, and the weight gets a few hundred rows, since time grows with the rows. Stored is the time of one product. So the
time of a layer is a look-up, also for widths that a plan may give it but does not have yet.

Nothing is measured unasked. `measure` is called where ``--target cpu`` makes a recipe choose formats by their speed. What it
stored is used when layers are prepared (`layers.prepared`): where this machine multiplies decoded floats faster than packed
integers, a weight is decoded once, as far as ``DIFLOAT_DECODED_MB`` allows.
"""

from __future__ import annotations

import json
import math
import os
import platform
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from difloat.cache_entries import whole_file
from difloat.kernels import dispatch, native_int8, native_library, native_prepared
from difloat.kernels.geometry import Geometry
from difloat.numbers.packing import packed_channels
from difloat.plan.specs import Part, QuantSpec
from difloat.plan.validation import plain
from difloat.plan.weight import Inputs, PackedWeight, Weight

SLOWEST = 0.95  # of float's speed at `MANY_TOKENS` tokens and more
SLOWEST_FEW = 0.8  # of it below
MANY_TOKENS = 64
_FEWEST_ROWS, _MOST_ROWS = 64, 512  # of a weight that is timed
_PRODUCTS = 1 << 30  # of a call that is timed, as far as the fewest rows allow: tens of milliseconds
_FEWEST_CHANNELS, _MOST_CHANNELS, _MOST_TOKENS = (
    64,
    4096,
    1024,
)  # more of either take as long for each product
_REPEATS, _LEAST_S = 5, 2e-3  # turns, and seconds of a turn, of which the fastest counts
_FORMAT_VERSION = 1


@dataclass(frozen=True)
class Kind:
    """A class of layers whose products take the same time.

    Attributes:
        weight: The spec of the weight, or None for a float layer.
        inputs: The spec of the input, or None where it stays as it is.
        channels: The input channels, as a class.
        tokens: The tokens or pixels of a call, as a class.
        kernel: The size of a convolution's kernel, or () for a linear layer.
        dtype: The dtype of the input.
    """

    weight: QuantSpec | None
    inputs: QuantSpec | None
    channels: int
    tokens: int
    kernel: tuple[int, ...]
    dtype: torch.dtype

    @property
    def key(self) -> str:
        """The kind as text. Tables of one width whose levels reach about as far take the same time."""
        weight, inputs = (None if spec is None else plain(spec) for spec in (self.weight, self.inputs))
        if self.weight is not None and weight is not None and (levels := self.weight.format.levels):
            apart = round(math.log2(max(levels) - min(levels)))
            weight["format"] = f"table of {self.weight.format.bits} bits, 2**{apart} apart"
        return json.dumps([weight, inputs, self.channels, self.tokens, list(self.kernel), str(self.dtype)])


def kind_of(part: Part | None, channels: int, tokens: int, kernel: Sequence[int], dtype: torch.dtype) -> Kind:
    """The kind of a layer.

    Args:
        part: The specs of the layer, or None for the float layer of the same shape.
        channels: The input channels.
        tokens: The tokens or pixels of a call.
        kernel: The size of a convolution's kernel, or () for a linear layer.
        dtype: The dtype of the input.
    """
    wide = min(max(2 ** round(math.log2(channels)), _FEWEST_CHANNELS), _MOST_CHANNELS)
    many = min(4 ** round(math.log(max(tokens, 1), 4)), _MOST_TOKENS)
    weight, inputs = (None, None) if part is None else (part.weight, part.activation)
    return Kind(weight, inputs, wide, many, tuple(kernel), dtype)


def seconds(kind: Kind, rows: int, channels: int, tokens: int) -> float | None:
    """The expected seconds of a call of a layer of a kind, or None if its kind was not measured here.

    Args:
        kind: The kind, as `kind_of` says.
        rows: The output channels.
        channels: The input channels.
        tokens: The tokens or pixels.
    """
    found = _stored().get(kind.key)
    return None if found is None else found * rows * channels * tokens * math.prod(kind.kernel)


def slowest(tokens: int) -> float:
    """The least speed that a packed layer may have here, where the float layer's is 1."""
    return SLOWEST if tokens >= MANY_TOKENS else SLOWEST_FEW


def slower_than_float(weight: Weight, x: Tensor) -> bool:
    """Whether a weight of one part was measured here to be slower, packed, than the rule of this project allows.

    Args:
        weight: The weight of one part. Rows of several widths take the sum of their times.
        x: The part's input.
    """
    channels, kernel = weight.part.channels, tuple(weight.kernel)
    tokens = x.numel() // channels if channels else 0
    times = [
        seconds(kind_of(piece.part, channels, tokens, kernel, x.dtype), piece.rows, channels, tokens)
        for piece in weight.bands
    ]
    floating = seconds(
        kind_of(None, channels, tokens, kernel, x.dtype), weight.out_channels, channels, tokens
    )
    known = [time for time in times if time is not None]
    if floating is None or len(known) < len(times):
        return False
    return floating < slowest(tokens) * sum(known)


def measure(kinds: Iterable[Kind], say: Callable[[str], object]) -> None:
    """Measure the kinds that were not measured on this machine yet, and keep their times in the user's cache.

    Args:
        kinds: What a plan may ask for.
        say: Is told in a sentence what is measured, if anything is.

    Raises:
        OSError: if the cache cannot be written.
    """
    known = dict(_stored())
    missing = {kind.key: kind for kind in kinds if kind.key not in known}
    if not missing:
        return
    say(f"measuring {len(missing)} kinds of layers on this machine, kept in {cache_file()}")
    with torch.no_grad():
        for key, kind in missing.items():
            known[key] = _measured(kind)
    path = cache_file()
    path.parent.mkdir(parents=True, exist_ok=True)
    entries = {"version": _FORMAT_VERSION, "machine": machine(), "seconds_per_product": known}
    with whole_file(path) as partial:
        partial.write_text(json.dumps(entries, indent=1) + "\n", encoding="utf-8")
    _read.cache_clear()
    dispatch.prepare_anew()


def origin() -> str:
    """A sentence about where the times come from that choose between packed and decoded layers here."""
    if count := len(_stored()):
        return f"times of {count} kinds of layers measured on this machine, {cache_file()}"
    return f"no times of this machine, the order of backends is that of {dispatch.measured_on()}"


def machine() -> str:
    """What a time depends on besides the kind of layer: processor, unit of the native library, threads, and torch."""
    return ", ".join(
        [
            _processor(),
            f"unit {native_library.unit() or 'none'}",
            f"library {native_library.ABI}",
            f"{torch.get_num_threads()} threads",
            f"torch {torch.__version__}",
        ]
    )


@cache
def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def cache_file() -> Path:
    """The file of the times of this machine, below ``DIFLOAT_CACHE`` or the user's cache folder."""
    root = os.environ.get("DIFLOAT_CACHE") or os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    name = "".join(c if c.isalnum() else "-" for c in machine().lower())
    return Path(root) / "difloat" / f"latency-{name}.json"


def _stored() -> dict[str, float]:
    return _read(cache_file())


@cache
def _read(path: Path) -> dict[str, float]:
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if found["version"] != _FORMAT_VERSION or found["machine"] != machine():
            return {}
        return {str(key): float(value) for key, value in found["seconds_per_product"].items()}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"file of measured times must be JSON as written, got {path}; delete it") from error


def _measured(kind: Kind) -> float:
    """Seconds of one product of a layer of a kind."""
    call = _float_call(kind) if kind.weight is None else _packed_call(kind)
    call()  # what is made once is not timed
    times = []
    for _ in range(_REPEATS):
        start, count = time.perf_counter(), 0
        while count == 0 or time.perf_counter() - start < _LEAST_S:
            call()
            count += 1
        times.append((time.perf_counter() - start) / count)
    return min(times) / (_rows(kind) * _products_of_row(kind))


def _products_of_row(kind: Kind) -> int:
    return kind.channels * _tokens(kind) * math.prod(kind.kernel)


def _rows(kind: Kind) -> int:
    return max(_FEWEST_ROWS, min(_MOST_ROWS, _PRODUCTS // _products_of_row(kind)))


def _side(kind: Kind) -> int:
    """The side of a square picture with about as many pixels as the kind has tokens."""
    return max(round(kind.tokens**0.5), max(kind.kernel))


def _tokens(kind: Kind) -> int:
    return _side(kind) ** 2 if kind.kernel else kind.tokens


def _input(kind: Kind) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    shape = (1, kind.channels, _side(kind), _side(kind)) if kind.kernel else (kind.tokens, kind.channels)
    x = torch.randn(shape, generator=generator).to(kind.dtype)
    return x.to(memory_format=torch.channels_last) if kind.kernel else x


def _geometry(kind: Kind) -> Geometry:
    """Padding that keeps the size of an odd kernel's picture."""
    vertical, horizontal = kind.kernel
    return Geometry(padding=(vertical // 2, horizontal // 2))


def _float_call(kind: Kind) -> Callable[[], object]:
    generator, x = torch.Generator().manual_seed(1), _input(kind)
    weight = torch.randn((_rows(kind), kind.channels, *kind.kernel), generator=generator).to(kind.dtype)
    if not kind.kernel:
        return lambda: functional.linear(x, weight)
    last, geometry = weight.to(memory_format=torch.channels_last), _geometry(kind)
    return lambda: geometry.convolve(x, last)


def _packed_call(kind: Kind) -> Callable[[], object]:
    assert kind.weight is not None
    generator, spec, x = torch.Generator().manual_seed(1), kind.weight, _input(kind)
    part = Part(kind.channels, spec, kind.inputs)
    rows = _rows(kind)
    shape = (rows, packed_channels(kind.channels, spec.format.bits), *kind.kernel)
    codes = torch.randint(256, shape, generator=generator, dtype=torch.uint8)
    scale = torch.full((spec.scale_count(rows, kind.channels),), 0.01)
    zero = torch.zeros_like(scale) if spec.zero_point else None
    weight = Weight(((PackedWeight(codes, scale, zero, part),),))
    static = kind.inputs is not None and not kind.inputs.online
    step = torch.full((1,), 0.05) if static else None
    ranged = static and kind.inputs is not None and kind.inputs.zero_point
    own = Inputs(step, torch.zeros(1) if ranged else None)
    module, geometry = dispatch.choose_for(weight, x), _geometry(kind) if kind.kernel else None
    if module is native_int8:  # layers call it prepared
        call = (
            native_prepared.linear(weight, kind.dtype)
            if geometry is None
            else native_prepared.conv2d(weight, kind.dtype, geometry)
        )
        # A prepared call holds no tensor of the weight, so this one does.
        return lambda: (call(x, own.scale, own.zero_point, None), weight)
    if geometry is None:
        return lambda: module.linear(x, weight, own, None)
    return lambda: module.conv2d(x, weight, own, None, geometry)
