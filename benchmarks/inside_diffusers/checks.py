"""Checks of what came out of a step of `benchmarks/integration.py`."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from libraries import Case
from safetensors.torch import load_file
from torch import Tensor, nn


class Different(Exception):
    """The step ran, and the result is another one than promised."""


class NotOffered(Exception):
    """The library says that it does not do this."""


def distance(found: Tensor, expected: Tensor) -> float:
    """Relative distance of two outputs; `Different` if one is not finite."""
    if not found.isfinite().all():
        raise Different("output is not finite")
    return float((found.float() - expected.float()).norm() / expected.float().norm())


def same(found: Tensor, expected: Tensor, what: str = "output") -> None:
    """`Different` unless equal bit for bit."""
    if not torch.equal(found, expected):
        raise Different(f"{what} differs by {distance(found, expected):.2%}")


def same_tensors(found: dict[str, Tensor], expected: dict[str, Tensor], what: str) -> None:
    """`Different` unless names and values are equal; floating-point values may have another dtype."""
    if found.keys() != expected.keys():
        raise Different(f"there are {len(found)} tensors of {what} instead of {len(expected)}")
    changed = [name for name, tensor in found.items() if not equal(tensor, expected[name])]
    if changed:
        raise Different(f"{len(changed)} of {len(found)} tensors of {what} changed")


def equal(left: Tensor, right: Tensor) -> bool:
    """Whether all values are."""
    if left.is_floating_point() and right.is_floating_point():
        left, right = left.double(), right.double()
    return left.dtype == right.dtype and torch.equal(left, right)


def hashes(directory: Path) -> str:
    """SHA-256 over the safetensors files of a directory, by name."""
    files = sorted(directory.glob("*.safetensors"))
    if not files:
        raise Different("no safetensors file was written")
    return hashlib.sha256(b"".join(hashlib.sha256(f.read_bytes()).digest() for f in files)).hexdigest()


def stored(directory: Path) -> dict[str, Tensor]:
    """All tensors in the safetensors files of a directory."""
    return {name: t for file in directory.glob("*.safetensors") for name, t in load_file(file).items()}


def saved(case: Case, model: nn.Module, name: str = "saved", **arguments: Any) -> Path:
    """The directory into which a model was saved by diffusers."""
    model.save_pretrained(case.folder / name, **arguments)
    return case.folder / name
