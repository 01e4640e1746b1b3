"""Findings about a file."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Level = Literal["error", "suspicion", "ok"]
WRONG = 0.7  # relative error from which a weight has little to do with the float one


@dataclass(frozen=True)
class Remark:
    """One finding about a file.

    >>> Remark("error", "blocks.0.to_q", "weight must be finite, got NaN or infinity").level
    'error'

    Attributes:
        level: "error" for a certain mistake, "suspicion" for a guess, "ok" for a check that was passed.
        place: The layer or tensor, or "" for the whole file.
        message: One sentence about the finding.
    """

    level: Level
    place: str
    message: str
