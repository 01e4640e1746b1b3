"""What the shorter ways of large models cost: error of a small model's output when recipe auto takes it for a large one.

    python benchmarks/large_choices.py                          # both embedded models
    python benchmarks/large_choices.py --models emoji-pixart    # one of them

Above 100 million weights recipe auto chooses widths by the diagonal of the moments, and searches scales roughly before they are
fitted (`methods.picture_budget.is_large`). Here both ways have the same calibration rows, so that only this differs. Stored are
the signal-to-noise ratio of the output by row on rows that nothing was calibrated on, the paired difference, and CPU time.
"""

from __future__ import annotations

import time

import harness
from rotation import STEPS, outputs_of, planned, snr
from torch import Tensor

from difloat import api, reference_models
from difloat.evaluation.picture_metrics import mean_interval
from difloat.layers import install
from difloat.methods import picture_budget

ROWS = 128
BITS = ("w4a8", "w3a8")


def main() -> None:
    """Measure both ways at all widths and store them as soon as they are there."""
    parser = harness.parser(__doc__, threads=1, repeats=1, out=harness.RESULTS / "large-choices.json")
    parser.add_argument("--models", nargs="+", default=list(reference_models.NAMES))
    options = harness.arguments(parser)
    limit = picture_budget.SMALL
    for name in options.models:
        pipeline = reference_models.load(name)
        call = reference_models.call_arguments(name)
        shared = {"steps": STEPS, "guidance_scale": call.pop("guidance_scale"), "progress": False}
        captions = reference_models.captions()
        data, held = (
            api.calibrate(
                pipeline,
                prompts=captions[at::2],
                samples=ROWS,
                trajectories=32,
                seed=at,
                call_kwargs=call,
                **shared,
            )
            for at in (0, 1)
        )
        wanted = outputs_of(api.denoiser(pipeline), held)
        for bits in BITS:
            found: dict[str, Tensor] = {}
            for way, most in (("small", limit), ("large", 0)):
                picture_budget.SMALL = most
                start = time.process_time()
                plan = planned(pipeline, data, "auto", bits, {"pictures": 0})
                seconds = time.process_time() - start
                model = install.apply(install.shadow(api.denoiser(pipeline)), plan)
                found[way] = snr(wanted, outputs_of(model, held))
                row = {
                    "snr_db": vars(mean_interval(found[way])),
                    "snr_change_db": vars(mean_interval(found[way] - found["small"])),
                    "cpu_seconds": round(seconds, 1),
                }
                harness.add(options.out, {f"{name} | {bits} | {way}": {**row, **harness.facts()}})


if __name__ == "__main__":
    main()
