"""difloat beside SDNQ, quanto, torchao and bitsandbytes inside diffusers: the same steps on the same tiny pipelines.

Loading, saving, LoRA, offload, copies, compilation, each with a checked outcome (`inside_diffusers/steps.py`), on a U-Net, a
PixArt and a FLUX with random weights, 64 channels wide. Every step runs in a process of its own with a time limit, so that a
crash is a result. Everything is in bfloat16 on the CPU, without network. `--matrix` also runs `tests/test_matrix.py` for the
table of difloat's own kinds of layers.

    python benchmarks/integration.py --matrix

Needs ``pip install difloat[bench]``, and pytest for ``--matrix``. Writes ``benchmarks/results/integration.json``; ``--table``
prints it as Markdown.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import tempfile
import traceback
import warnings
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import harness

harness.hide_folder()
sys.path.append(str(harness.ROOT / "benchmarks/inside_diffusers"))
OUT = harness.RESULTS / "integration.json"
PACKAGES = ["diffusers", "transformers", "peft", "accelerate", "safetensors", "torch"]
Cell = dict[str, str]


def in_child(call: Callable[[], Cell], limit_s: float, log: Path) -> Cell:
    """What `call` returns in a forked process, or how that process ended; its prints go to a file."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)

    def run() -> None:
        stream = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(stream, 1)
        os.dup2(stream, 2)
        sender.send(call())

    process = context.Process(target=run)
    process.start()
    sender.close()
    try:
        if not receiver.poll(limit_s):
            return {"result": "no", "remark": f"no end within {limit_s:g} s"}
        return receiver.recv()
    except EOFError:
        process.join()
        code = process.exitcode or 0
        end = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        return {"result": "no", "remark": f"the process died of {end}"}
    finally:
        process.kill()
        process.join()


def sentence(failure: BaseException) -> str:
    """The first sentence of an error, without folders and addresses in memory; where it arose if it says nothing."""
    kind, text = type(failure).__name__, next(iter(str(failure).strip().splitlines()), "")
    if not text:
        place = traceback.extract_tb(failure.__traceback__)[-1]
        return f"{kind} in {place.name} of {'/'.join(Path(place.filename).parts[-2:])}"
    text = re.sub(r"(?<![\w.])/\S*/", "", re.sub(r"0x[0-9a-f]+", "", text))
    first = re.split(r"(?<=[a-z\])`'\"])[.:;] ", text)[0].rstrip(".")
    return f"{kind}: {first[:200]}"


def attempt(step: Callable[[Any], str | None], case: Any) -> Cell:
    """One cell; any exception is a result."""
    import torch
    from checks import Different, NotOffered

    torch.manual_seed(0)
    try:
        remark = step(case) or ""
    except NotOffered as reason:
        return {"result": "not offered", "remark": str(reason)}
    except Different as found:
        return {"result": "no", "remark": str(found)}
    except Exception as failure:
        return {"result": "no", "remark": sentence(failure)}
    return {"result": "yes", "remark": remark}


def column(name: str, shelf: Path, only: str | None, limit_s: float) -> dict[str, dict[str, Cell]]:
    """All steps of one library: step, pipeline, cell. Imports once and forks for every step."""
    import torch
    from libraries import LIBRARIES, Case
    from pipelines import PIPELINES
    from steps import ONLY, STEPS

    torch.set_num_threads(1)  # what was started before a fork is missing after it
    warnings.simplefilter("ignore")  # of the other libraries
    library = LIBRARIES[name]
    library.config(), library.text_config()  # imports
    rows: dict[str, dict[str, Cell]] = {}
    for title, step in STEPS.items():
        if only and only not in title:
            continue
        rows[title] = {}
        for pipeline in PIPELINES:
            if ONLY.get(title, pipeline) != pipeline:
                continue
            with tempfile.TemporaryDirectory(dir=shelf) as folder:
                case = Case(library, pipeline, shelf, Path(folder))
                cell = in_child(lambda step=step, case=case: attempt(step, case), limit_s, shelf / "log.txt")
            rows[title][pipeline] = cell
            sys.stderr.write(f"{name}, {title}, {pipeline}: {cell['result']} {cell['remark']}\n")
    return rows


def in_fresh_process(options: argparse.Namespace, work: list[str], environment: dict[str, str]) -> None:
    """This script again, for one part of the work."""
    command = [sys.executable, __file__, "--limit-s", str(options.limit_s), *work]
    if options.only:
        command += ["--only", options.only]
    subprocess.run(command, check=True, env=os.environ | environment)


def compare(options: argparse.Namespace) -> dict[str, Any]:
    """Every library in a process of its own: libraries change others when they are imported."""
    from libraries import LIBRARIES

    columns = {}
    with tempfile.TemporaryDirectory() as work:
        in_fresh_process(options, ["--work", work], {})
        for name, library in LIBRARIES.items():
            if options.library and options.library not in name:
                continue
            target = Path(work) / f"{name}.json"
            in_fresh_process(options, ["--work", work, "--column", name], dict(library.environment))
            columns[name] = json.loads(target.read_text())
    packages = {library.package: library.what for library in LIBRARIES.values()}
    return {
        "columns": columns,
        "settings": {name: library.what for name, library in LIBRARIES.items()},
        "versions": {package: known(package) for package in [*packages, *PACKAGES]},
    }


def known(package: str) -> str:
    """Version of a package, or "not installed"."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


# difloat's own table


def matrix() -> dict[str, dict[str, str]]:
    """Outcome of `tests/test_matrix.py` by mode and kind of layer, the slow tests of it included."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "tests/test_matrix.py", "-q", "-m", "not gpu"]
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(map(str, (harness.ROOT / "src", harness.ROOT / "tests")))
        }
        subprocess.run([*command, f"--junitxml={report}"], cwd=harness.ROOT, env=environment)
        cases = ElementTree.parse(report).getroot().iter("testcase")
        rows: dict[str, dict[str, str]] = {}
        for case in cases:
            found = re.fullmatch(r"test_(\w+)\[(\w+)(?:-(.*))?\]", case.get("name", ""))
            if found:
                test, kind, mode = found.groups()
                row = test.replace("_", " ") + (f": {mode}" if mode else "")
                bad = next((child.tag for child in case if child.tag in ("failure", "error", "skipped")), "")
                rows.setdefault(row, {})[kind] = bad or "yes"
    return rows


def matrix_table(rows: dict[str, dict[str, str]]) -> str:
    """The same as Markdown; what no test tries is empty."""
    kinds = list(dict.fromkeys(kind for row in rows.values() for kind in row))
    lines = ["| | " + " | ".join(kinds) + " |", "|" + "---|" * (len(kinds) + 1)]
    for name, row in rows.items():
        name = name.removeprefix("output is that of the model in memory: ")
        lines.append(f"| {name} | " + " | ".join(row.get(kind, "") for kind in kinds) + " |")
    return "\n".join(lines)


# Markdown


def summary(cells: dict[str, Cell]) -> tuple[str, list[str]]:
    """One cell of the table for all pipelines, and notes on what did not work."""
    results = {cell["result"] for cell in cells.values()}
    if results == {"yes"}:
        return "yes", []
    notes: dict[str, dict[str, str]] = {}  # remarks that differ in numbers and names only count as one
    for pipeline, cell in cells.items():
        if cell["result"] != "yes":
            pattern = re.sub(r"\S*\d\S*|'\S*'", "#", cell["remark"])
            notes.setdefault(pattern, {})[pipeline] = cell["remark"]
    everywhere = len(cells) == sum(map(len, notes.values()))
    word = "not offered" if results == {"not offered"} else "no"
    texts = []
    for remarks in notes.values():
        first = next(iter(remarks))
        alike = len(set(remarks.values())) == 1
        where = "" if len(remarks) == len(cells) else ", ".join(remarks) + ": "
        texts.append(f"{where}{remarks[first]}" + ("" if alike else f" ({first}; the others alike)"))
    return (word if everywhere else "partly"), texts


NUMBERS = {"convolutions quantized", "bytes in memory over bfloat16"}


def table(result: dict[str, Any]) -> str:
    """Steps by libraries, with numbered notes, versions and command."""
    columns = result["columns"]
    steps = list(next(iter(columns.values())))
    lines = ["| | " + " | ".join(columns) + " |", "|" + "---|" * (len(columns) + 1)]
    notes: list[str] = []
    for step in steps:
        texts = []
        for rows in columns.values():
            word, found = summary(rows[step])
            if step in NUMBERS and word == "yes":
                word = ", ".join(cell["remark"] for cell in rows[step].values())
            for note in found:
                if note not in notes:
                    notes.append(note)
            marks = ", ".join(str(notes.index(note) + 1) for note in found)
            texts.append(f"{word} ({marks})" if marks else word)
        lines.append(f"| {step} | " + " | ".join(texts) + " |")
    lines += ["", *(f"{number}. {note}" for number, note in enumerate(notes, 1))]
    lines.append(
        "\nSettings: " + "; ".join(f"{name}: {what}" for name, what in result["settings"].items()) + "."
    )
    lines.append("\nRound trips: " + "; ".join(round_trips(columns)) + ".")
    libraries = ", ".join(f"{name} {number}" for name, number in result["versions"].items())
    lines.append(
        f"\n{libraries}. Commit {result['commit']}, {result['machine']['cpu']}, `{result['command']}`."
    )
    if result.get("matrix"):
        lines += ["", matrix_table(result["matrix"])]
    return "\n".join(lines) + "\n"


def round_trips(columns: dict[str, Any]) -> list[str]:
    """The hashes by library and pipeline."""
    found = []
    for name, rows in columns.items():
        cells = rows.get("three round trips: same files", {})
        hashes = [f"{p} {c['remark'].split()[-1]}" for p, c in cells.items() if c["result"] == "yes"]
        if hashes:
            found.append(f"{name} " + ", ".join(hashes))
    return found


def main() -> None:
    """Run, print and write."""
    parser = harness.parser(__doc__, out=OUT)
    parser.add_argument("--library", help="only columns whose name has this in it; no results written")
    parser.add_argument("--only", help="only steps whose title has this in it; no results written")
    parser.add_argument("--limit-s", type=float, default=120, help="for one step")
    parser.add_argument("--matrix", action="store_true", help="difloat's kinds of layers by modes, too")
    parser.add_argument("--table", action="store_true", help="print the last run, try nothing")
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)  # of a part in a process of its own
    parser.add_argument("--column", help=argparse.SUPPRESS)
    options = harness.arguments(parser)
    if options.table:
        sys.stdout.write(table(json.loads(options.out.read_text())))
    elif options.column:
        rows = column(options.column, options.work, options.only, options.limit_s)
        (options.work / f"{options.column}.json").write_text(json.dumps(rows))
    elif options.work:
        from steps import prepare

        prepare(options.work)
    else:
        result = {**harness.facts(), **compare(options)}
        result["matrix"] = matrix() if options.matrix else {}
        sys.stdout.write(table(result))
        if not (options.only or options.library):
            harness.write(options.out, result)


if __name__ == "__main__":
    main()
