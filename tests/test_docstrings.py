"""Examples in docstrings run, and every public function and class has one."""

from __future__ import annotations

import ast
import doctest
import importlib
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

import difloat

PACKAGE = Path(difloat.__file__).parent
NAMESPACES = ("formats", "evaluate", "lora", "interchange")


def _modules() -> Iterator[ModuleType]:
    """The modules with an example somewhere in their text."""
    for path in sorted(PACKAGE.rglob("*.py")):
        if ">>> " in path.read_text(encoding="utf-8"):
            parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
            yield importlib.import_module(".".join(parts).removesuffix(".__init__"))


def _examples() -> dict[str, doctest.DocTest]:
    finder = doctest.DocTestFinder(exclude_empty=True)
    found = [test for module in _modules() for test in finder.find(module) if test.examples]
    return {test.name: test for test in found}


EXAMPLES = _examples()


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_run(name: str, tmp_path, monkeypatch) -> None:
    """Every example gives what it shows, in an empty folder and from one seed."""
    monkeypatch.chdir(tmp_path)
    runner = doctest.DocTestRunner(verbose=False, optionflags=doctest.NORMALIZE_WHITESPACE)
    report: list[str] = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        failed, attempted = runner.run(EXAMPLES[name], out=report.append)
    assert attempted and not failed, "".join(report)


def _public() -> dict[str, object]:
    """Functions and classes that a user of the package reaches by ``difloat.name`` or ``difloat.namespace.name``."""
    found = {name: getattr(difloat, name) for name in difloat.__all__}
    for space in NAMESPACES:
        module = found.pop(space)
        names = getattr(module, "__all__", [name for name in vars(module) if not name.startswith("_")])
        for name in names:
            member = getattr(module, name)
            # Without an `__all__` the names that a module imports are not its own.
            if hasattr(module, "__all__") or getattr(member, "__module__", None) == module.__name__:
                found[f"{space}.{name}"] = member
    return {
        name: member for name, member in found.items() if inspect.isclass(member) or inspect.isroutine(member)
    }


@pytest.mark.parametrize("name", _public())
def test_public_names_have_an_example(name: str) -> None:
    """An example of a function or class is in its own docstring, so that ``help`` shows it."""
    assert ">>> " in (_public()[name].__doc__ or ""), f"difloat.{name} must show an example, got none"


_FRAGMENT = re.compile(r"(Of|As|Likewise|See|Those|Also|Its|Without|By|From|Like) ")
_ENTRY = re.compile(r" {4,}(?:\*{0,2}[a-z_]\w*(?:, \w+)*|[A-Z]\w*Error): (.*)")


@pytest.mark.parametrize(
    "file", [path.relative_to(PACKAGE).as_posix() for path in sorted(PACKAGE.rglob("*.py"))]
)
def test_docstrings_begin_with_what_they_speak_of(file: str) -> None:
    """The first line and the entries below "Args:" are no leftovers of a sentence, like "Of the layer." or "As above."."""
    tree = ast.parse((PACKAGE / file).read_text(encoding="utf-8"))
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    texts = [ast.get_docstring(node, clean=False) or "" for node in ast.walk(tree) if isinstance(node, kinds)]
    starts = [text.lstrip() for text in texts]
    starts += [entry[1] for text in texts for line in text.splitlines() if (entry := _ENTRY.fullmatch(line))]
    assert not [start.splitlines()[0] for start in starts if _FRAGMENT.match(start)]


@pytest.mark.parametrize("recipe", [path.stem for path in sorted((PACKAGE / "recipes").glob("[a-z]*.py"))])
def test_the_parts_that_a_recipe_page_names_are_there(recipe: str) -> None:
    page = importlib.import_module(f"difloat.recipes.{recipe}")
    named = re.findall(r"`([A-Za-z]\w*(?:\.\w+)+)`", page.__doc__ or "")
    missing = [name for name in named if not _is_there(name, page)]
    assert not missing, f"{recipe}.py names {missing}, which are neither in the package nor in the page"


def _is_there(name: str, page: ModuleType) -> bool:
    """Whether a dotted name is a module of difloat, something in one, or a field of something that the page imports."""
    *owners, last = name.split(".")
    for cut in range(len(owners), 0, -1):
        module = ".".join(["difloat", *owners[:cut]])
        if (PACKAGE.parent / module.replace(".", "/")).with_suffix(".py").is_file():
            return cut == len(owners) and hasattr(importlib.import_module(module), last)
    if (PACKAGE / "/".join(owners) / f"{last}.py").is_file():
        return True
    owner = vars(page).get(owners[0])
    return last in getattr(owner, "__dataclass_fields__", {})
