"""Run by test_processes in a launch of two: shared work, one failure after the other, and the command line."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))
from difloat import api, cli, distributed, evaluate, run
from difloat.calibration.collect import CalibrationSettings, collect, collect_from_loop
from tiny import PROMPTS, tiny_ddim, tiny_unet

SETTINGS = CalibrationSettings(samples=24, steps=4, prompts_per_batch=2, seed=3)  # three batches


def pictures() -> evaluate.Generated:
    """Three batches, the last one smaller."""
    return evaluate.generate(
        tiny_unet(),
        PROMPTS[:2],
        seeds=[3, 1, 4, 1, 5],
        steps=3,
        batch_size=2,
        trajectory=True,
        progress=False,
    )


def rows(cache: Path | None) -> list[Any]:
    """Everything about the rows, tensors by content."""
    data = collect(tiny_unet(), PROMPTS, SETTINGS, cache_dir=cache, progress=False)
    return [(row.timestep, row.part, row.template, row.leaves) for row in data._rows]


def rows_of_loop(runs: list[int]) -> list[Any]:
    """The same of a loop, which notes in `runs` who ran it."""

    def loop(module: torch.nn.Module) -> None:
        runs.append(distributed.number())
        tiny_ddim_pipeline.unet = module
        tiny_ddim_pipeline(num_inference_steps=2, generator=torch.Generator().manual_seed(0))

    tiny_ddim_pipeline = tiny_ddim()
    tiny_ddim_pipeline.set_progress_bar_config(disable=True)
    settings = CalibrationSettings(samples=2)
    data = collect_from_loop(tiny_ddim_pipeline.unet, loop, settings, progress=False)
    return [(row.timestep, row.leaves) for row in data._rows]


def closed_form(cache: Path | None) -> Any:
    """A plan of recipe auto, whose layers are shared out by input."""
    settings = {"samples": 8, "steps": 4, "prompts_per_batch": 2, "trajectories": 4, "seed": 3}
    return api.plan(tiny_unet(), "auto", "w4a8", prompts=PROMPTS, cache_dir=cache, progress=False, **settings)


def failing(number: int) -> Callable[[], None]:
    """Work that only one process fails at."""

    def work() -> None:
        if distributed.number() == number:
            raise OSError(28, "No space left on device") if number else ValueError("weights must be finite")

    return work


def outcome(meet: Callable[..., Any], work: Callable[[], None]) -> str:
    """Class and message of what a meeting raised."""
    try:
        return f"none {meet(work)}"
    except (ValueError, OSError) as error:
        return f"{type(error).__name__} {error}"


def command(*arguments: object) -> int:
    """Exit code of the command line."""
    sys.argv = ["difloat", *map(str, arguments)]
    try:
        cli.main()
    except SystemExit as stop:
        return int(stop.code or 0)
    raise AssertionError("the command line must end by SystemExit")


def alone() -> int:
    """What `on_main` runs: there are no others inside."""
    return (
        distributed.count() + len(distributed.shared(lambda: None)) + len(distributed.collected(lambda: None))
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    before = distributed.count()
    drawn, runs = pictures(), []
    found = {
        "before": before,
        "rows": rows(folder / "cache"),
        "images": drawn.images,
        "latents": drawn.latents,
        "timesteps": drawn.timesteps,
        "loop": rows_of_loop(runs),
        "runs": runs,
        "closed form": closed_form(folder / "closed-form"),
        "entries": len(list((folder / "closed-form" / "closed-form").glob("*.safetensors"))),
        "shared": distributed.shared(distributed.number),
        "collected": distributed.collected(distributed.number),
        "on_main": distributed.on_main(distributed.is_main),
        "alone": distributed.on_main(alone),
        "failures": [
            outcome(meet, failing(number))
            for meet in (distributed.shared, distributed.collected, distributed.on_main)
            for number in (0, 1)
        ],
    }
    next(
        (folder / "cache").rglob("batch-00001.safetensors"), folder
    ).unlink() if distributed.is_main() else None
    found["rows again"] = rows(folder / "cache")
    commands = json.loads(sys.argv[2])
    found["codes"] = [command(*arguments) for arguments in commands]
    if not distributed.is_main():
        run.load_pipeline = lambda source, **_: failing(1)()
    found["code of a failure"] = command(*commands[0])
    torch.save(found, folder / f"found-{distributed.number()}.pt")
