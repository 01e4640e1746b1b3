"""Saving, loading and verifying checkpoints; knows nothing of methods and recipes."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Sequence
from types import ModuleType

from difloat.io.checkpoint import load, mark_quantized, plan_of, save, unmark_quantized
from difloat.io.layout import CheckpointError
from difloat.io.verify import Finding, verify

__all__ = [
    "CheckpointError",
    "Finding",
    "load",
    "mark_quantized",
    "plan_of",
    "register_with_diffusers",
    "save",
    "unmark_quantized",
    "verify",
]

_QUANTIZER_TABLE = "diffusers.quantizers.auto"


def register_with_diffusers() -> None:
    """Make plain `from_pretrained` of diffusers understand difloat checkpoints, in either order of import.

    diffusers has no entry point for quantizers, only two dictionaries. If they are loaded they get their entry now,
    otherwise right after diffusers loads them; diffusers itself is never imported here. Calling it again does nothing.
    """
    if _QUANTIZER_TABLE in sys.modules:
        from difloat.io.diffusers import register

        register()
    elif not any(isinstance(finder, _RegisterOnImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _RegisterOnImport())


class _RegisterOnImport(importlib.abc.MetaPathFinder):
    """Waits for the module with diffusers' dictionaries, lets it load as usual, registers, and is gone."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != _QUANTIZER_TABLE:
            return None
        sys.meta_path.remove(self)
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is None or spec.loader is None:
            return spec
        load_module = spec.loader.exec_module

        def load_and_register(module: ModuleType) -> None:
            load_module(module)
            register_with_diffusers()

        spec.loader.exec_module = load_and_register  # type: ignore[method-assign]
        return spec
