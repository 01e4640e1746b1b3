"""Kill runs of `difloat quantize` at random times and prove that the next run gives the bytes of an undisturbed one.

python benchmarks/kills.py --kills 10 --save benchmarks/results/kills.json

Every round starts a run with `--cache` into the same directory, kills it (SIGKILL) after a random share of the time that an
undisturbed run takes, damages one file of the cache in every other round (cut short or one bit flipped), and lets the next run
end. Its checkpoint must have the bytes of the undisturbed one, and nothing may be left beside it. Exit code 1 if not.
"""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import harness

QUICK = ["--samples", "16", "--steps", "4", "--images", "0"]
OPTIONS = ["rounding=learned", "iterations=4", "rounding_rows=8", "epochs=1", "rank=2", "adapters=1"]


def command(model: str, out: Path, cache: Path) -> list[str]:
    """A short run that writes every kind of cache entry: calibration, blocks, the state of fine-tuning."""
    words = [
        sys.executable,
        "-m",
        "difloat",
        "quantize",
        model,
        str(out),
        "--recipe",
        "msfp",
        "--bits",
        "w4a8",
    ]
    settings = [word for option in OPTIONS for word in ("--set", option)]
    return [*words, *QUICK, *settings, "--cache", str(cache), "--overwrite"]


def files_of(out: Path) -> dict[str, str]:
    """SHA-256 of the checkpoint's files by name; the report beside it holds times."""
    manifest = json.loads((out / "difloat.json").read_text(encoding="utf-8"))
    return {name: entry["sha256"] for name, entry in manifest["files"].items()}


def damage(cache: Path, draw: random.Random) -> str | None:
    """Cut or flip one entry of the cache; what was done, or None if there is no entry yet."""
    entries = sorted(cache.rglob("*.safetensors"))
    if not entries:
        return None
    path = draw.choice(entries)
    content = bytearray(path.read_bytes())
    at = draw.randrange(len(content))
    if draw.random() < 0.5:
        del content[at:]
        done = "cut"
    else:
        content[at] ^= 1 << draw.randrange(8)
        done = "flipped"
    path.write_bytes(content)
    return f"{done} {path.name} at {at}"


def round_of(
    model: str, folder: Path, share: float, seconds: float, draw: random.Random, harm: bool
) -> dict[str, Any]:
    """One run killed after `share` of `seconds`, and the next one's checkpoint."""
    out, cache = folder / "out", folder / "cache"
    with subprocess.Popen(
        command(model, out, cache), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
        try:
            process.wait(share * seconds)
        except subprocess.TimeoutExpired:
            process.kill()
    ended, kept = process.returncode == 0, len(list(cache.rglob("*.safetensors")))
    left = sorted(path.name for path in folder.iterdir() if path.name.startswith(".out"))
    harmed = damage(cache, draw) if harm else None
    finished = subprocess.run(command(model, out, cache), capture_output=True, text=True, check=False)
    said = finished.stderr.count("warning: cache entry")
    return {
        "killed_at": round(share, 3),
        "ended_before": ended,
        "entries": kept,
        "left_by_kill": left,
        "damage": harmed,
        "said": said,
        "exit": finished.returncode,
        "files": files_of(out) if finished.returncode == 0 else finished.stderr[-500:],
        "left": sorted(path.name for path in folder.iterdir()),
    }


def main() -> None:
    """Run the rounds and print what came of them."""
    parser = harness.parser(__doc__)
    parser.add_argument("--model", default="emoji-unet")
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save", type=Path)
    arguments = harness.arguments(parser)
    draw = random.Random(arguments.seed)
    results = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        start = time.perf_counter()
        subprocess.run(
            command(arguments.model, folder / "whole", folder / "whole-cache"),
            check=True,
            capture_output=True,
        )
        seconds, expected = time.perf_counter() - start, files_of(folder / "whole")
        for number in range(arguments.kills):
            place = folder / "round"
            place.mkdir()
            found = round_of(arguments.model, place, draw.random(), seconds, draw, number % 2 == 1)
            found["same"] = found.pop("files") == expected
            tidy = found["left"] == ["cache", "out"] and found["said"] == bool(found["damage"])
            found["good"] = found["same"] and tidy
            results.append(found)
            print(json.dumps(found), flush=True)
            shutil.rmtree(place)
    good = sum(found["good"] for found in results)
    print(
        f"{good} of {len(results)} runs after a kill gave the bytes of the undisturbed run ({seconds:.0f} s)"
    )
    if arguments.save is not None:
        harness.write(arguments.save, {"seconds": seconds, "rounds": results})
    raise SystemExit(good != len(results))


if __name__ == "__main__":
    main()
