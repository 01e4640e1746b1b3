"""Entries of a cache: files of tensors that carry their key and the hash of all their bytes.

Whatever happened to an entry since it was written (cut short, a byte flipped, another file in its place) counts as if it
were missing, with a warning in one sentence, so a run makes it again and ends as if nothing had happened.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import secrets
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TypeVar

from rich.filesize import decimal
from safetensors.torch import load, save
from torch import Tensor

_HEX = 64
_ENTRY = "difloat"  # one text, for safetensors writes several in any order, and equal runs give equal bytes
_PLACE = re.compile(rb'"difloat":"{\\"blake2b\\":\\"([0-9a-f]{64})\\"')
Facts = TypeVar("Facts")
_LEFTOVER_S = 3600.0  # no entry takes that long to write: what is older was left by a killed process


class CacheWarning(UserWarning):
    """An entry of a cache is damaged or foreign, and is made again."""


def write_entry(path: Path, key: str, tensors: Mapping[str, Tensor], facts: Mapping[str, str]) -> None:
    """Write tensors (on the CPU) and texts as an entry that `read_entry` proves later. It appears whole or not at all.

    Args:
        path: The path of the file, whose folder must exist.
        key: The identity of the entry. An entry of another key is not taken for it, wherever it lies.
        tensors: The tensors by name.
        facts: The texts by name.

    Raises:
        OSError: if the disk is full. Nothing is left behind.
    """
    text = json.dumps({"blake2b": "0" * _HEX, "facts": dict(facts)}, separators=(",", ":"))
    content = save(dict(tensors), metadata={_ENTRY: text})
    start, end = _place(content)
    write_atomically(path, content[:start] + _digest(key, content).encode() + content[end:])


def read_entry(
    path: Path, key: str, parse: Callable[[dict[str, str]], Facts]
) -> tuple[dict[str, Tensor], Facts] | None:
    """The tensors and texts of an entry with this key, or None if there is none.

    Args:
        path: The path of the file.
        key: The key that it was written with.
        parse: Makes of the texts what is returned, such as `dict`. Its ValueError says that another version wrote them.

    An entry that is damaged, or that `parse` does not know, counts as if it were missing, with a `CacheWarning`.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return None
    found = _PLACE.search(content)
    if found is None or found.group(1).decode() != _digest(key, content):
        _warn(
            f"cache entry {path} must hold what was written to it, but is damaged or of another run; it is made again"
        )
        return None
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    facts = json.loads(header["__metadata__"][_ENTRY])["facts"]
    try:
        return load(content), parse(facts)
    except ValueError as error:
        _warn(f"cache entry {path} must be of this version of difloat, but {error!s:.200}; it is made again")
        return None


def _warn(text: str) -> None:
    warnings.warn(text, CacheWarning, stacklevel=3)


def _place(content: bytes) -> tuple[int, int]:
    """The place of the hash in an entry."""
    found = _PLACE.search(content)
    assert found is not None
    return found.span(1)


def _digest(key: str, content: bytes) -> str:
    """The hash of an entry's key and of all its bytes, with those of the hash taken as zeros."""
    start, end = _place(content)
    digest = hashlib.blake2b(f"{key}\n".encode(), digest_size=_HEX // 2)
    whole = memoryview(content)
    for piece in (whole[:start], b"0" * (end - start), whole[end:]):
        digest.update(piece)
    return digest.hexdigest()


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A name beside a path to write to. On success the file takes the place of the path, otherwise nothing is left."""
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file under a temporary name, then rename it. Leftovers of killed processes are removed.

    Raises:
        OSError: if the disk is full. Nothing is left behind.
    """
    for leftover in path.parent.glob(f".{path.name}.*"):
        with contextlib.suppress(FileNotFoundError):  # another run may have removed it
            if leftover.stat().st_mtime < time.time() - _LEFTOVER_S:
                leftover.unlink()
    try:
        with whole_file(path) as partial:
            partial.write_bytes(content)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        full = OSError(
            f"the disk must have {decimal(len(content))} free for '{path}', got a full one; free some "
            "space and run again, finished shards are kept"
        )
        full.errno = error.errno
        raise full from error
