"""What the benchmarks share: their arguments and seeds, interleaved times, and results that say what they are of.

A script starts with `arguments(parser(__doc__, ...))`, times its contestants with `interleaved`, and ends with `write`, which
puts commit, command, machine and versions before its numbers.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from difloat.cache_entries import whole_file

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks/results"
_LIBRARIES = ("torch", "diffusers", "transformers", "peft", "accelerate", "safetensors")
# What users set to take instructions away from the libraries that are timed.
_CAPS = ("DIFLOAT_CPU_ISA", "ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS")


def parser(
    text: str | None, *, threads: int | None = None, repeats: int | None = None, out: Path | None = None
) -> argparse.ArgumentParser:
    """A parser of a script's arguments.

    Args:
        text: What the script says of itself.
        threads: Default of ``--threads``; None leaves the argument out, and torch takes what it wants.
        repeats: Default of ``--repeats``; None leaves it out.
        out: Default of ``--out``; None leaves it out.
    """
    made = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    if threads is not None:
        made.add_argument(
            "--threads", type=int, default=threads, help="threads of torch and of the native library"
        )
    if repeats is not None:
        made.add_argument("--repeats", type=int, default=repeats, help="repetitions; the median counts")
    if out is not None:
        made.add_argument("--out", type=Path, default=out, help="file of the results")
    return made


def all_threads() -> int:
    """As many as the machine has, for scripts that decide and do not time."""
    return os.cpu_count() or 1


def arguments(made: argparse.ArgumentParser, seed: int = 0) -> argparse.Namespace:
    """The arguments of the command line; torch's threads and seed are set by them."""
    hide_folder()
    options = made.parse_args()
    if hasattr(options, "threads"):
        torch.set_num_threads(options.threads)
    torch.manual_seed(seed)
    return options


def hide_folder() -> None:
    """Take the folder of the scripts off the path: `kernels.py` is not the package that transformers looks for."""
    folder = str(Path(__file__).resolve().parent)
    if folder in sys.path:
        sys.path.remove(folder)


def interleaved(
    contestants: Mapping[str, Callable[[], object]],
    repeats: int,
    *,
    pause_s: float = 0.0,
    prelude: bool = False,
    budget_s: float = math.inf,
    after_turn: Callable[[int, float], object] = lambda turn, spent: None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds of every contestant's calls: in every turn each is called once, in rotated order.

    So all of them see the same machine, whatever else it does.

    Args:
        contestants: By name.
        repeats: Turns.
        pause_s: Before every call; threads of other libraries stop spinning in it.
        prelude: Call each once untimed before every timed call, so that its data lies in the caches.
        budget_s: No further turn that would end after so many seconds.
        after_turn: Is told how many turns there were and how many seconds they took.
        clock: Reads seconds; `time.process_time` leaves out other processes on the same core, for calls of one thread.
    """
    times: dict[str, list[float]] = {name: [] for name in contestants}
    names, begin = list(contestants), time.perf_counter()
    for turn in range(repeats):
        at = turn % max(1, len(names))
        for name in names[at:] + names[:at]:
            time.sleep(pause_s)
            if prelude:
                contestants[name]()
            start = clock()
            contestants[name]()
            times[name].append(clock() - start)
        spent = time.perf_counter() - begin
        after_turn(turn + 1, spent)
        if spent * (turn + 2) / (turn + 1) > budget_s:
            break
    return times


def medians(times: Mapping[str, list[float]]) -> dict[str, float]:
    """The median of every contestant, in the unit of `times`."""
    return {name: statistics.median(found) for name, found in times.items()}


def seconds(call: Callable[[], object]) -> float:
    """Wall-clock time of one call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def fastest(call: Callable[[], object], rounds: int, calls: int) -> float:
    """Seconds per call in the fastest of several rounds of so many calls: what the call itself costs."""

    def several() -> None:
        for _ in range(calls):
            call()

    return min(seconds(several) for _ in range(rounds)) / calls


def facts() -> dict[str, Any]:
    """What a result is of: commit, command, machine and versions."""
    return {"commit": commit(), "command": command(), "machine": machine(), "versions": versions()}


def write(path: Path, result: Mapping[str, Any], *, show: bool = False) -> None:
    """Store a result as JSON behind the `facts`, where it does not have its own; `show` prints it too."""
    text = json.dumps({**facts(), **result}, indent=1, default=str) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as partial:
        partial.write_text(text, encoding="utf-8")
    if show:
        sys.stdout.write(text)


def add(path: Path, rows: Mapping[str, Any]) -> dict[str, Any]:
    """Add rows to a file of rows by name, which another process may have changed meanwhile; what the file holds then."""
    there: dict[str, Any] = {**stored(path), **rows}
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as partial:
        partial.write_text(json.dumps(there, indent=1, default=str) + "\n", encoding="utf-8")
    return there


def stored(path: Path) -> dict[str, Any]:
    """What an earlier run left in a file; nothing where there is none."""
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return found


def command() -> str:
    """The command that was given, with the variables that cap instructions."""
    caps = [f"{name}={os.environ[name]}" for name in _CAPS if name in os.environ]
    return " ".join([*caps, f"python benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]])


def machine() -> dict[str, object]:
    """Where this was measured."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def versions(libraries: tuple[str, ...] = _LIBRARIES) -> dict[str, str]:
    """Of libraries, or "not installed"."""
    found = {}
    for name in libraries:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def commit() -> str | None:
    """The commit with a plus sign if files differ from it; None before the first one."""
    found = subprocess.run(
        ["git", "describe", "--always", "--dirty=+", "--abbrev=12"], cwd=ROOT, capture_output=True, text=True
    )
    return found.stdout.strip() or None
