"""Moments on the disk between two looks at them, for which the denoiser runs once.

By the first look widths are chosen, by the second one weights are rounded.
"""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections.abc import Generator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import final

import safetensors.torch
from torch import nn

from difloat import devices
from difloat.methods.moments import Moments, MomentSettings, Source, gather
from difloat.methods.trace import Call
from difloat.plan.plan import LayerPlan


@final
class KeptMoments:
    """Moments of one model on the same calls. Their files are deleted with this object, and read again no later."""

    def __init__(self, folder: Path | None) -> None:
        """Make a folder for the files in another one, or where the system has its temporary files."""
        self._folder = Path(tempfile.mkdtemp(prefix="difloat-moments-", dir=folder))
        self._vectors: dict[Source, int] = {}
        weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)

    def gather(
        self,
        model: nn.Module,
        calls: Sequence[Call],
        plans: Mapping[str, LayerPlan],
        settings: MomentSettings,
        wanted: Sequence[Source],
        *,
        keep: bool,
    ) -> Generator[Moments]:
        """Gather like `moments.gather`, with moments that are kept read and deleted, or kept once more if `keep` says so.

        Raises:
            OSError: if the disk is full.
        """
        missing = [source for source in wanted if source not in self._vectors]
        # Closed in any case, since forward passes wait in it.
        with closing(gather(model, calls, plans, settings, missing)) as gathered:
            for source in wanted:
                moments = self._read(source, model) if source in self._vectors else next(gathered)
                if keep:
                    self._write(moments)
                else:
                    self._forget(source)
                yield moments

    def _path(self, source: Source) -> Path:
        return self._folder / f"{source.names[0]}.safetensors"

    def _read(self, source: Source, model: nn.Module) -> Moments:
        matrix = safetensors.torch.load_file(self._path(source))["matrix"]
        return Moments(source, matrix.to(devices.home(model)), self._vectors[source])

    def _write(self, moments: Moments) -> None:
        if moments.source not in self._vectors:
            safetensors.torch.save_file(
                {"matrix": moments.matrix.cpu().contiguous()}, self._path(moments.source)
            )
            self._vectors[moments.source] = moments.vectors

    def _forget(self, source: Source) -> None:
        if self._vectors.pop(source, None) is not None:
            self._path(source).unlink()
