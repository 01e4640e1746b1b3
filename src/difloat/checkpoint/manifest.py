"""The manifest that proves a saved directory later.

`difloat.json` at the top of a saved directory lists size and SHA-256 of every other file in it.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Annotated, Any, Literal

from difloat.checkpoint.layout import CheckpointError, is_file_name, read_json
from difloat.plan.validation import Rule, Whole, read, record, shown

MANIFEST = "difloat.json"
MANIFEST_VERSION = 1
_READ_BYTES = 1 << 20


@record("entry of a manifest")
class Entry:
    """What the manifest says of one file.

    Attributes:
        bytes: The size of the file.
        sha256: The SHA-256 of its content, in hexadecimal digits.
    """

    bytes: Whole
    sha256: str


@record("manifest")
class _Manifest:
    # The entries are read one by one, so that an error can name the file.
    version: Annotated[Literal[1], Rule("be 1")]
    files: dict[str, Any]


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


def manifest_entries(root: Path) -> dict[str, Entry]:
    """The entries of the manifest by file name; no file is looked at.

    Raises:
        FileNotFoundError: if the manifest is missing.
        CheckpointError: if it is damaged.
    """
    data = read_json(root / MANIFEST)
    try:
        files = read(_Manifest, data).files
    except ValueError as error:
        raise CheckpointError(
            f"{MANIFEST} must be of version {MANIFEST_VERSION} and list files, but {error!s:.200}; download it again"
        ) from error
    found = {}
    for name, entry in files.items():
        parts = Path(name).parts
        inside = (
            parts and not Path(name).is_absolute() and ".." not in parts and all(map(is_file_name, parts))
        )
        if not inside:
            raise CheckpointError(
                f"{MANIFEST} must list files of the checkpoint with bytes and sha256, got {name!r:.200}; download it again"
            )
        try:
            found[name] = read(Entry, entry)
        except ValueError as error:
            raise CheckpointError(
                f"{MANIFEST} must list files of the checkpoint with bytes and sha256, got {name!r:.200}, where {error!s:.200}; "
                "download it again"
            ) from error
    return found


def read_manifest(root: Path) -> dict[str, Entry]:
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
        if path.stat().st_size != entry.bytes:
            raise CheckpointError(
                f"{name:.200} must have {shown(entry.bytes)} bytes, got {path.stat().st_size}; download it again"
            )
    return files
