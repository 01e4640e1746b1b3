"""How long one call of the denoiser takes in the pipeline's own run."""

from __future__ import annotations

import contextlib
from typing import Any

import torch

from difloat.calibration.pace import Pace
from difloat.calibration.rows import Recorder, recording
from difloat.calibration.sampler_runs import Sampling, Stopped
from difloat.pipelines import quiet


def time_a_call(pipeline: Any, sampling: Sampling) -> Pace:
    """Time the first call of the denoiser in calibration, and break the run off at the second call.

    Args:
        pipeline: The pipeline, which is the same afterwards.
        sampling: The pipeline's run, as `sampling_of` of `calibration/collect.py` gives it.
    """

    def stop() -> None:
        if recorder.calls == 2:
            raise Stopped

    recorder = Recorder(sampling.denoiser, 1, torch.Generator().manual_seed(0), on_call=stop)
    held = recording(sampling.denoiser, recorder, sampling.seed(0))
    with quiet(pipeline), held, contextlib.suppress(Stopped):
        sampling.run(0)
    return recorder.pace
