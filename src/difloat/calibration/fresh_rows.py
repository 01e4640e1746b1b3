"""Rows of trajectories that are drawn anew while a student is trained on them, so that no row has to be seen twice.

The full-precision model's own sampler runs again, from noise and prompts that calibration did not use. What it computes on the
way is what the student shall learn, so the teacher's outputs cost nothing further. A pass is made of its number alone. So a
resumed run, and every process of a launch, draws the same rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, final

import torch
from torch import Tensor, nn

from difloat.calibration.batch_axis import first_tensor, rows_in_lists
from difloat.calibration.rows import Recorder, Row, recording
from difloat.calibration.sampler_runs import SEED_STRIDE, Sampling
from difloat.pipelines import quiet

_FIRST = (
    1 << 19
)  # the number of the first fresh picture, which lies beyond those of calibrations and of reports
_ALL = 1 << 40  # rows that are kept of a pass


@dataclass(frozen=True)
class Drawn:
    """All rows of a pass along new trajectories.

    Attributes:
        rows: The rows, in the order of the sampler's calls.
        blobs: Their tensors by content hash.
        outputs: The full-precision model's outputs for them, float32 [rows, ...], where the model computes.
    """

    rows: list[Row]
    blobs: dict[str, Tensor]
    outputs: Tensor


@final
@dataclass(frozen=True)
class FreshRows:
    """A generator of rows.

    Attributes:
        made_of: All that decides the rows besides the number of a pass, as plain data.
        draw: A function that draws a pass of at least so many pictures, by its number from 0.
    """

    made_of: Any
    draw: Callable[[int, int], Drawn]


def from_pipeline(sampling: Callable[[int], Sampling], made_of: Any) -> FreshRows:
    """New trajectories of a pipeline.

    Args:
        sampling: A function that gives the pipeline's batches of so many pictures.
        made_of: What decides the rows besides the number of a pass.
    """
    found: dict[int, Sampling] = {}

    def draw(pictures: int, number: int) -> Drawn:
        if pictures not in found:
            found[pictures] = sampling(pictures)
        batches = found[pictures]
        runs = -(-pictures // batches.images)
        first = _FIRST // batches.images + number * runs
        drawn = []
        for batch in range(first, first + runs):
            begin = partial(batches.run, batch)
            with quiet(batches.pipeline):
                drawn.append(
                    _recorded(batches.denoiser, begin, batches.seed(batch), f"fresh-{batch}", batches.images)
                )
        return _joined(drawn)

    return FreshRows(made_of, draw)


def from_loop(
    module: nn.Module, forward_loop: Callable[[nn.Module], object], made_of: Any, seed: int
) -> FreshRows:
    """New trajectories of a loop around a module, which decides itself how many pictures it samples.

    Args:
        module: The denoiser.
        forward_loop: The loop.
        made_of: What decides the rows besides the number of a pass.
        seed: The seed of the calibration. Every run has one of its own, made of this.
    """

    def draw(pictures: int, number: int) -> Drawn:
        begin = partial(forward_loop, module)
        return _recorded(module, begin, seed * SEED_STRIDE + _FIRST + number, f"fresh-{number}", None)

    return FreshRows(made_of, draw)


def _recorded(
    module: nn.Module, run: Callable[[], object], seed: int, trajectories: str, images: int | None
) -> Drawn:
    """All rows of one run of a sampler, with the outputs of its denoiser.

    Raises:
        ValueError: if the denoiser was not called, or an input is not finite.
    """
    generator = torch.Generator().manual_seed(seed)
    recorder = Recorder(module, _ALL, generator, images=images, trajectories=trajectories)
    outputs: list[Tensor] = []

    def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: object) -> None:
        # As with rows: tensors made in inference mode can never enter autograd.
        with torch.inference_mode(False), torch.no_grad():
            outputs.append(first_tensor(output, rows_in_lists(args, kwargs)).float().clone())

    handle = module.register_forward_hook(keep, with_kwargs=True)
    try:
        with recording(module, recorder, seed):
            run()
    finally:
        handle.remove()
    if not outputs:
        raise ValueError(
            "forward_loop must call the module every time it runs for fresh_rows, got no call in a further run; begin "
            "iterators inside of it, or say fresh_rows=0"
        )
    return Drawn(recorder.rows, recorder.blobs, torch.cat(outputs))


def _joined(drawn: list[Drawn]) -> Drawn:
    rows = [row for one in drawn for row in one.rows]
    blobs = {key: blob for one in drawn for key, blob in one.blobs.items()}
    return Drawn(rows, blobs, torch.cat([one.outputs for one in drawn]))
