"""What is checked of the files while a checkpoint is read: that every tensor is stored once and, on request, every byte.

Plain loading reads shapes, dtypes and scales with suspicion but trusts codes: a flipped bit in them is another weight. With
``load(..., verify=True)`` or ``DIFLOAT_VERIFY=1`` the files are compared with the hashes of the manifest right before they are
read, also where `from_pretrained` of diffusers or transformers reads them.
"""

from __future__ import annotations

import contextlib
import contextvars
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from difloat.checkpoint.layout import CONFIG, QUANT_METHOD, CheckpointError, read_json
from difloat.checkpoint.manifest import MANIFEST, Entry, manifest_entries, read_manifest, sha256

VARIABLE = "DIFLOAT_VERIFY"

_WEIGHT_SUFFIXES = {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".pkl", ".py"}
_settled = contextvars.ContextVar("settled", default=False)  # `load` has decided, and checked if it should


def wanted(verify: bool | None = None) -> bool:
    """Whether hashes are to be checked: what the caller says, else what the environment says.

    Raises:
        ValueError: if the environment variable is neither 1 nor 0, or the argument is no flag.
    """
    if verify is None:
        value = os.environ.get(VARIABLE, "")
        if value not in ("", "0", "1"):
            raise ValueError(
                f"{VARIABLE} must be 1 or 0, got {value!r:.80}; set it to 1 to check hashes while loading"
            )
        return value == "1"
    if type(verify) is not bool:
        raise ValueError(f"verify must be True, False or None, got {verify!r:.80}; pass True to check hashes")
    return verify


def check_directory(root: Path) -> None:
    """Compare a whole checkpoint with its manifest.

    Raises:
        FileNotFoundError: if the manifest or one of its files is missing.
        CheckpointError: if a file has other bytes than it was saved with, or there are weights that are not listed.
    """
    if not (root / MANIFEST).is_file():
        raise FileNotFoundError(unprovable(root))
    entries = read_manifest(root)
    if fault := first_fault(root, entries) or unlisted(root, entries):
        raise CheckpointError(fault)


def check_loading(files: Sequence[str | os.PathLike[str]]) -> None:
    """Compare the files of a component with the manifest while `from_pretrained` runs, if the environment asks for it.

    That is its own files, and in a pipeline also the top level and the components that are not quantized, as far as they
    are there: nobody else would look at those, while quantized ones are looked at when they are loaded themselves.

    Args:
        files: The weights of the component, in one directory.

    Raises:
        ValueError: if the environment variable is neither 1 nor 0.
        FileNotFoundError: if there is no manifest.
        CheckpointError: if a file has other bytes than it was saved with, or weights are not listed.
    """
    if _settled.get() or not wanted():
        return
    folder = Path(files[0]).parent
    root = folder if (folder / MANIFEST).is_file() else folder.parent
    if not (root / MANIFEST).is_file():
        raise FileNotFoundError(unprovable(folder))
    prefix = "" if root == folder else f"{folder.name}/"
    entries = manifest_entries(root)
    if strange := [name for file in files if (name := prefix + Path(file).name) not in entries]:
        raise CheckpointError(
            f"{strange[0]:.200} must be listed in {MANIFEST}, but is not; download it again"
        )
    own = {name: entry for name, entry in entries.items() if name.startswith(prefix)}
    others = {
        name: entry
        for name, entry in entries.items()
        if name not in own and (root / name).is_file() and not _quantized(root / Path(name).parent)
    }
    if fault := first_fault(root, own | others):
        raise CheckpointError(fault)


def _quantized(folder: Path) -> bool:
    config = read_json(folder / CONFIG).get("quantization_config") if (folder / CONFIG).is_file() else None
    return isinstance(config, dict) and config.get("quant_method") == QUANT_METHOD


@contextlib.contextmanager
def settled() -> Iterator[None]:
    """Inside, `check_loading` does nothing: whoever is loading has checked everything, or was told not to."""
    token = _settled.set(True)
    try:
        yield
    finally:
        _settled.reset(token)


@contextlib.contextmanager
def said_in_one_sentence(root: Path, library: str) -> Iterator[None]:
    """Turn what a library raises over a damaged config or file of its own into a CheckpointError of one line.

    A changed number in a config ends anywhere inside the model's constructor, with any of the usual errors or one of
    huggingface_hub's.
    """
    from huggingface_hub.errors import StrictDataclassError

    usual = (
        ValueError,
        TypeError,
        LookupError,
        AttributeError,
        ArithmeticError,
        RuntimeError,
        AssertionError,
    )
    try:
        yield
    except (*usual, OSError, SafetensorError, StrictDataclassError) as error:
        if isinstance(error, CheckpointError | OSError) and "\n" not in str(error):
            raise
        raise CheckpointError(_not_built(root, library, error)) from error
    except Exception as error:
        # The tokenizers library raises nothing but bare `Exception` over its file. Subclasses pass as they are.
        if type(error) is Exception:
            raise CheckpointError(_not_built(root, library, error)) from error
        raise


def _not_built(root: Path, library: str, error: Exception) -> str:
    found = " ".join(str(error).split()) or "it gives no reason"
    return (
        f"{root} must be a checkpoint that {library} can build, but {found:.300} ({type(error).__name__}); "
        "download or save it again"
    )


def unprovable(directory: Path) -> str:
    """The sentence for a directory without a manifest."""
    return (
        f"{MANIFEST} must be there to prove the files, but is missing in {directory}; save the model with difloat.save, "
        "or load it without verifying"
    )


def first_fault(root: Path, entries: Mapping[str, Entry]) -> str:
    """What is wrong with the first file that is not as it was saved, in one sentence, or an empty text."""
    for name, entry in entries.items():
        path = root / name
        if not path.is_file():
            return f"{name:.200} must be in the checkpoint, but is missing in {root}; download it again"
        if path.stat().st_size != entry.bytes or sha256(path) != entry.sha256:
            return f"{name:.200} must have the bytes it was saved with, but its SHA-256 is another; download it again"
    return ""


def unlisted(root: Path, entries: Mapping[str, Any]) -> str:
    """Which weight file or Python file the manifest does not list, in one sentence, or "" if it lists all."""
    present = {
        path.relative_to(root).as_posix() for path in root.rglob("*") if path.suffix in _WEIGHT_SUFFIXES
    }
    if extra := sorted(present - set(entries)):
        return f"{extra[0]:.200} must not be there, since {MANIFEST} does not list it; remove it"
    return ""


def stored_names(files: Sequence[str | os.PathLike[str]]) -> set[str]:
    """Names of the tensors in safetensors files, without reading values.

    Raises:
        CheckpointError: if a file is damaged, or a tensor is in two files: which one counts would depend on the reader.
    """
    names: set[str] = set()
    for file in files:
        try:
            with safe_open(file, framework="pt") as opened:
                own = set(opened.keys())
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{file} must be a whole safetensors file, but {error!s:.200}; download it again"
            ) from error
        if twice := sorted(names & own):
            raise CheckpointError(
                f"tensor {twice[0]!r:.200} must be stored once, but is in two shards; download them again"
            )
        names |= own
    return names
