"""Sending a checkpoint to the Hugging Face hub: its own files, report and card, and nothing else that lies beside them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from difloat.checkpoint import integrity
from difloat.checkpoint.directories import CARD, CARD_MARK, REPORT_FILES, foreign_files
from difloat.checkpoint.manifest import MANIFEST, read_manifest
from difloat.report import model_card


@dataclass(frozen=True)
class Parcel:
    """What is sent.

    Attributes:
        repository: On the hub, ``owner/name``.
        files: Bytes by their paths in the repository, the card among them.
        card: The text of the model card.
        left: Files of the directory that are not difloat's and stay here.
    """

    repository: str
    files: dict[str, int]
    card: str
    left: list[str]


def parcel(
    directory: str | os.PathLike[str],
    repository: str,
    *,
    base_model: str | None = None,
    license: str | None = None,
    tags: Sequence[str] = (),
) -> Parcel:
    """Everything that `push` would send, with every file compared with its hash; nothing is written or sent.

    Args:
        directory: A checkpoint with its report.
        repository: On the hub, ``owner/name``.
        base_model: What was quantized, ``owner/name``, for a card of the moment, or None for the card that is there.
        license: Identifier of the base model's licence, for the card.
        tags: Further tags, for the card.

    Raises:
        ValueError: if there is no card and no base model, or a name is none of a repository.
        FileNotFoundError: if there is no manifest, or no report to make a card of.
        CheckpointError: if a file is not what its hash says.
    """
    from huggingface_hub.utils import validate_repo_id

    validate_repo_id(repository)
    if "/" not in repository:
        raise ValueError(
            f"repository must be owner/name, got {repository!r}; write your name on the hub before it"
        )
    root = Path(directory)
    listed = read_manifest(root)
    integrity.check_directory(root)
    own = root / CARD
    if base_model is not None:
        card = model_card.text(root, base_model, license, tags)
    elif own.is_file() and CARD_MARK in own.read_text(encoding="utf-8", errors="replace"):
        card = own.read_text(encoding="utf-8")
    else:
        raise ValueError(
            f"base_model must name what was quantized, since {root} has no card of difloat's, got None; give --base-model "
            "owner/name"
        )
    names = [*listed, MANIFEST, *(name for name in REPORT_FILES if (root / name).is_file())]
    files = {name: (root / name).stat().st_size for name in names} | {CARD: len(card.encode())}
    left = [name for name in foreign_files(root) if name not in files]
    return Parcel(repository, files, card, left)


def push(directory: str | os.PathLike[str], made: Parcel, *, private: bool = False) -> str:
    """Send a parcel and return its address. The repository is made if it is not there, and all files go into one commit.

    The user's own login is used, as `hf auth login` keeps it.

    Raises:
        OSError: if the hub refuses or cannot be reached; one sentence with its reason.
    """
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.errors import HfHubHTTPError

    hub, root = HfApi(), Path(directory)
    sources = {name: str(root / name) for name in made.files if name != CARD}
    operations = [CommitOperationAdd(name, path) for name, path in sources.items()]
    operations.append(CommitOperationAdd(CARD, made.card.encode()))
    try:
        hub.create_repo(made.repository, private=private, exist_ok=True)
        done = hub.create_commit(made.repository, operations, commit_message="Quantized by difloat")
    except (HfHubHTTPError, OSError) as error:
        reason = str(error).strip().split("\n")[0][:200]
        raise OSError(
            f"hub must take {made.repository!r}, but does not ({reason}); check the name and hf auth login"
        ) from error
    return str(done.commit_url)
