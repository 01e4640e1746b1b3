"""Size and structure of the source: lines, functions, arguments, comments, duplicates, import chains, Python calls of layers.

python benchmarks/code_metrics.py                    # this checkout, as JSON
python benchmarks/code_metrics.py --root OTHER       # another checkout, as JSON
python benchmarks/code_metrics.py --against 9cfdd59  # a Markdown table of that commit and this checkout

Everything but the Python calls is counted in the text of the source. Those are counted by `sys.setprofile` while packed layers
of the imported package run once, warm. A comment line is one with a comment at its end or on its own, directives to tools
(`# type:`, `# noqa`, `# fmt:`) aside. Lines of code are those that are left without docstrings, comments, imports, blank lines
and lines of brackets. A duplicate pair is two places whose code is the same for at least six lines of code.
A longer run counts once.
"""

from __future__ import annotations

import argparse
import ast
import io
import json
import statistics
import subprocess
import sys
import tarfile
import tempfile
import tokenize
from collections.abc import Callable, Container, Iterator
from functools import cache
from itertools import combinations
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
_DIRECTIVES = ("# type:", "# noqa", "# fmt:")
_RUN = 6  # lines of a duplicate
_CALLS = """
import json, sys, torch
from torch import nn

# The finder of an editable installation goes before the path, and would give its own source for every checkout.
sys.meta_path[:] = [finder for finder in sys.meta_path if "editable" not in type(finder).__module__]
sys.path.insert(0, sys.argv[1])
import difloat
assert difloat.__file__.startswith(sys.argv[1]), difloat.__file__

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
    """Measure a checkout, or two, and print what was found."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--root", type=Path, default=ROOT, help="checkout to measure")
    parser.add_argument("--against", help="commit to compare with, as a Markdown table")
    given = parser.parse_args()
    if given.against is None:
        print(json.dumps(measure(given.root), indent=2))
        return
    with tempfile.TemporaryDirectory() as folder:
        archive = subprocess.run(
            ["git", "archive", given.against, "src"], cwd=given.root, capture_output=True, check=True
        )
        with tarfile.open(fileobj=io.BytesIO(archive.stdout)) as tar:
            tar.extractall(folder, filter="data")
        print(table(given.against, measure(Path(folder)), measure(given.root)))


def measure(root: Path) -> dict[str, Any]:
    """All numbers of one checkout."""
    package = root / "src" / "difloat"
    files = sorted(package.rglob("*.py"))
    return {
        "lines": _by_folder(package, files, _lines),
        "of those code": _by_folder(package, files, lambda path: len(_code_lines(path))),
        "functions": _functions(files),
        "lines with a comment, %": _comments(files),
        "duplicate pairs of six lines": _duplicates(files),
        "longest import chain": _longest_chain(package, files),
        "Python calls per layer call": _calls(root),
    }


def table(commit: str, before: dict[str, Any], after: dict[str, Any]) -> str:
    """A Markdown table of two checkouts. Folders that only one of them has are shown with a dash."""
    rows = [(f"| | {commit} | now |", "|---|---|---|")]
    pairs: list[tuple[str, Any, Any]] = []
    for name in ["all", *sorted((before["lines"].keys() | after["lines"].keys()) - {"all"})]:
        label = "lines of `src`" if name == "all" else f"lines of `{name}/`"
        label = "lines beside the folders" if name == "beside the folders" else label
        pairs.append((f"{label} (of those code)", *(_of_code(found, name) for found in (before, after))))
    for name in after["functions"]:
        pairs.append((f"functions: {name}", before["functions"][name], after["functions"][name]))
    for name in ("lines with a comment, %", "duplicate pairs of six lines"):
        pairs.append((name, before[name], after[name]))
    chains = len(before["longest import chain"]), len(after["longest import chain"])
    pairs.append(("modules of the longest import chain", *chains))
    for name, count in after["Python calls per layer call"].items():
        pairs.append(
            (f"Python calls of a {name} layer", before["Python calls per layer call"].get(name, "-"), count)
        )
    return "\n".join([*rows[0], *(f"| {name} | {old} | {new} |" for name, old, new in pairs)])


def _lines(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


def _of_code(found: dict[str, Any], folder: str) -> str:
    lines = found["lines"].get(folder)
    return "-" if lines is None else f"{lines} ({found['of those code'][folder]})"


def _by_folder(package: Path, files: list[Path], count: Callable[[Path], int]) -> dict[str, int]:
    """Counts of all files, and of those of every folder."""
    folders: dict[str, int] = {}
    for path in files:
        parts = path.relative_to(package).parts
        folder = parts[0] if len(parts) > 1 else "beside the folders"
        folders[folder] = folders.get(folder, 0) + count(path)
    return {"all": sum(folders.values()), **dict(sorted(folders.items()))}


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
    lines, commented = 0, 0
    for path in files:
        text = path.read_text(encoding="utf-8")
        lines += len(text.splitlines())
        tokens = tokenize.generate_tokens(io.StringIO(text).readline)
        comments = (token for token in tokens if token.type == tokenize.COMMENT)
        commented += sum(not token.string.startswith(_DIRECTIVES) for token in comments)
    return round(100 * commented / lines, 1)


def _duplicates(files: list[Path]) -> int:
    places: dict[tuple[str, ...], list[tuple[Path, int]]] = {}
    for path in files:
        code = _code_lines(path)
        for start in range(len(code) - _RUN + 1):
            places.setdefault(tuple(code[start : start + _RUN]), []).append((path, start))
    pairs = {pair for same in places.values() for pair in combinations(same, 2)}
    return sum(((one, at - 1), (other, then - 1)) not in pairs for (one, at), (other, then) in pairs)


def _code_lines(path: Path) -> list[str]:
    """The lines of code of a file, without indentation, docstrings, comments, imports and lines of brackets."""
    text = path.read_text(encoding="utf-8")
    left_out: set[int] = set()
    for node in ast.walk(ast.parse(text)):
        docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        if docstring or isinstance(node, ast.Import | ast.ImportFrom):
            left_out |= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    stripped = ((number, line.split("  # ")[0].strip()) for number, line in enumerate(text.splitlines(), 1))
    return [
        line
        for number, line in stripped
        if number not in left_out and line.strip("()[]{},: ") and not line.startswith("#")
    ]


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
