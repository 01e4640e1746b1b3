"""Which layers a user keeps out of quantization, by name."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

EXCLUDED = "excluded by the user"


@dataclass(frozen=True)
class Exclusion:
    """What a user keeps out of a model, matched once.

    Attributes:
        patterns: The names and patterns, as the user wrote them.
        names: The layers that can be quantized and that they mean.
    """

    patterns: tuple[str, ...] = ()
    names: frozenset[str] = frozenset()


def matches(name: str, pattern: str) -> bool:
    """Whether a pattern means the module `name`: its own name, that of a module around it, or shell wildcards.

    ``down_blocks.0`` means everything inside that block, ``*.to_q`` every layer whose name ends so.
    """
    return name.startswith(pattern + ".") or fnmatchcase(name, pattern)


def excluded(names: Iterable[str], patterns: Sequence[str]) -> set[str]:
    """The names that at least one pattern means.

    Raises:
        ValueError: if a pattern means none of them: a misspelled one would silently quantize what should be kept.
    """
    known = list(names)
    found: set[str] = set()
    for pattern in patterns:
        meant = {name for name in known if matches(name, pattern)}
        if not meant:
            raise ValueError(
                f"exclude must name layers or blocks of the model, got {pattern!r}, which means none; "
                "list them with difloat inspect --layers"
            )
        found |= meant
    return found
