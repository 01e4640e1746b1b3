"""A launch of two processes gives what one gives, bit for bit; what fails in one ends both with one sentence."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import difloat
from difloat import distributed
from tiny import PROMPTS, tiny_unet
from work_in_two_processes import alone, closed_form, command, outcome, pictures, rows, rows_of_loop

SCRIPT = Path(__file__).with_name("work_in_two_processes.py")
FAST = ["--samples", "8", "--steps", "2"]

# diffusers' DPM solver hands torch tensors to numpy in a way numpy 2 deprecates; nothing here can change that.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


def commands_in(folder: Path) -> list[list[str]]:
    """The command lines that are run by one process and by two, each into its own folder."""
    source, prompts = folder.parent / "source", folder.parent / "prompts.txt"
    lines = [
        [
            "generate",
            source,
            folder / "pictures",
            "--prompts",
            prompts,
            "--count",
            5,
            "--steps",
            2,
            "--batch",
            2,
        ],
        ["quantize", source, folder / "rtn", "--recipe", "rtn", *FAST, "--images", "0"],
        ["evaluate", source, folder / "rtn", "--prompts", prompts, "--samples", 4, "--steps", 2, "--batch", 1]
        + ["--save", folder / "evaluation.json"],
        ["generate", source, prompts],
    ]
    return [[str(word) for word in line] for line in lines]


TRAINED = [
    "--recipe",
    "msfp",
    "--bits",
    "w4a4",
    "--set",
    "epochs=1",
    "--set",
    "rank=2",
    *FAST,
    "--images",
    "2",
]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Launched processes compute with one thread; the order of sums may depend on that."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds a tiny pipeline, prompts, and the folders one and two."""
    made = tmp_path_factory.mktemp("processes")
    tiny_unet().save_pretrained(made / "source")
    (made / "prompts.txt").write_text("\n".join(PROMPTS[:3]), encoding="utf-8")
    (made / "one").mkdir()
    (made / "two").mkdir()
    return made


@pytest.fixture(scope="module")
def launched(folder: Path) -> tuple[list[dict[str, Any]], str]:
    """What each of two processes found, and what they printed."""
    trained = ["quantize", str(folder / "source"), str(folder / "two" / "msfp"), *TRAINED]
    arguments = [str(folder / "two"), json.dumps([*commands_in(folder / "two"), trained])]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*launcher, str(SCRIPT), *arguments], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    files = [folder / "two" / f"found-{number}.pt" for number in range(2)]
    return [torch.load(file, weights_only=False) for file in files], done.stdout + done.stderr


def test_pictures_are_those_of_one_process_and_only_the_main_one_has_them(launched) -> None:
    (main, other), _ = launched
    alone = pictures()
    assert torch.equal(main["images"], alone.images) and torch.equal(main["latents"], alone.latents)
    assert main["timesteps"] == alone.timesteps
    assert len(other["images"]) == 0 and other["latents"] is None


def test_every_process_has_the_calibration_rows_of_one(launched, folder: Path) -> None:
    alone = rows(folder / "one" / "cache")
    for found in launched[0]:
        assert found["rows"] == alone
        assert found["rows again"] == alone  # with one shard drawn again, the others from the cache
    caches = [sorted((folder / name / "cache").rglob("*.safetensors")) for name in ("one", "two")]
    assert [[path.read_bytes() for path in cache] for cache in caches][0] == [
        p.read_bytes() for p in caches[1]
    ]


def test_the_main_process_runs_a_sampling_loop_for_all(launched) -> None:
    runs: list[int] = []
    expected = rows_of_loop(runs)
    assert runs == [0] and [found["runs"] for found in launched[0]] == [[0], []]
    assert all(found["loop"] == expected for found in launched[0])


def test_results_meet_by_process(launched) -> None:
    (main, other), _ = launched
    assert main["before"] == other["before"] == 1  # nothing is shared before the first meeting
    assert main["shared"] == other["shared"] == [0, 1]
    assert (main["collected"], other["collected"]) == ([0, 1], [])
    assert main["on_main"] is other["on_main"] is True
    assert main["alone"] == other["alone"] == 3


def test_a_failure_of_one_is_the_failure_of_all(launched) -> None:
    (main, other), _ = launched
    of_main, of_other = "weights must be finite", "disk must have room for the output, but is full"
    for at in (0, 2, 4):
        assert main["failures"][at] == f"ValueError {of_main}"
        assert other["failures"][at] == f"ProcessError {of_main}"
    for at in (1, 3):
        assert main["failures"][at].startswith(f"ProcessError {of_other}")
        assert other["failures"][at] == "OSError [Errno 28] No space left on device"
    assert main["failures"][5] == other["failures"][5] == "none None"  # only the main process does that work


def test_commands_write_what_one_process_writes(launched, folder: Path) -> None:
    codes = [command(*line) for line in commands_in(folder / "one")]
    (main, other), _ = launched
    assert codes == main["codes"][:-1] == other["codes"][:-1] == [0, 0, 0, 2]
    one, two = folder / "one", folder / "two"
    names = sorted(path.name for path in (one / "pictures").iterdir())
    assert names == [f"{n:05d}.png" for n in range(5)]
    for name in names:
        pixels = [np.asarray(Image.open(place / "pictures" / name)) for place in (one, two)]
        assert np.array_equal(*pixels)
    for file in ("rtn/unet/diffusion_pytorch_model.safetensors", "rtn/unet/config.json", "evaluation.json"):
        assert (one / file).read_bytes() == (two / file).read_bytes(), file


def test_weights_rounded_by_two_processes_are_those_of_one(launched, folder: Path) -> None:
    alone = closed_form(folder / "one" / "closed-form")
    for found in launched[0]:
        plan = found["closed form"]
        assert plan.layers.keys() == alone.layers.keys()
        for name, layer in plan.layers.items():
            expected = alone.layers[name]
            assert layer.parts == expected.parts and layer.tensors.keys() == expected.tensors.keys()
            assert all(torch.equal(tensor, expected.tensors[key]) for key, tensor in layer.tensors.items())
        assert plan.measured["widths"] == alone.measured["widths"]
        assert plan.measured["closed_form"] == alone.measured["closed_form"]
    # Each kept what it made: looks and weights of every input, and sensitivities once.
    entries = list((folder / "one" / "closed-form" / "closed-form").glob("*.safetensors"))
    assert launched[0][0]["entries"] == launched[0][1]["entries"] == len(entries) > 20


def test_training_in_two_processes_ends_with_one_checkpoint(launched, folder: Path) -> None:
    assert [found["codes"][-1] for found in launched[0]] == [0, 0]
    out = folder / "two" / "msfp"
    assert all(finding.passed for finding in difloat.verify(out)) and (out / "report.html").is_file()
    assert not list(out.parent.glob(".*partial*"))


def test_one_sentence_and_exit_code_2_when_one_process_fails(launched) -> None:
    found, printed = launched
    assert [each["code of a failure"] for each in found] == [2, 2]
    assert "Traceback" not in printed
    # The file in the way of the fourth command, and the failure that only the other process met.
    assert printed.count("error: ") == 2 and printed.count("disk must have room") == 1


def test_without_a_launch_there_is_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "1")
    distributed.join("cpu")
    assert (distributed.count(), distributed.number(), distributed.is_main()) == (1, 0, True)
    assert distributed.shared(lambda: 5) == distributed.collected(lambda: 5) == [5]
    assert distributed.on_main(lambda: 6) == 6 and alone() == 3

    def fail() -> None:
        raise ValueError("as it is")

    for meet in (distributed.shared, distributed.collected, distributed.on_main):
        assert outcome(meet, fail) == "ValueError as it is"
