"""Directories that appear whole or not at all, and the manifest that proves them later.

`difloat.json` at the top of a saved directory lists size and SHA-256 of every other file in it.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from difloat import json_fields
from difloat.io.layout import CheckpointError, is_file_name, read_json

MANIFEST = "difloat.json"
MANIFEST_VERSION = 1
_READ_BYTES = 1 << 20


@contextlib.contextmanager
def whole_directory(target: Path, overwrite: bool, needed_bytes: int) -> Iterator[Path]:
    """Give a fresh directory beside `target` to write into; on success it takes the target's place, otherwise it is gone.

    Args:
        target: Absolute; its parents are made.
        overwrite: Replace a directory that has a manifest; any other one that is not empty is always refused.
        needed_bytes: What will be written, at least.

    Raises:
        CheckpointError: if the target is in use or the disk is full.
    """
    _check_target(target, overwrite)
    partial = target.parent / f".{target.name}.{secrets.token_hex(4)}.partial"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if needed_bytes > shutil.disk_usage(target.parent).free:
            raise OSError(errno.ENOSPC, "too little space")
        partial.mkdir()
        yield partial
        _move(partial, target)
    except (OSError, SafetensorError) as error:
        # safetensors hands on the system's error as text only.
        full = getattr(error, "errno", None) in (
            errno.ENOSPC,
            errno.EDQUOT,
        ) or f"os error {errno.ENOSPC})" in str(error)
        if not full:
            raise
        raise CheckpointError(
            f"disk of {target.parent} must have room for {needed_bytes / 1e6:.1f} MB and more, but is full; "
            "free some space or save elsewhere (nothing was written)"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _check_target(target: Path, overwrite: bool) -> None:
    if target.exists() and not target.is_dir():
        raise CheckpointError(f"{target} must be a directory, but is a file; choose another name")
    if target.is_dir() and any(target.iterdir()):
        if not (target / MANIFEST).is_file():
            raise CheckpointError(
                f"{target} must be empty or a saved difloat checkpoint, but holds other files; choose another directory"
            )
        if not overwrite:
            raise CheckpointError(
                f"{target} must be empty, but holds a difloat checkpoint; choose another directory or pass overwrite=True"
            )


def _move(partial: Path, target: Path) -> None:
    """Rename onto the target; what was there survives until the new directory is in its place."""
    if not target.exists():
        partial.rename(target)
        return
    old = partial.with_suffix(".old")
    target.rename(old)
    try:
        partial.rename(target)
    except BaseException:
        old.rename(target)
        raise
    shutil.rmtree(old, ignore_errors=True)


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as opened:
        while piece := opened.read(_READ_BYTES):
            digest.update(piece)
    return digest.hexdigest()


def write_manifest(directory: Path) -> None:
    """List every file of the directory in its manifest and see all of them to the disk."""
    files = {
        path.relative_to(directory).as_posix(): path
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }
    entries = {name: {"bytes": path.stat().st_size, "sha256": sha256(path)} for name, path in files.items()}
    manifest = directory / MANIFEST
    text = json.dumps({"version": MANIFEST_VERSION, "files": entries}, indent=1, sort_keys=True) + "\n"
    manifest.write_text(text, encoding="utf-8")
    for path in [*files.values(), manifest]:
        path.chmod(manifest.stat().st_mode)  # safetensors lets nobody but the owner read its files
        with path.open("rb") as opened:
            os.fsync(opened.fileno())


def manifest_entries(root: Path) -> dict[str, dict[str, Any]]:
    """The entries of the manifest by file name; no file is looked at.

    Raises:
        FileNotFoundError: if the manifest is missing.
        CheckpointError: if it is damaged.
    """
    manifest = read_json(root / MANIFEST)
    version, files = manifest.get("version"), manifest.get("files")
    if type(version) is not int or version != MANIFEST_VERSION or not isinstance(files, dict):
        raise CheckpointError(
            f"{MANIFEST} must be of version {MANIFEST_VERSION} and list files; download it again"
        )
    for name, entry in files.items():
        parts = Path(name).parts
        inside = (
            parts and not Path(name).is_absolute() and ".." not in parts and all(map(is_file_name, parts))
        )
        whole = isinstance(entry, dict) and set(entry) == {"bytes", "sha256"}
        if not inside or not whole or type(entry["bytes"]) is not int or type(entry["sha256"]) is not str:
            raise CheckpointError(
                f"{MANIFEST} must list files of the checkpoint with bytes and sha256, got {name!r:.200}; download it again"
            )
    return files


def read_manifest(root: Path) -> dict[str, dict[str, Any]]:
    """The entries of the manifest by file name, after a look that every file is there with its size.

    Raises:
        FileNotFoundError: if the manifest or a file is missing.
        CheckpointError: if the manifest is damaged or a file is not whole.
    """
    files = manifest_entries(root)
    for name, entry in files.items():
        path = root / name
        if not path.is_file():
            raise FileNotFoundError(
                f"{name:.200} must be in the checkpoint, but is missing in {root}; download it again"
            )
        if path.stat().st_size != entry["bytes"]:
            raise CheckpointError(
                f"{name:.200} must have {json_fields.shown(entry['bytes'])} bytes, got {path.stat().st_size}; download it again"
            )
    return files
