"""Hygiene of the source tree: directions of imports, what importing costs, sizes, docstrings, forbidden words."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import difloat

ROOT = Path(difloat.__file__).parent
FILES = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.rglob("*.py"))
ORDER: tuple[set[str], ...] = (
    {"cache_entries", "numbers", "torch_modes"},
    {"plan"},
    {"kernels"},
    {"layers"},
    {"devices", "distributed", "pipelines"},
    {"calibration"},
    {"lora", "methods"},
    {"recipes"},
    {"checkpoint", "reference_models"},
    {"api", "components", "interchange", "job"},
    {"evaluation"},
    {"report"},
    {"encoded_prompts", "estimate", "load_errors", "run", "run_from_disk", "sources"},
    {"cli"},
    {"__init__", "__main__"},
)  # a folder (or a file beside the folders) imports itself, its neighbours in the same set, and what stands before it
LAZY = {
    "diffusers",
    "transformers",
    "accelerate",
    "peft",
    "matplotlib",
    "jinja2",
    "torchvision",
    "torchmetrics",
}
INTEGRATION = {  # these subclass the library's own classes, and are imported once the library is in use
    "checkpoint/config.py": {"diffusers", "transformers"},
    "checkpoint/diffusers_quantizer.py": {"diffusers"},
    "checkpoint/transformers_quantizer.py": {"transformers"},
    "lora/peft_layers.py": {"peft"},
}
FILE_LINES, FUNCTION_LINES, RECIPE_LINES, ARGUMENTS = 400, 60, 120, 9

Function = ast.FunctionDef | ast.AsyncFunctionDef


@cache
def tree(file: str) -> ast.Module:
    return ast.parse((ROOT / file).read_text(encoding="utf-8"), file)


def rank(folder: str) -> int:
    """Place of a folder, or of a file beside the folders, in `ORDER`; fails where nobody gave it one."""
    places = [place for place, names in enumerate(ORDER) if folder in names]
    assert len(places) == 1, (
        f"{folder} must stand once in ORDER of {Path(__file__).name}, got {len(places)} times"
    )
    return places[0]


def imports(nodes: Iterator[ast.AST] | list[ast.stmt]) -> Iterator[str]:
    """Dotted names that import statements among `nodes` name; ``from difloat import x`` counts as ``difloat.x``."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, "relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def first_level(name: str) -> str:
    """`difloat.checkpoint.layout.read` to `checkpoint`; a name of the package itself, such as `difloat.save`, to `__init__`."""
    part = name.split(".")[1] if "." in name else "__init__"
    return part if (ROOT / f"{part}.py").exists() or (ROOT / part).is_dir() else "__init__"


def functions(node: ast.AST) -> Iterator[Function]:
    yield from (child for child in ast.walk(node) if isinstance(child, Function))


def public_definitions(node: ast.Module | ast.ClassDef) -> Iterator[Function | ast.ClassDef]:
    for child in node.body:
        if isinstance(child, Function | ast.ClassDef) and not child.name.startswith("_"):
            yield child
            if isinstance(child, ast.ClassDef):
                yield from public_definitions(child)


@pytest.mark.parametrize("file", FILES)
def test_imports_look_left(file: str) -> None:
    own = file.split("/")[0].removesuffix(".py")
    used = {first_level(name) for name in imports(ast.walk(tree(file))) if name.split(".")[0] == "difloat"}
    wrong = sorted(name for name in used if rank(name) > rank(own))
    assert not wrong, f"{file} may not import {wrong}: see ORDER"


@pytest.mark.parametrize("file", FILES)
def test_heavy_libraries_are_imported_inside_functions(file: str) -> None:
    found = {name.split(".")[0] for name in imports(tree(file).body)}
    assert not found & LAZY - INTEGRATION.get(file, set())


def test_no_recipe_imports_another() -> None:
    for path in (ROOT / "recipes").glob("*.py"):
        if path.stem != "__init__":
            used = set(imports(ast.walk(tree(f"recipes/{path.name}"))))
            assert not {name for name in used if name.startswith("difloat.recipes")}, path.name


def test_importing_the_package_touches_neither_diffusers_nor_a_gpu() -> None:
    code = (
        "import sys, torch; seed = torch.initial_seed(); import difloat; "
        f"print(sorted({LAZY!r} & set(sys.modules)), torch.cuda.is_initialized(), torch.initial_seed() == seed)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["[]", "False", "True"]


_SIDE_EFFECTS = """
import os, sys, torch
from torch.nn.modules import module
hooks = [table for name, table in vars(module).items() if name.startswith("_global_") and isinstance(table, dict)]
assert len(hooks) > 5
forks, finders, sizes = [], list(sys.meta_path), [len(table) for table in hooks]
os.register_at_fork = lambda **callbacks: forks.append(callbacks)
import difloat
added = {type(finder).__module__ for finder in sys.meta_path if finder not in finders}
print(forks, [len(table) for table in hooks] == sizes, added == {"difloat.checkpoint.register"})
from difloat.layers.packed import empty_like
empty_like(torch.nn.Linear(2, 2)), empty_like(torch.nn.Linear(2, 2))
print(sum(map(len, hooks)) - sum(sizes))
"""


def test_importing_the_package_registers_with_the_libraries_and_nothing_else() -> None:
    command = [sys.executable, "-c", _SIDE_EFFECTS]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    imported, first_layer = result.stdout.splitlines()
    assert imported == "[] True True"
    assert first_layer == "1", (
        "the hook by which PEFT's wrappers know packed layers comes with the first, once"
    )


@pytest.mark.parametrize("file", FILES)
def test_public_names_have_docstrings_and_annotations(file: str) -> None:
    assert not tree(file).body or ast.get_docstring(tree(file)), f"{file} has no docstring"
    for definition in public_definitions(tree(file)):
        assert ast.get_docstring(definition), f"{definition.name} has no docstring"
        if isinstance(definition, Function):
            arguments = definition.args.posonlyargs + definition.args.args + definition.args.kwonlyargs
            bare = [a.arg for a in arguments if a.annotation is None and a.arg not in ("self", "cls")]
            assert definition.returns is not None and not bare, (
                f"{definition.name} lacks annotations: {bare or 'return'}"
            )


@pytest.mark.parametrize("file", FILES)
def test_files_and_functions_are_short(file: str) -> None:
    lines = len((ROOT / file).read_text(encoding="utf-8").splitlines())
    assert lines <= (RECIPE_LINES if file.startswith("recipes/") else FILE_LINES)
    long = {f.name: n for f in functions(tree(file)) if (n := f.end_lineno - f.lineno + 1) > FUNCTION_LINES}
    assert not long


@pytest.mark.parametrize("file", [file for file in FILES if not file.startswith("kernels/triton/")])
def test_functions_take_few_arguments(file: str) -> None:
    """Commands of the command line included; only Triton's kernels, which know no records, take more."""
    many = {}
    for function in functions(tree(file)):
        named = function.args.posonlyargs + function.args.args + function.args.kwonlyargs
        many[f"{function.name}:{function.lineno}"] = len([a for a in named if a.arg not in ("self", "cls")])
    assert not {name: count for name, count in many.items() if count > ARGUMENTS}


@pytest.mark.parametrize("file", FILES)
def test_nothing_is_swallowed_and_only_the_cli_prints(file: str) -> None:
    for node in ast.walk(tree(file)):
        if isinstance(node, ast.ExceptHandler):
            assert node.type is not None, f"bare except in line {node.lineno}"
            names = {name.id for name in ast.walk(node.type) if isinstance(name, ast.Name)}
            cleans_up = isinstance(node.body[-1], ast.Raise) and node.body[-1].exc is None
            assert cleans_up or not names & {"Exception", "BaseException"}, (
                f"line {node.lineno} catches everything"
            )
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id != "print" or file.startswith("cli/"), f"print in line {node.lineno}"


@pytest.mark.parametrize("file", FILES)
def test_no_global_seed(file: str) -> None:
    calls = [node.func for node in ast.walk(tree(file)) if isinstance(node, ast.Call)]
    seeds = [
        f
        for f in calls
        if isinstance(f, ast.Attribute) and f.attr == "manual_seed" and ast.unparse(f.value) == "torch"
    ]
    assert not seeds
