"""Shards of calibration rows, in memory up to a budget, and on disk above it or where a cache is wanted.

A cache folder has one subfolder per request, named by the hash of all that decides the rows. In it, `index.json` tells people
the request. A shard is an entry of the cache (`cache_entries`), a safetensors file with its rows in the header. Files appear by
renaming, so a killed process leaves complete shards and leftovers that are ignored. Damaged shards are drawn again.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, final

from safetensors import safe_open
from torch import Tensor

from difloat import distributed
from difloat.cache_entries import read_entry, write_atomically, write_entry
from difloat.calibration.rows import Row, content_hash
from difloat.plan.validation import read_texts, record

_VERSION = 4  # 2: rows know their trajectory; 3: which all parts share; 4: lists of one tensor per row, shards know their hash

Recorded = tuple[list[Row], Mapping[str, Tensor]]  # rows of a shard, and their tensors by content hash


@record("shard of calibration rows")
class _Texts:
    """What a shard holds beside its tensors."""

    rows: list[Row]


@final
class Shelf:
    """The rows of a request, and their tensors by content hash."""

    def __init__(self, cache_dir: str | Path | None, memory_bytes: int, request: Mapping[str, Any]) -> None:
        """Open the subfolder of a request in `cache_dir`. Without `cache_dir` there is a temporary folder when needed."""
        self.rows: list[Row] = []
        self.memory_used_bytes = 0
        self._budget_bytes = memory_bytes
        self._request = {"version": _VERSION, **request}
        self._memory: dict[str, Tensor] = {}
        self._disk: dict[str, Path] = {}
        self._sizes: dict[str, int] = {}
        self._open_files: dict[Path, Any] = {}
        self._complete: set[Path] = set()  # shards that this process wrote or has proven
        self._proven: set[str] = set()  # tensors read from the disk before
        self._folder: Path | None = None
        if cache_dir is not None:
            self._open_folder(Path(cache_dir))

    def put(self, shard: str, rows: list[Row], blobs: Mapping[str, Tensor]) -> None:
        """Add rows with their tensors. They are on disk before this returns, unless there is no cache and memory is left."""
        new_bytes = sum(blob.nbytes for key, blob in blobs.items() if key not in self._sizes)
        fits = self.memory_used_bytes + new_bytes <= self._budget_bytes
        if self._folder is None and not fits:
            self._folder = Path(tempfile.mkdtemp(prefix="difloat-calibration-"))
            weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)
        path = None if self._folder is None else self._folder / f"{shard}.safetensors"
        if path is not None and path not in self._complete:
            write_entry(path, self._key(path), blobs, {"rows": json.dumps([asdict(row) for row in rows])})
            self._complete.add(path)
            self._write_index()
        self._keep(rows, {key: blob.nbytes for key, blob in blobs.items()}, None if fits else path, blobs)

    @property
    def shards(self) -> list[str]:
        """The names of the shards of earlier runs, including damaged ones."""
        return (
            [] if self._folder is None else sorted(path.stem for path in self._folder.glob("*.safetensors"))
        )

    def find(self, shard: str) -> Recorded | None:
        """The rows and tensors of a shard of an earlier run, which can be `put`, or None if there is no undamaged one."""
        path = None if self._folder is None else self._folder / f"{shard}.safetensors"
        entry = None if path is None else read_entry(path, self._key(path), partial(read_texts, _Texts))
        if path is None or entry is None:
            return None
        self._complete.add(path)
        blobs, texts = entry
        return texts.rows, blobs

    @staticmethod
    def _key(path: Path) -> str:
        return f"{path.parent.name}/{path.name}"

    def read(self, key: str) -> Tensor:
        """The tensor of a content hash, which must not be written to.

        Raises:
            OSError: if the file that holds it was changed while this process is at work.
        """
        if key in self._memory:
            return self._memory[key]
        path = self._disk[key]
        if path not in self._open_files:
            self._open_files[path] = safe_open(path, framework="pt")
        tensor: Tensor = self._open_files[path].get_tensor(key)
        if key not in self._proven:
            if content_hash(tensor) != key:
                raise OSError(
                    f"calibration data must stay as they are during a run, but '{path}' was changed; run again"
                )
            self._proven.add(key)
        return tensor

    def nbytes(self, keys: Iterable[str]) -> int:
        """The bytes of the given tensors, in memory or on disk."""
        return sum(self._sizes[key] for key in keys)

    def _keep(
        self, rows: list[Row], sizes: Mapping[str, int], path: Path | None, blobs: Mapping[str, Tensor]
    ) -> None:
        """Remember where tensors are: in memory if there is no path, else in that file."""
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

    def _write_index(self) -> None:
        assert self._folder is not None
        content = {"request": self._request, "shards": sorted(path.name for path in self._complete)}
        write_atomically(self._folder / "index.json", json.dumps(content, indent=1).encode())


def open_shelf(cache_dir: str | Path | None, memory_bytes: int, request: Mapping[str, Any]) -> Shelf:
    """An empty shelf. Of several processes only the main one has the cache, and all end if it cannot open it."""
    with distributed.together():
        return Shelf(cache_dir if distributed.is_main() else None, memory_bytes, request)


def record_shards(
    shelf: Shelf, batches: Mapping[str, int], record: Callable[[int], Recorded]
) -> list[Recorded]:
    """The contents of some shards on every process. Each shard that no earlier run left is recorded by one process.

    Args:
        shelf: The shelf, which may hold shards of an earlier run on the main process.
        batches: The batch of every shard, at most as many as there are processes.
        record: A function that draws a batch.
    """
    found = distributed.on_main(lambda: [shelf.find(shard) for shard in batches])
    numbers = list(batches.values())

    def mine() -> Recorded | None:
        place = distributed.number()
        return record(numbers[place]) if place < len(numbers) and found[place] is None else None

    fresh = distributed.shared(mine)
    return [recorded for pair in zip(found, fresh, strict=False) if (recorded := pair[0] or pair[1])]


def fingerprint(request: Mapping[str, Any]) -> str:
    """A hash of plain data that is short enough for a folder name."""
    return hashlib.blake2b(json.dumps(request, sort_keys=True).encode(), digest_size=8).hexdigest()
