"""The speed of the full-precision denoiser, measured while calibration ran."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Pace:
    """The measured speed of one run, or of several.

    >>> Pace(seconds=2.0, timed=8, computed=10, pictures=1).row_seconds
    0.25

    Attributes:
        seconds: The time between the beginnings of two calls: the call, the sampler's step, and the recording.
        timed: The rows of the timed calls, which are all but the last of every run.
        computed: The rows of all calls.
        pictures: How many pictures these calls sampled, or 0 where that is not known.
    """

    seconds: float = 0.0
    timed: int = 0
    computed: int = 0
    pictures: int = 0

    @property
    def row_seconds(self) -> float | None:
        """The seconds per row of a call, or None if no call was timed."""
        return self.seconds / self.timed if self.timed else None

    @property
    def picture_rows(self) -> float | None:
        """The rows that a full-precision picture takes (steps times parts of guidance), or None if that is not known."""
        return self.computed / self.pictures if self.pictures else None


def joined(paces: Iterable[Pace]) -> Pace:
    """The speed of several runs together."""
    every = list(paces)
    return Pace(
        sum(pace.seconds for pace in every),
        sum(pace.timed for pace in every),
        sum(pace.computed for pace in every),
        sum(pace.pictures for pace in every),
    )
