"""Shards of calibration rows: in memory up to a budget, on disk above it or where a cache is wanted.

A cache folder has one subfolder per request, named by the hash of all that decides the rows. In it, `index.json`
says the request and which shards are complete; a shard is a safetensors file with its rows in the header. Files
appear by renaming, so a killed process leaves complete shards and ignored leftovers.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, final

from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from difloat import processes
from difloat.calls import Row

_VERSION = 4  # 2: rows know their trajectory; 3: which all parts share; 4: lists of one tensor per row

Recorded = tuple[list[Row], Mapping[str, Tensor]]  # rows of a shard, and their tensors by content hash


@final
class Shelf:
    """Rows and their tensors by content hash."""

    def __init__(self, cache_dir: str | Path | None, memory_bytes: int, request: Mapping[str, Any]) -> None:
        """Open the subfolder of `request` in `cache_dir`; without `cache_dir` a temporary one when needed."""
        self.rows: list[Row] = []
        self.memory_used_bytes = 0
        self._budget_bytes = memory_bytes
        self._request = {"version": _VERSION, **request}
        self._memory: dict[str, Tensor] = {}
        self._disk: dict[str, Path] = {}
        self._sizes: dict[str, int] = {}
        self._open_files: dict[Path, Any] = {}
        self._shards: dict[str, int] = {}
        self._folder: Path | None = None
        if cache_dir is not None:
            self._open_folder(Path(cache_dir))

    def put(self, shard: str, rows: list[Row], blobs: Mapping[str, Tensor]) -> None:
        """Add rows with their tensors; on disk before this returns, unless there is no cache and memory is left."""
        new_bytes = sum(blob.nbytes for key, blob in blobs.items() if key not in self._sizes)
        fits = self.memory_used_bytes + new_bytes <= self._budget_bytes
        if self._folder is None and not fits:
            self._folder = Path(tempfile.mkdtemp(prefix="difloat-calibration-"))
            weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)
        path = None if self._folder is None else self._folder / f"{shard}.safetensors"
        if path is not None and not self._is_complete(path):
            header = {"rows": json.dumps([asdict(row) for row in rows])}
            self._shards[path.name] = write_atomically(path, save(dict(blobs), metadata=header))
            self._write_index()
        self._keep(rows, {key: blob.nbytes for key, blob in blobs.items()}, None if fits else path, blobs)

    @property
    def shards(self) -> list[str]:
        """Names of the shards of earlier runs."""
        return [Path(name).stem for name in self._shards]

    def find(self, shard: str) -> Recorded | None:
        """Rows and tensors of a shard of an earlier run, to be `put`; None if there is no complete one."""
        path = None if self._folder is None else self._folder / f"{shard}.safetensors"
        if path is None or not self._is_complete(path):
            return None
        with safe_open(path, framework="pt") as file:
            rows = [
                Row(**{**row, "leaves": tuple(row["leaves"])}) for row in json.loads(file.metadata()["rows"])
            ]
            return rows, {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118

    def _is_complete(self, path: Path) -> bool:
        return path.is_file() and self._shards.get(path.name) == path.stat().st_size

    def read(self, key: str) -> Tensor:
        """The tensor of a content hash; treat it as read-only."""
        if key in self._memory:
            return self._memory[key]
        path = self._disk[key]
        if path not in self._open_files:
            self._open_files[path] = safe_open(path, framework="pt")
        tensor: Tensor = self._open_files[path].get_tensor(key)
        return tensor

    def nbytes(self, keys: Iterable[str]) -> int:
        """Bytes of the given tensors, wherever they are."""
        return sum(self._sizes[key] for key in keys)

    def _keep(
        self, rows: list[Row], sizes: Mapping[str, int], path: Path | None, blobs: Mapping[str, Tensor]
    ) -> None:
        """Remember where tensors are: in memory if `path` is None, else in that file."""
        for key, size in sizes.items():
            if key in self._sizes:
                continue
            self._sizes[key] = size
            if path is None:
                self._memory[key] = blobs[key]
                self.memory_used_bytes += size
            else:
                self._disk[key] = path
        self.rows.extend(rows)

    def _open_folder(self, cache_dir: Path) -> None:
        if cache_dir.exists() and not cache_dir.is_dir():
            raise NotADirectoryError(
                f"cache_dir must be a folder, got the file '{cache_dir}'; give another path"
            )
        self._folder = cache_dir / fingerprint(self._request)
        self._folder.mkdir(parents=True, exist_ok=True)
        index = self._folder / "index.json"
        if index.is_file():
            self._shards = dict(json.loads(index.read_text(encoding="utf-8"))["shards"])

    def _write_index(self) -> None:
        assert self._folder is not None
        content = {"request": self._request, "shards": self._shards}
        write_atomically(self._folder / "index.json", json.dumps(content, indent=1).encode())


def open_shelf(cache_dir: str | Path | None, memory_bytes: int, request: Mapping[str, Any]) -> Shelf:
    """An empty shelf; of several processes only the main one has the cache, and all end if it cannot open it."""
    with processes.together():
        return Shelf(cache_dir if processes.is_main() else None, memory_bytes, request)


def record_shards(
    shelf: Shelf, batches: Mapping[str, int], record: Callable[[int], Recorded]
) -> list[Recorded]:
    """The contents of some shards, on every process: those of an earlier run; the others are recorded by a process each.

    Args:
        shelf: May hold shards of an earlier run, on the main process.
        batches: The batch of every shard; at most as many as there are processes.
        record: Draws a batch.
    """
    found = processes.on_main(lambda: [shelf.find(shard) for shard in batches])
    numbers = list(batches.values())

    def mine() -> Recorded | None:
        place = processes.number()
        return record(numbers[place]) if place < len(numbers) and found[place] is None else None

    fresh = processes.shared(mine)
    return [recorded for pair in zip(found, fresh, strict=False) if (recorded := pair[0] or pair[1])]


def fingerprint(request: Mapping[str, Any]) -> str:
    """Hash of plain data, short enough for a folder name."""
    return hashlib.blake2b(json.dumps(request, sort_keys=True).encode(), digest_size=8).hexdigest()


def write_atomically(path: Path, content: bytes) -> int:
    """Write a file under a temporary name, then rename it; returns its bytes.

    Raises:
        OSError: The disk is full; nothing is left behind.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        full = OSError(
            f"the disk must have {len(content) / 2**20:.1f} MiB free for '{path}', got a full one; free some "
            "space and run again, finished shards are kept"
        )
        full.errno = error.errno
        raise full from error
    finally:
        temporary.unlink(missing_ok=True)
    return len(content)
