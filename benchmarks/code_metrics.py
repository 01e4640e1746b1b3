"""How large and how tangled the source is: lines, functions, arguments, comments, import chains, Python calls per layer call.

python benchmarks/code_metrics.py                 # this checkout
python benchmarks/code_metrics.py --root OTHER    # another one (for a table of before and after)

Prints one JSON object. Everything but the Python calls is counted in the text of the source; those are counted by
`sys.setprofile` while packed layers of the imported package run once, warm.
"""

from __future__ import annotations

import argparse
import ast
import json
import statistics
import subprocess
import sys
from collections.abc import Container, Iterator
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
_CALLS = """
import json, sys, torch
from torch import nn

sys.path.insert(0, sys.argv[1])
import difloat

def count(run):
    calls = 0
    def seen(frame, event, argument):
        nonlocal calls
        calls += event == "call"
    with torch.no_grad():
        run(); run()
        sys.setprofile(seen)
        try: run()
        finally: sys.setprofile(None)
    return calls - 1  # the lambda itself

class Denoiser(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.layer, self.last = (nn.Linear(64, 64) for _ in range(3))
        self.conv = nn.Conv2d(64, 64, 3, padding=1)
    def forward(self, x, timestep):
        y = self.last(self.layer(self.first(x.flatten(2).mT)))
        return self.conv(y.mT.unflatten(2, (8, 8)))

torch.manual_seed(0)
result = {}
mixed = {"epochs": 1, "rank": 1, "relation": "off", "keep_8bit": (), "ranges_by_timestep": False}
for name, recipe, options in (("plain", "rtn", {"keep_8bit": (), "activation": "static"}), ("mixed", "mpqdm", mixed)):
    model = Denoiser()
    loop = lambda m: [m(torch.randn(2, 64, 8, 8), torch.tensor([float(t)] * 2)) for t in (900, 500, 100)]
    try:
        difloat.quantize(model, recipe, "w4a8", forward_loop=loop, progress=False, samples=6, **options)
    except ValueError as error:
        result[name] = str(error)
        continue
    rows, picture = torch.randn(64, 64), torch.randn(1, 64, 8, 8)
    result[f"{name} linear"] = count(lambda: model.layer(rows))
    result[f"{name} conv2d"] = count(lambda: model.conv(picture))
print(json.dumps(result))
"""


def main() -> None:
    """Measure a checkout and print what was found."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--root", type=Path, default=ROOT, help="checkout to measure")
    root = parser.parse_args().root
    package = root / "src" / "difloat"
    files = sorted(package.rglob("*.py"))
    found = {
        "lines": {"all": sum(map(_lines, files)), **_lines_by_folder(package, files)},
        "functions": _functions(files),
        "comment lines, %": _comments(files),
        "longest import chain": _longest_chain(package, files),
        "Python calls per layer call": _calls(root),
    }
    print(json.dumps(found, indent=2))


def _lines(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


def _lines_by_folder(package: Path, files: list[Path]) -> dict[str, int]:
    folders: dict[str, int] = {}
    for path in files:
        parts = path.relative_to(package).parts
        folder = parts[0] if len(parts) > 1 else "beside the folders"
        folders[folder] = folders.get(folder, 0) + _lines(path)
    return dict(sorted(folders.items()))


def _functions(files: list[Path]) -> dict[str, float]:
    lengths, wide, wide_outside, count_outside = [], 0, 0, 0
    for path in files:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            lengths.append((node.end_lineno or 0) - node.lineno + 1)
            arguments = node.args.posonlyargs + node.args.args + node.args.kwonlyargs
            many = len([a for a in arguments if a.arg not in ("self", "cls")]) >= 8
            wide += many
            if "triton" not in path.as_posix():
                wide_outside += many
                count_outside += 1
    tenths = statistics.quantiles(lengths, n=10)
    return {
        "count": len(lengths),
        "median": statistics.median(lengths),
        "p90": round(tenths[-1]),
        "max": max(lengths),
        "8 or more arguments, %": round(100 * wide / len(lengths), 1),
        "the same outside Triton, %": round(100 * wide_outside / count_outside, 1),
    }


def _comments(files: list[Path]) -> float:
    lines = [line for path in files for line in path.read_text(encoding="utf-8").splitlines()]
    return round(100 * sum(line.lstrip().startswith("#") for line in lines) / len(lines), 1)


def _longest_chain(package: Path, files: list[Path]) -> list[str]:
    """The longest chain of modules that import each other while they are imported themselves."""
    names = {path: ".".join(("difloat", *path.relative_to(package).with_suffix("").parts)) for path in files}
    known = {name.removesuffix(".__init__"): path for path, name in names.items()}

    @cache
    def below(name: str) -> tuple[str, ...]:
        tree = ast.parse(known[name].read_text(encoding="utf-8"))
        used = {module for module in _imported(tree.body, known) if module in known and module != name}
        chains = [below(module) for module in sorted(used - {"difloat"})]
        return (name, *max(chains, key=len, default=()))

    return list(max((below(name) for name in known), key=len))


def _imported(body: list[ast.stmt], known: Container[str]) -> Iterator[str]:
    """Modules that statements import; of ``from package import module`` the module, not the package around it."""
    for node in body:
        if isinstance(node, ast.ImportFrom) and node.module:
            full = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from (name if name in known else node.module for name in full)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def _calls(root: Path) -> Any:
    done = subprocess.run(
        [sys.executable, "-c", _CALLS, str(root / "src")],
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    main()
