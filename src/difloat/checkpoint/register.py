"""Registration with diffusers and transformers, in either order of import."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Sequence
from importlib import import_module
from types import ModuleType

_CONFIG = "difloat.checkpoint.config"


_TABLES = {
    "diffusers.quantizers.auto": "difloat.checkpoint.diffusers_quantizer",
    "transformers.quantizers.auto": "difloat.checkpoint.transformers_quantizer",
}


def register() -> None:
    """Make plain `from_pretrained` of diffusers and transformers understand difloat, in either order of import.

    They have no entry points for quantizers, only dictionaries. If these are loaded they get their entries now, otherwise
    right after the library loads them; neither library is imported here. Calling it again does nothing.
    """
    for table in _TABLES:
        if table in sys.modules:
            _enter(table)
        elif not any(
            isinstance(finder, _RegisterOnImport) and finder.table == table for finder in sys.meta_path
        ):
            sys.meta_path.insert(0, _RegisterOnImport(table))


def _enter(table: str) -> None:
    """Import our side of a library, which registers, unless our config is half-made, for that ends with `register`."""
    if _CONFIG not in sys.modules or hasattr(sys.modules[_CONFIG], "DifloatConfig"):
        import_module(_TABLES[table])


class _RegisterOnImport(importlib.abc.MetaPathFinder):
    """Waits for the module with a library's dictionaries, lets it load as usual, registers, and is gone."""

    def __init__(self, table: str) -> None:
        self.table = table

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """Find the awaited module as usual, with a loader that registers difloat after it has run."""
        if fullname != self.table:
            return None
        sys.meta_path.remove(self)
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is None or spec.loader is None:
            return spec
        load_module = spec.loader.exec_module

        def load_and_register(module: ModuleType) -> None:
            load_module(module)
            _enter(fullname)

        spec.loader.exec_module = load_and_register  # type: ignore[method-assign]
        return spec
