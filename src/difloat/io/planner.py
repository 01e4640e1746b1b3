"""Where loading gets its decisions from: a module with `settings` and `decide`, named by whoever puts the package together.

Reading and writing checkpoints knows nothing of methods, but quantizing while a model loads needs one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

_source: list[Callable[[], Any]] = []


def provide(source: Callable[[], Any]) -> None:
    """Name the function that imports the module; again replaces it."""
    _source[:] = [source]


def load() -> Any:
    """The module; see `methods.datafree`."""
    return _source[0]()
