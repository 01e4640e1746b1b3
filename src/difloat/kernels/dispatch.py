"""The choice of the backend that computes a part of a layer: by name, by what a backend supports, and by measured speed.

>>> with use_backend("reference"):
...     backend()
'reference'

``DIFLOAT_BACKEND`` or `set_backend` names one. ``reference`` is the definition, ``torch`` uses int8 products of torch, ``cpu``
is the native library, ``decoded`` decodes with that library and multiplies with torch, ``triton`` is for GPUs, ``mps`` for
those of Apple. A named backend computes every layer that it supports, and the reference computes the others. ``auto`` takes for
every shape the one that was fastest where `dispatch.json` was measured, and on GPUs the one that is for them. No backend is
chosen by catching an error.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from importlib import resources
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from difloat.kernels import mps, native_decode, native_int8, native_library, reference, torch_int8
from difloat.kernels.pieces import shapes
from difloat.kernels.triton import backend as triton
from difloat.plan.specs import Part
from difloat.plan.weight import Weight

BACKENDS: dict[str, ModuleType] = {
    "reference": reference,
    "torch": torch_int8,
    "cpu": native_int8,
    "decoded": native_decode,
    "triton": triton,
    "mps": mps,
}
"""The backends by name. A new one of the CPU needs a row here and in `dispatch.json`, others one in `_OF_DEVICES`."""

_OF_DEVICES = {
    "mps": ("mps", "reference")
}  # from the fastest to the slowest; devices that are not named take Triton

_VARIABLE = "DIFLOAT_BACKEND"
_MOST_CHOICES = 1 << 14  # kept at a time
_chosen: str | None = None
_from_variable: str | None = None  # read once, since the environment is slow to ask
# Grows with every change of the backend, so that calls that were prepared for another one are prepared again.
epoch = 0


def available() -> list[str]:
    """The names of the backends that can run on this machine.

    >>> "reference" in available()
    True
    """
    return [name for name in BACKENDS if _runs_here(name)]


def _runs_here(name: str) -> bool:
    if name == "triton":
        return triton.available(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    if name == "mps":
        return mps.available()
    return name not in ("cpu", "decoded") or native_library.unit() is not None


def backend() -> str:
    """The name of the backend in force."""
    global _from_variable
    if _chosen is not None:
        return _chosen
    if _from_variable is None:
        _from_variable = _checked(os.environ.get(_VARIABLE, "auto"), _VARIABLE)
    return _from_variable


def set_backend(name: str | None) -> None:
    """Choose the backend of all quantized layers.

    >>> set_backend("reference")
    >>> set_backend(None)

    Args:
        name: One of `available`, or "auto". None goes back to ``DIFLOAT_BACKEND``, which is read again, or to "auto".

    Raises:
        ValueError: if there is no backend of that name, or it cannot run here.
    """
    global _chosen, _from_variable, epoch
    _chosen = None if name is None else _checked(name, "backend")
    _from_variable = _from_variable if _chosen is not None else None
    epoch += 1


@contextmanager
def use_backend(name: str | None) -> Iterator[None]:
    """Compute quantized layers with one backend inside a ``with`` block, and as before after it.

    >>> import difloat
    >>> with difloat.use_backend("reference"):
    ...     pass  # layers called here are computed in plain torch

    Args:
        name: The name that `set_backend` takes.

    Raises:
        ValueError: if there is no backend of that name, or it cannot run here.
    """
    global _chosen, epoch
    before = _chosen
    set_backend(name)
    try:
        yield
    finally:
        _chosen = before
        # Prepared calls of the block must not outlive it.
        epoch += 1


@cache
def _checked(name: str, what: str) -> str:
    known = ["auto", *BACKENDS]
    if name not in known:
        raise ValueError(f"{what} must be one of {', '.join(known)}, got {name!r}")
    if name != "auto" and name not in available():
        why = "the native library was not built"
        if name == "triton":
            why = "there is no GPU, or Triton is not installed"
        elif name == "mps":
            why = "torch sees no GPU of Apple's"
        elif native_library.built():
            why = "the native library has no unit for this machine"
        raise ValueError(f"{what} must be one of {', '.join(available())} here, got {name!r}: {why}")
    return name


def prepare_anew() -> None:
    """Have calls of layers prepared anew, since what they were prepared by has changed."""
    global epoch
    epoch += 1


def measured_on() -> str:
    """The machine that the order of backends in `dispatch.json` was measured on."""
    return str(_table()["measured_on"])


def choose(part: Part, weight_shape: Sequence[int], x: Tensor) -> ModuleType:
    """The module that computes a part of a layer.

    Args:
        part: The formats and granularities of the part.
        weight_shape: The shape [o, i, *k] of the part's float weight.
        x: The part's input.
    """
    return _first(weight_shape, x, lambda module: bool(module.supports(part, weight_shape, x)))


def choose_rows(parts: Sequence[Part], weight_shapes: Sequence[Sequence[int]], x: Tensor) -> ModuleType:
    """The module that computes a part whose rows have several widths. It supports every one of the given bands."""
    pairs = list(zip(parts, weight_shapes, strict=True))
    return _first(
        weight_shapes[0], x, lambda module: all(module.supports(part, shape, x) for part, shape in pairs)
    )


def _first(weight_shape: Sequence[int], x: Tensor, supports: Callable[[ModuleType], bool]) -> ModuleType:
    name = backend()
    names: tuple[str, ...] = (name,)
    if name == "auto":
        names = _OF_DEVICES.get(x.device.type, ("triton", "reference"))
        if x.device.type == "cpu":
            names = _ranking(len(weight_shape), _rows(x, weight_shape))
    for candidate in names:
        if candidate in _here() and supports(BACKENDS[candidate]):
            return BACKENDS[candidate]
    return reference


# Remembered, because the product of a small layer takes no longer than the choice.
_choices: dict[tuple[object, ...], ModuleType] = {}


def choose_for(weight: Weight, x: Tensor) -> ModuleType:
    """`choose_rows` for a weight of one part, with a memory whose key holds everything that backends look at.

    Args:
        weight: The weight of one part.
        x: The part's input.
    """
    of_bands = shapes(weight)
    key = (weight.text, backend(), tuple(of_bands), x.shape, x.dtype, x.device)
    found = _choices.get(key)
    if found is None:
        if len(_choices) >= _MOST_CHOICES:
            _choices.clear()
        parts = [piece.part for piece in weight.bands]
        found = _choices[key] = choose_rows(parts, of_bands, x)
    return found


@cache
def _here() -> frozenset[str]:
    return frozenset(available())


def _rows(x: Tensor, weight_shape: Sequence[int]) -> int:
    return x.numel() // weight_shape[1] if weight_shape[1] else 0


@cache
def _table() -> dict[str, Any]:
    text = resources.files("difloat.kernels").joinpath("dispatch.json").read_text(encoding="utf-8")
    return dict(json.loads(text))


@cache
def classes(axes: int) -> tuple[int, ...]:
    """The numbers of tokens or pixels from which on another ranking of backends holds, for weights with so many axes."""
    entries = _table()["linear" if axes == 2 else "conv2d"]
    return tuple(entry["rows_below"] for entry in entries if entry["rows_below"] is not None)


def _ranking(axes: int, rows: int) -> tuple[str, ...]:
    """Backends from fastest to slowest for a number of tokens (or pixels), as measured."""
    entries = _table()["linear" if axes == 2 else "conv2d"]
    return next(
        tuple(entry["order"])
        for entry in entries
        if entry["rows_below"] is None or rows < entry["rows_below"]
    )
