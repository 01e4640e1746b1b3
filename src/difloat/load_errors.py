"""What hubs and loaders of other libraries raise, each as one sentence that says what to do."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def hub_errors(name: str) -> Iterator[None]:
    """What the hub's library raises, as one sentence that says what to do."""
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    client: Any = sys.modules.get("httpx")  # what newer versions of the library ask the hub with
    unanswered: tuple[type[Exception], ...] = (EntryNotFoundError, HfHubHTTPError, OSError)
    unanswered += () if client is None else (client.HTTPError,)
    try:
        yield
    except GatedRepoError as error:
        raise FileNotFoundError(
            f"{name!r} must be open to you on the hub, but asks for consent; accept its licence on its page, then hf auth login"
        ) from error
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        what = "revision" if isinstance(error, RevisionNotFoundError) else "model"
        raise FileNotFoundError(
            f"{what} must exist on the hub, got {name!r}; check the spelling, or hf auth login"
        ) from error
    except unanswered as error:
        if _comes_from(error, LocalEntryNotFoundError):
            raise FileNotFoundError(
                f"{name!r} must be in the hub's cache where there is no network, but is not; hf download {name} where there is "
                "one"
            ) from error
        reason = re.sub(r"\[Errno -?\d+\] ", "", str(error).strip().split("\n")[0])[:200]
        raise FileNotFoundError(
            f"{name!r} must be a pipeline on the hub, but does not load ({reason}); check its name and the network, or hf "
            f"download {name} where there is one"
        ) from error


def _comes_from(error: BaseException, kind: type[BaseException]) -> bool:
    """Whether an error is of a kind, or was raised while one of that kind was handled, as diffusers does."""
    found: BaseException | None = error
    while found is not None and not isinstance(found, kind):
        found = found.__cause__ or found.__context__
    return found is not None


@contextmanager
def load_errors(name: str) -> Iterator[None]:
    """What the loaders of diffusers and transformers raise, as one sentence."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, KeyError, TypeError, AttributeError, ValueError, RuntimeError, SafetensorError) as error:
        reason = str(error).strip().split("\n")[0][:300]
        raise ValueError(
            f"source must be a complete pipeline, but {name!r} does not load ({reason}); download it again"
        ) from error
