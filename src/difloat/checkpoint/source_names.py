"""The names that a model's tensors had in the single file that it came from, kept beside its config.

`source_names.json` holds ``{"version": 1, "tensors": {SOURCE: {"shape": [...], "rows": [[NAME, start, stop], ...]}}, "unused":
{SOURCE: {"shape", "dtype", "base64"}}}``: the tensor SOURCE of the file is made of rows (entries of the first axis) of the
model's tensors, one after the other, and small tensors that the model has no place for are kept as they were.
`interchange.source_names` finds and follows it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from difloat.checkpoint.layout import CheckpointError, read_json, write_json

FILE = "source_names.json"
VERSION = 1
_ATTRIBUTE = "difloat_source_names"


def keep(model: nn.Module, names: Mapping[str, Any]) -> None:
    """Note the names on a model, for `write`."""
    setattr(model, _ATTRIBUTE, dict(names))


def kept(model: nn.Module) -> Mapping[str, Any] | None:
    """What `keep` noted, or None."""
    found: Mapping[str, Any] | None = vars(model).get(_ATTRIBUTE)
    return found


def write(model: nn.Module, directory: Path) -> None:
    """Write what is noted on a model into its directory, if anything is."""
    if (names := kept(model)) is not None:
        write_json(directory / FILE, dict(names))


def read(directory: Path) -> Mapping[str, Any] | None:
    """What `write` has written, or None.

    Raises:
        CheckpointError: if the file is damaged or of another version.
    """
    if not (directory / FILE).is_file():
        return None
    names = read_json(directory / FILE)
    tensors, unused = names.get("tensors"), names.get("unused")
    whole = isinstance(unused, dict) and isinstance(tensors, dict) and all(map(_is_entry, tensors.values()))
    if names.get("version") != VERSION or not whole:
        raise CheckpointError(f"{FILE} must be of version {VERSION} and list tensors; download it again")
    return names


def _is_entry(entry: object) -> bool:
    if not isinstance(entry, dict) or set(entry) != {"shape", "rows"}:
        return False
    sizes, rows = entry["shape"], entry["rows"]
    if not isinstance(sizes, list) or not isinstance(rows, list) or not rows:
        return False
    pieces = [row for row in rows if isinstance(row, list) and len(row) == 3]
    numbers = [*sizes, *(number for piece in pieces for number in piece[1:])]
    return (
        len(pieces) == len(rows)
        and all(isinstance(piece[0], str) for piece in pieces)
        and all(type(number) is int and number >= 0 for number in numbers)
    )
