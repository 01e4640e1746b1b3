"""Examples in docstrings run, and every public function and class has one."""

from __future__ import annotations

import doctest
import importlib
import inspect
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
