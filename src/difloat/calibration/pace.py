"""How fast the full-precision denoiser computed while calibration ran."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Pace:
    """What one run, or several, showed.

    Attributes:
        seconds: From one call of the denoiser to the next: the call, the sampler's step, and what recording takes.
        timed: Rows of the calls that were timed so: all but the last of every run.
        computed: Rows of all calls.
        pictures: That these calls sampled; 0 where that is not known.
    """

    seconds: float = 0.0
    timed: int = 0
    computed: int = 0
    pictures: int = 0

    @property
    def row_seconds(self) -> float | None:
        """Seconds per row of a call; None if no call was timed."""
        return self.seconds / self.timed if self.timed else None

    @property
    def picture_rows(self) -> float | None:
        """Rows that a full-precision picture takes, steps times parts of guidance; None if that is not known."""
        return self.computed / self.pictures if self.pictures else None


def joined(paces: Iterable[Pace]) -> Pace:
    """Several runs as one."""
    every = list(paces)
    return Pace(
        sum(pace.seconds for pace in every),
        sum(pace.timed for pace in every),
        sum(pace.computed for pace in every),
        sum(pace.pictures for pace in every),
    )
