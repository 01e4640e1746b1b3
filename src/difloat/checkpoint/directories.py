"""Output directories: one run at a time writes into one, it appears whole or not at all, and nothing of the user's is lost.

Beside a directory OUT lie, while a run is at work on it, the lock `.OUT.difloat-lock` and directories `.OUT.xxxxxxxx.partial`
(being written) and `.OUT.xxxxxxxx.old` (what is replaced, for the moment of replacing). A lock ends with its process, so
what lies there when a run has got the lock was left by a killed one: the old directory is put back if nothing took its
place, the rest is removed.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

from rich.filesize import decimal
from safetensors import SafetensorError

from difloat.cache_entries import whole_file
from difloat.checkpoint.layout import CheckpointError
from difloat.checkpoint.manifest import MANIFEST, manifest_entries

REPORT_FILES = ("report.json", "report-pictures.npz", "report.html")
CARD, CARD_MARK = "README.md", "<!-- written by difloat card -->"
_PARTIAL_FILE = re.compile(r"\.(?P<name>.+)\.[0-9a-f]{8}\.partial")
_held: dict[Path, int] = {}  # what threads of this process have reserved


def resolved(path: str | os.PathLike[str], what: str = "output") -> Path:
    """The absolute path behind links.

    Raises:
        CheckpointError: if it is a link that leads back to itself.
    """
    try:
        os.stat(path)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise CheckpointError(
                f"{what} must be a path that leads somewhere, got {os.fspath(path)!r}, a link to itself; choose another"
            ) from error
    return Path(path).resolve()


def check_target(target: Path, overwrite: bool) -> None:
    """Refuse a target that is taken, or whose replacement would cost the user a file.

    Args:
        target: Resolved; it need not exist.
        overwrite: Whether a checkpoint may be replaced.

    Raises:
        CheckpointError: if it is a file, is not empty and not to be replaced, is no checkpoint, or holds a file that is
            neither in its manifest nor difloat's own (report and model card).
    """
    if target.exists() and not target.is_dir():
        raise CheckpointError(f"{target} must be a directory, but is a file; choose another name")
    if not target.is_dir() or not any(target.iterdir()):
        return
    if not (target / MANIFEST).is_file():
        raise CheckpointError(
            f"{target} must be empty or a saved difloat checkpoint, but holds other files; choose another directory"
        )
    if not overwrite:
        raise CheckpointError(
            f"{target} must be empty, but holds a difloat checkpoint; choose another directory or pass overwrite=True"
        )
    if foreign := foreign_files(target):
        more = f" and {len(foreign) - 1} more" if len(foreign) > 1 else ""
        raise CheckpointError(
            f"{target} must hold nothing but a difloat checkpoint to be replaced, but holds {foreign[0]!r}{more}; "
            "move that away or choose another directory"
        )


def foreign_files(directory: Path) -> list[str]:
    """Files (and links) of a checkpoint's directory that neither its manifest lists nor difloat writes beside it.

    Raises:
        CheckpointError: if the manifest cannot be read.
    """
    try:
        listed = manifest_entries(directory)
    except CheckpointError as error:
        raise CheckpointError(
            f"{MANIFEST} must list the files of the checkpoint to be replaced, but is damaged; choose another directory"
        ) from error
    found = []
    for folder, folders, files in os.walk(directory):
        links = [name for name in folders if (Path(folder) / name).is_symlink()]
        for name in [*files, *links]:
            path = Path(folder) / name
            if path.relative_to(directory).as_posix() not in listed and not _is_own(path, directory):
                found.append(path.relative_to(directory).as_posix())
    return sorted(found)


def _is_own(path: Path, directory: Path) -> bool:
    """Whether difloat wrote a file beside the checkpoint: manifest, report, card, or what a killed process left of them."""
    if path.parent != directory or path.is_symlink():
        return False
    if path.name == CARD:
        return CARD_MARK in path.read_text(encoding="utf-8", errors="replace")
    left = _PARTIAL_FILE.fullmatch(path.name)
    return path.name in (MANIFEST, *REPORT_FILES) or (
        left is not None and left["name"] in (CARD, *REPORT_FILES)
    )


def replace_file(path: Path, content: bytes) -> Path:
    """Write a file beside a checkpoint (report, card), replacing what was there only when the new one is complete."""
    with whole_file(path) as partial:
        partial.write_bytes(content)
    return path


@contextlib.contextmanager
def reserved(target: Path) -> Iterator[None]:
    """Keep every other run out of `target` for the block, and tidy up what killed runs left of it.

    A thread that has reserved it already may do so again. The parents of `target` are made, and go again if nothing is in them.

    Args:
        target: Resolved.

    Raises:
        CheckpointError: if another run, of this process or another, is at work on it.
    """
    if _held.get(target) == threading.get_ident():
        yield
        return
    from filelock import FileLock, Timeout  # torch brings it; it takes a while to import

    missing = [parent for parent in target.parents if not parent.exists()]
    target.parent.mkdir(parents=True, exist_ok=True)
    file = target.with_name(f".{target.name}.difloat-lock")
    lock = FileLock(file, timeout=0)
    try:
        try:
            lock.acquire()
        except Timeout as error:
            raise CheckpointError(
                f"{target} must be written by one run at a time, but another one is at work on it; wait for its end or "
                "choose another directory"
            ) from error
        try:
            _held[target] = threading.get_ident()
            _tidy(target)
            yield
        finally:
            _held.pop(target, None)
            with contextlib.suppress(
                OSError
            ):  # Windows removes no open file; filelock does it there after closing
                file.unlink()
            lock.release()
    finally:
        for parent in missing:
            with contextlib.suppress(OSError):  # holds something by now
                parent.rmdir()


def _tidy(target: Path) -> None:
    """Put back what a killed run had moved away and not replaced, and remove the rest of its leftovers."""
    own = re.compile(rf"\.{re.escape(target.name)}\.[0-9a-f]{{8}}\.(partial|old)")
    left = [path for path in target.parent.iterdir() if own.fullmatch(path.name)]
    moved = [path for path in left if path.suffix == ".old"]
    if moved and not target.exists():
        moved[0].rename(target)
    for path in left:
        shutil.rmtree(path, ignore_errors=True)


@contextlib.contextmanager
def whole_directory(target: Path, overwrite: bool, needed_bytes: int) -> Iterator[Path]:
    """Give a fresh directory to write into, which takes the place of `target` on success and is gone otherwise.

    Args:
        target: Resolved; its parents are made.
        overwrite: Replace a checkpoint with nothing else beside it (`check_target`).
        needed_bytes: What will be written, at least.

    Raises:
        CheckpointError: if the target is in use or the disk is full.
    """
    check_target(target, overwrite)
    partial = target.with_name(f".{target.name}.{secrets.token_hex(4)}.partial")
    try:
        with reserved(target):
            check_target(target, overwrite)  # as it is now that nobody else writes there
            if needed_bytes > shutil.disk_usage(target.parent).free:
                raise OSError(errno.ENOSPC, "too little space")
            try:
                partial.mkdir()
                yield partial
                check_target(target, overwrite)  # writing takes a while, and the user may be at work there
                _move(partial, target)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        # safetensors hands on the system's error as text only.
        full = getattr(error, "errno", None) in (
            errno.ENOSPC,
            errno.EDQUOT,
        ) or f"os error {errno.ENOSPC})" in str(error)
        if not full:
            raise
        raise CheckpointError(
            f"disk of {target.parent} must have room for {decimal(needed_bytes)} and more, but is full; "
            "free some space or save elsewhere (nothing was written)"
        ) from error


def _move(partial: Path, target: Path) -> None:
    """Rename onto the target, where the old directory survives until the new one is in its place."""
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
    old.rename(partial)  # while it is removed it is no whole directory that `_tidy` could put back
    shutil.rmtree(partial, ignore_errors=True)
