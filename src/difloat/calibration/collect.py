"""Calibration data: rows of a denoiser's inputs, drawn from the trajectories of the full-precision sampler.

`collect` calls an unmodified diffusers pipeline, and `collect_from_loop` any sampling loop around an `nn.Module`. A forward
pre-hook records the denoiser's inputs. Rows are spread evenly over the sampler's own timesteps and over the conditional and
unconditional halves of guidance. Each batch of prompts is one shard. Once it is on disk it stays done, and because every seed
is explicit, a resumed run gives the rows of an uninterrupted one.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, final

import torch
from torch import nn
from tqdm import tqdm

from difloat import devices, distributed, torch_modes
from difloat.calibration import loop_identity
from difloat.calibration.clean_latents import record_clean
from difloat.calibration.fresh_rows import FreshRows, from_loop, from_pipeline
from difloat.calibration.mergeable import check_mergeable
from difloat.calibration.pace import Pace, joined
from difloat.calibration.row_store import Recorded, Shelf, open_shelf, record_shards
from difloat.calibration.rows import Recorder, Row, merge, recording, stratified_indices
from difloat.calibration.sampler_runs import Sampling, weights_summary
from difloat.calibration.trajectory import conditional_part, rows_before, rows_beside
from difloat.pipelines import denoiser_of, load_prompts, quiet
from difloat.plan.request import CalibrationSettings

__all__ = [
    "Calibration",
    "CalibrationSettings",
    "collect",
    "collect_from_loop",
    "denoiser_of",
    "load_prompts",
]


@final
class Calibration:
    """A set of rows of the denoiser's inputs, held in RAM or read from disk on demand."""

    def __init__(
        self,
        rows: Sequence[Row],
        shelf: Shelf,
        device: torch.device,
        scheduler: Callable[[], Any] | None = None,
        pace: Pace | None = None,
        fresh: FreshRows | None = None,
    ) -> None:
        """Take rows whose tensors are on a shelf. `batch` puts them on the device, and `pace` was measured.

        `fresh` draws rows of further trajectories, or is None where there is no sampler to do so.
        """
        self._rows = list(rows)
        self._shelf = shelf
        self.device, self.scheduler, self.pace, self.fresh = device, scheduler, pace or Pace(), fresh

    def __len__(self) -> int:
        """The number of rows."""
        return len(self._rows)

    @property
    def timesteps(self) -> list[float]:
        """The timestep of every row in the sampler's unit, or the number of its call if calls have no timestep."""
        return [row.timestep for row in self._rows]

    @property
    def steps(self) -> list[int | None]:
        """The sampler step of every row, counted from 0, or None for a row of no trajectory."""
        return [row.step if row.trajectory else None for row in self._rows]

    @property
    def trajectories(self) -> list[str]:
        """A name of the trajectory of every row, one of its own for a row of none."""
        return [row.trajectory or f"row {number}" for number, row in enumerate(self._rows)]

    def some(self, rows: Sequence[int]) -> Calibration:
        """The calibration data of some of the rows, which stay where they are held."""
        return Calibration(
            [self._rows[row] for row in rows], self._shelf, self.device, self.scheduler, self.pace
        )

    @property
    def before(self) -> list[int | None]:
        """The row one sampler step earlier on the same trajectory, for every row. At the first step it is the row itself.

        It is None where that row was not kept, or the rows are of no trajectory.
        """
        return rows_before([(row.trajectory, row.part, row.step) for row in self._rows])

    @property
    def pictures(self) -> int:
        """How many trajectories the rows are of, or 0 if that is not known."""
        return len({row.trajectory for row in self._rows if row.trajectory})

    @property
    def beside(self) -> list[int | None]:
        """The row of the guidance part before its own at the same point of the same trajectory, for every row.

        It is None for rows of the first part, and where that row was not kept.
        """
        points = [(row.trajectory, row.part, row.step) for row in self._rows]
        return rows_beside(points, [row.leaves[0] for row in self._rows])

    @property
    def conditional_part(self) -> int | None:
        """The part of guidance with a condition, or None without guidance, or if all trajectories had the same condition."""
        return conditional_part([row.part for row in self._rows], [row.leaves[1:] for row in self._rows])

    @property
    def parts(self) -> int:
        """The number of guidance parts, which is 1 without guidance."""
        return 1 + max(row.part for row in self._rows)

    @property
    def samples(self) -> set[str]:
        """The content hashes of the noisy samples of all rows."""
        return {row.leaves[0] for row in self._rows}

    @property
    def fingerprint(self) -> str:
        """A hash of all rows in their order, for caches of what was made of them."""
        return hashlib.blake2b(repr(self._rows).encode(), digest_size=16).hexdigest()

    @property
    def nbytes(self) -> int:
        """The bytes of all tensors of the rows, in RAM and on disk together. Each distinct tensor counts once."""
        return self._shelf.nbytes({leaf for row in self._rows for leaf in row.leaves})

    def batch(self, rows: Sequence[int]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The denoiser's arguments `(args, kwargs)` for some rows, merged along the batch axis, on the device.

        A scalar timestep comes back as one entry per row, so rows of different timesteps can be mixed. The tensors are copies.

        Raises:
            ValueError: if there are no rows, a number is out of range, or rows cannot share one call.
        """
        if len(rows) == 0 or not all(0 <= row < len(self) for row in rows):
            raise ValueError(
                f"rows must be numbers from 0 to {len(self) - 1}, at least one, got {list(rows)}; use "
                "range(len(calibration)) for all"
            )
        return merge([self._rows[row] for row in rows], lambda key: self._shelf.read(key).to(self.device))

    def stratified(self, count: int, generator: torch.Generator) -> list[int]:
        """Numbers of rows without repeats, spread evenly over timesteps and guidance halves, in random order.

        Raises:
            ValueError: if the count is below 1 or above the number of rows.
        """
        if not 1 <= count <= len(self):
            raise ValueError(
                f"count must be from 1 to the {len(self)} rows there are, got {count}; collect more"
            )
        chosen = stratified_indices(self._rows, count, generator)
        return [chosen[place] for place in torch.randperm(count, generator=generator).tolist()]

    def describe(self) -> dict[str, Any]:
        """The number of rows, bytes, rows per timestep (descending) and rows per guidance part."""
        counts = Counter(self.timesteps)
        return {
            "rows": len(self),
            "bytes": self.nbytes,
            "memory_bytes": self._shelf.memory_used_bytes,
            "timesteps": {timestep: counts[timestep] for timestep in sorted(counts, reverse=True)},
            "parts": dict(sorted(Counter(row.part for row in self._rows).items())),
        }


@torch_modes.without_autocast()
def collect(
    pipeline: Any,
    prompts: Sequence[str] | None,
    settings: CalibrationSettings,
    *,
    cache_dir: str | Path | None = None,
    progress: bool = True,
    call_kwargs: Mapping[str, Any] | None = None,
    component: str | None = None,
) -> Calibration:
    """Sample with an unmodified pipeline and keep `settings.samples` rows of its denoiser's inputs.

    In a launch of several processes (`difloat.distributed`) all must call this with the same arguments. Each samples some of
    the batches, and every process gets all rows, which are those of a single process in the same order.

    Args:
        pipeline: Any diffusers pipeline.
        prompts: Texts, which are drawn in a seeded order and used again from the start if there are too few. None is for a
            pipeline without text. A class-conditional pipeline gets random classes.
        settings: How many rows are kept, and the seed.
        cache_dir: The folder of finished shards, with a subfolder for each request (settings, prompts, model, scheduler). A
            repeated or resumed request takes what is there. None keeps rows in RAM, and those above the memory budget in a
            temporary folder. Only the main process of a launch reads and writes it.
        progress: Whether to show a progress bar with the time left.
        call_kwargs: More arguments of the pipeline's call, such as `height` or `negative_prompt`.
        component: The name of the denoiser where two share the trajectory, or None for the first.

    Raises:
        ValueError: if prompts do not fit the pipeline, inputs have NaN or infinity, or rows cannot be merged.
        OSError: if the disk of `cache_dir` is full.
    """
    sampling = sampling_of(pipeline, prompts, settings, call_kwargs, component)
    distributed.join(sampling.device)
    request = {**sampling.request(), "timesteps": settings.timesteps}
    shelf = open_shelf(cache_dir, settings.memory_bytes, request)
    shown = progress and distributed.is_main()
    paces: list[Pace] = []
    bar = tqdm(total=sampling.batches * sampling.steps, desc="calibrate", unit="call", disable=not shown)
    with bar, quiet(pipeline):
        batch = 0
        while batch < sampling.batches or len(shelf.rows) < settings.samples:
            planned = sampling.batches - batch  # more only if these gave too few rows
            turn = range(
                batch, batch + min(distributed.count(), planned if planned > 0 else distributed.count())
            )
            record = partial(_record_batch, pipeline, sampling, settings, paces, on_call=bar.update)
            for recorded in record_shards(shelf, {_shard(number): number for number in turn}, record):
                if batch < sampling.batches or len(shelf.rows) < settings.samples:
                    with distributed.together():
                        shelf.put(_shard(batch), *recorded)
                    batch += 1
            bar.update(max(0, batch * sampling.steps - bar.n))  # of other processes and earlier runs

    def alike(pictures: int) -> Sampling:
        at_once = replace(settings, prompts_per_batch=pictures)
        return sampling_of(pipeline, prompts, at_once, call_kwargs, component)

    fresh = from_pipeline(alike, request) if settings.timesteps == "sampler" else None
    pace = joined(paces)
    return _finish(sampling.denoiser, shelf, settings, sampling.device, pace, fresh, sampling.scheduler)


def _shard(batch: int) -> str:
    return f"batch-{batch:05d}"


def _record_batch(
    pipeline: Any,
    sampling: Sampling,
    settings: CalibrationSettings,
    paces: list[Pace],
    batch: int,
    *,
    on_call: Callable[[], object],
) -> Recorded:
    """Sample one batch and keep its share of the rows. The speed is added to `paces`."""
    recorder = Recorder(
        sampling.denoiser,
        -(-settings.samples // sampling.batches),
        torch.Generator().manual_seed(sampling.seed(batch)),
        images=sampling.images,
        on_call=on_call,
        trajectories=_shard(batch) if settings.timesteps == "sampler" else None,
    )
    if settings.timesteps == "sampler":
        with recording(sampling.denoiser, recorder, sampling.seed(batch)):
            sampling.run(batch)
        paces.append(recorder.pace)
    else:
        record_clean(pipeline, sampling, batch, recorder)
    finish_recording(recorder)
    return recorder.rows, recorder.blobs


@torch_modes.without_autocast()
def collect_from_loop(
    module: nn.Module,
    forward_loop: Callable[[nn.Module], object],
    settings: CalibrationSettings,
    *,
    cache_dir: str | Path | None = None,
    cache_key: str | None = None,
    progress: bool = True,
) -> Calibration:
    """Run `forward_loop(module)` once and keep up to `settings.samples` rows of the module's inputs.

    The sample is the first tensor argument with at least two axes, of which the first is the batch. The timestep is found by
    its parameter name (`timestep`, `t`, `sigma`, ...), or it is the first scalar or `[batch]` tensor after the sample.
    Without one, the number of the call takes its place. `steps`, `guidance_scale` and `prompts_per_batch` are the loop's own
    business and not used. Of several processes (`difloat.distributed`) the main one runs the loop, and all get the rows.

    The loop runs with torch's random state seeded and then restored. Calls whose timesteps go on in one direction at one batch
    size count as the steps of one trajectory (`trajectory.Course`).

    The loop is one shard of `cache_dir`. A killed run starts again, and a finished one is reused if module, settings and loop
    are the same. Loops are told apart by `cache_key`, or without one by their code, defaults and the values they use from
    outside (`loop_identity.fingerprint`). In either case a cached loop is begun once more, as far as its first call of the
    module, and its rows are used only if they begin with that call's arguments. Changes that neither shows, such as those of
    a file that the loop reads later, need another `cache_key`.

    Raises:
        ValueError: if the loop never calls the module, inputs have NaN or infinity, or rows of different timesteps cannot be
            merged.
    """
    request = {
        "module": type(module).__qualname__,
        "weights": weights_summary([module]),
        "loop": loop_identity.fingerprint(forward_loop) if cache_key is None else "",
        "key": cache_key,
        "samples": settings.samples,
        "seed": settings.seed,
    }
    distributed.join(devices.home(module))
    shelf = open_shelf(cache_dir, settings.memory_bytes, request)
    paces = _collect_loop(module, forward_loop, settings, shelf, progress)
    fresh = from_loop(module, forward_loop, request, settings.seed)
    return _finish(module, shelf, settings, devices.home(module), joined(paces), fresh)


def _collect_loop(
    module: nn.Module,
    forward_loop: Callable[[nn.Module], object],
    settings: CalibrationSettings,
    shelf: Shelf,
    progress: bool,
) -> list[Pace]:
    """Put the rows of a loop on the shelf and return its speed. Rows of an earlier run count if its first call was the same."""
    paces: list[Pace] = []
    first = loop_identity.FirstCall(module)

    def record(batch: int) -> Recorded:
        with tqdm(desc="calibrate", unit="call", disable=not progress) as bar:
            generator = torch.Generator().manual_seed(settings.seed)
            recorder = Recorder(module, settings.samples, generator, on_call=bar.update, trajectories="loop")
            first.digest = ""
            with recording(module, recorder, settings.seed), recording(module, first, settings.seed):
                forward_loop(module)
            finish_recording(recorder)
            paces.append(recorder.pace)
            return recorder.rows, recorder.blobs

    begun = partial(first.of_loop, forward_loop, settings.seed)
    digest = distributed.on_main(lambda: begun() if shelf.shards else "")
    (recorded,) = record_shards(shelf, {f"loop-{digest}": 0}, record)
    with distributed.together():
        shelf.put(f"loop-{first.digest}", *recorded)
    return paces


def sampling_of(
    pipeline: Any,
    prompts: Sequence[str] | None,
    settings: CalibrationSettings,
    call_kwargs: Mapping[str, Any] | None,
    component: str | None = None,
) -> Sampling:
    """The batches that a request samples.

    Raises:
        ValueError: if prompts or arguments do not fit the pipeline.
    """
    return Sampling(pipeline, prompts, settings, call_kwargs or {}, component)


def finish_recording(recorder: Recorder) -> None:
    """Cut a recording to its limit.

    Raises:
        ValueError: if nothing was recorded.
    """
    recorder.thin()
    if recorder.calls == 0:
        raise ValueError(
            "the sampling loop must call the denoiser, got no call; call the module itself, not its forward, and "
            "pass the module that samples"
        )


def _finish(
    module: nn.Module,
    shelf: Shelf,
    settings: CalibrationSettings,
    device: torch.device,
    pace: Pace,
    fresh: FreshRows | None,
    scheduler: Callable[[], Any] | None = None,
) -> Calibration:
    """The calibration with the number of rows that was asked for, of which rows of different timesteps can be merged."""
    rows = shelf.rows
    generator = torch.Generator().manual_seed(settings.seed)
    keep = stratified_indices(rows, min(settings.samples, len(rows)), generator)
    calibration = Calibration([rows[index] for index in keep], shelf, device, scheduler, pace, fresh)
    check_mergeable(module, calibration.timesteps, calibration.batch)
    return calibration
