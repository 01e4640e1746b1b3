"""Wall time and CPU time of a calibrated run against the number of processes, and whether all of them make the same bytes.

    python benchmarks/processes.py DIR                                  # emoji-pixart, recipe auto, 1 and 2 processes
    python benchmarks/processes.py DIR --source PIPELINE -- --call height=256

What follows ``--`` goes to ``difloat quantize``. Every run is one command of torchrun with one thread per process, into a
directory of its own under DIR. The files of all checkpoints are compared byte for byte, without the report, which holds times.
A machine with other work on it is refused, since the table would say more of that than of the processes.
"""

from __future__ import annotations

import filecmp
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import harness

_IDLE = 2.5  # load above which others use the cores
_REPORT = ("report.html", "report.json")


def main() -> None:
    """Measure, compare and write the results."""
    made = harness.parser(__doc__, out=harness.RESULTS / "processes.json")
    made.add_argument("directory", type=Path, help="where the checkpoints are made")
    made.add_argument("--source", default="emoji-pixart", help="what is quantized")
    made.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    made.add_argument("--busy", action="store_true", help="measure although the machine has other work")
    end = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)  # options of difloat follow
    more = sys.argv[end + 1 :]
    del sys.argv[end:]
    options = harness.arguments(made)
    load = os.getloadavg()[0]
    if load >= _IDLE and not options.busy:
        raise SystemExit(
            f"the load of the machine must be below {_IDLE}, got {load:.1f}; wait, or say --busy"
        )
    rows, folders = [], []
    for count in options.processes:
        folder = options.directory / f"of-{count}"
        shutil.rmtree(folder, ignore_errors=True)
        rows.append(run(options.source, folder, count, more))
        folders.append(folder)
    same = all(differing(folders[0], other) == [] for other in folders[1:])
    print(table(rows, same))
    harness.write(options.out, {"options": more, "rows": rows, "same_bytes": same, "load": round(load, 1)})
    if not same:
        raise SystemExit("checkpoints differ: " + ", ".join(differing(folders[0], folders[-1])))


def run(source: str, folder: Path, count: int, options: Sequence[str]) -> dict[str, Any]:
    """Quantize with so many processes; what it took."""
    launcher = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={count}", "-m"]
    command = [*launcher, "difloat", "quantize", source, str(folder), "--images", "0", *options]
    start, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"processes": count, "wall_s": round(time.perf_counter() - start, 1), "cpu_s": round(cpu_s, 1)}


def differing(first: Path, second: Path) -> list[str]:
    """Names of files, the report aside, that only one of two directories has or that differ in a byte."""
    names = {
        path.relative_to(folder).as_posix()
        for folder in (first, second)
        for path in folder.rglob("*")
        if path.is_file() and path.name not in _REPORT
    }
    _, different, missing = filecmp.cmpfiles(first, second, sorted(names), shallow=False)
    return different + missing


def table(rows: Sequence[dict[str, Any]], same: bool) -> str:
    """The results in Markdown."""
    lines = ["| processes | wall time | CPU time | against one | same bytes |", "|---|---|---|---|---|"]
    for row in rows:
        ratio = row["wall_s"] / rows[0]["wall_s"]
        lines.append(
            f"| {row['processes']} | {row['wall_s']:,.0f} s | {row['cpu_s']:,.0f} s | {ratio:.2f} | {'yes' if same else 'no'} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
