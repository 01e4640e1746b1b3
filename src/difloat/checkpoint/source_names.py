"""The names that a model's tensors had in the single file that it came from, kept beside its config.

`source_names.json` holds ``{"version": 1, "tensors": {SOURCE: {"shape": [...], "rows": [[NAME, start, stop], ...]}}, "unused":
{SOURCE: {"shape", "dtype", "base64"}}}``: the tensor SOURCE of the file is made of rows (entries of the first axis) of the
model's tensors, one after the other, and small tensors that the model has no place for are kept as they were.
`interchange.source_names` finds and follows it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field
from torch import nn

from difloat.checkpoint.layout import CheckpointError, read_json, write_json
from difloat.plan import validation
from difloat.plan.validation import TUPLE, Rule, Whole, record

FILE = "source_names.json"
VERSION = 1


@record("tensor of source_names.json")
class _Rows:
    shape: list[Whole]
    rows: Annotated[list[Annotated[tuple[str, Whole, Whole], TUPLE]], Field(min_length=1)]


@record("unused tensor of source_names.json")
class _Unused:
    shape: list[Whole]
    dtype: str
    base64: str


@record("source_names.json")
class _Names:
    version: Annotated[Literal[1], Rule("be 1")]
    tensors: dict[str, _Rows]
    unused: dict[str, _Unused]


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
    try:
        validation.read(_Names, names)
    except ValueError as error:
        raise CheckpointError(
            f"{FILE} must be of version {VERSION} and list tensors, but {error!s:.200}; download it again"
        ) from error
    return names
