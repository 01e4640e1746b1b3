"""Documents keep their word: commands parse, Python compiles, links lead somewhere, examples run."""

from __future__ import annotations

import ast
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

import difloat
from difloat import api, cli, evaluate, recipes, reference_models
from difloat.evaluation import comparison

# diffusers' DPM solver hands torch tensors to numpy in a way numpy 2 deprecates; nothing here can change that.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
EXAMPLES = {
    "train_lora.py": ["--pictures", "4", "--steps", "2", "--iterations", "8", "--rank", "2"],
    "load_anywhere.py": ["--weights", "e2m1"],
    "plain_module.py": ["--iterations", "20", "--width", "8"],
    "quantize_pipeline.py": ["--samples", "6", "--steps", "2", "--iterations", "2", "--images", "2"],
}


def blocks(page: Path, language: str) -> list[str]:
    """Contents of the fenced blocks of one language, "" for those without."""
    found = re.findall(r"^```(\w*)\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    return [text for name, text in found if name == language]


SHELL = ("", "sh", "bash")


def lines_of(page: Path) -> list[str]:
    """Lines of the shell blocks that are no drawing or formula, without comments."""
    lines = [line for language in SHELL for text in blocks(page, language) for line in text.splitlines()]
    shell = [line.split("  #")[0].strip() for line in lines]
    return [line for line in shell if line and not re.search(r" <- | -> |^out\[|\\->", line)]


def commands(page: Path) -> list[str]:
    """Calls of difloat in the order of the page; a launcher in front of one is left out."""
    found = [re.sub(r"^.*? -m difloat ", "difloat ", line) for line in lines_of(page)]
    return [line for line in found if line.startswith("difloat ")]


def test_there_are_commands_for_every_verb() -> None:
    verbs = {command.split()[1] for page in PAGES for command in commands(page)}
    assert verbs == set(typer.main.get_command(cli.app).commands)


def test_pages_show_what_was_measured() -> None:
    """The tables between the marks are those of benchmarks/results, and no mark is missing."""
    script = ROOT / "benchmarks" / "quality_pages.py"
    done = subprocess.run([sys.executable, str(script), "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    texts = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    for result in (ROOT / "benchmarks" / "results").glob("quality-*.json"):
        assert f"<!-- {result.stem.replace('-', ' ', 1)} -->" in texts


@pytest.mark.parametrize("page", [*PAGES, ROOT / "training" / "README.md"], ids=lambda page: page.name)
def test_other_commands_name_what_exists(page: Path) -> None:
    """What is not run below: targets of make, scripts of this repository with their options, installers."""
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    for line in lines_of(page):
        words = shlex.split(line)
        if words[0] == "make":
            assert words[1] in targets, line
        elif words[0].endswith("python") and words[1] != "-m":
            script = (ROOT / words[1]).read_text(encoding="utf-8")
            if "import harness" in script:  # which has the options that all share
                script += (ROOT / "benchmarks" / "harness.py").read_text(encoding="utf-8")
            missing = [word for word in words[2:] if word.startswith("--") and f'"{word}"' not in script]
            assert not missing, (line, missing)
        else:
            known = ("difloat", "pip", "sudo", "cmake", "accelerate", "torchrun")
            assert words[0] in known or words[1:2] == ["-m"], (
                f"{page.name} has a line that no test reads: {line}"
            )


# What is run: every call of difloat and every block of Python, in the order of the page, on tiny models

# Sections that need more than a tiny model, and the test that runs what stands in them, or the example that shows it.
ELSEWHERE = {"LoRA": "test_lora.py::test_the_guide_runs", "Loading": "test_docs.py::test_examples_run"}
# What a reader of a page has at its end, so that a page whose commands are no longer found does not pass.
MADE = {"guide.md": {"small", "better", "shipped", "dit", "four", "repaired", "careful", "whole", "again"}}
QUICK = {"samples": 6, "steps": 2, "iterations": 2, "rounding_rows": 4, "epochs": 1, "rows": 2, "rank": 2}
FEWER = {
    "quantize": ["--samples", "6", "--steps", "2", "--images", "0"],
    "repair": ["--epochs", "1", "--samples", "6", "--steps", "2", "--images", "0"],
    "generate": ["--count", "2"],
    "evaluate": ["--samples", "2"],
    "diagnose": ["--samples", "4", "--images", "1", "--steps", "2"],
}


def known_to(recipe: str) -> set[str]:
    return set(recipes.RECIPES[recipe].options.__dataclass_fields__)


@pytest.fixture(scope="module")
def tiny_world() -> Iterator[pytest.MonkeyPatch]:
    """Embedded models are tiny ones, recipes take few rows and steps."""
    from tiny import tiny_pixart, tiny_unet

    plan, generate = api.plan, evaluate.generate

    def quick(model: object, recipe: str = "auto", bits: str = "w4a8", **given: object) -> object:
        wanted = {name: value for name, value in QUICK.items() if name in known_to(recipe)}
        wanted |= {name: QUICK[name] for name in ("samples", "steps")}
        return plan(model, recipe, bits, **{**given, **wanted})

    def draw(*given: Any, **more: Any) -> evaluate.Generated:
        return generate(*given, **{**more, "steps": 2})

    with pytest.MonkeyPatch.context() as patch:
        make = {"emoji-unet": tiny_unet, "emoji-pixart": lambda: tiny_pixart(blocks=1)}
        patch.setattr(reference_models, "load", lambda name: make[name]())
        patch.setattr(api, "plan", quick)
        for name in ("frechet_interval", "frechet_ratio_interval"):
            patch.setattr(comparison, name, lambda *_, **__: evaluate.Estimate(1.0, 1.0, 1.0))
        patch.setattr(evaluate, "generate", draw)
        yield patch


def carry_out(command: str, patch: pytest.MonkeyPatch) -> int:
    """Run a call of difloat in this process, with fewer rows, steps and pictures; its exit code."""
    words = shlex.split(command)
    words += FEWER.get(words[1], [])
    if words[1] == "quantize":
        recipe = words[words.index("--recipe") + 1] if "--recipe" in words else "auto"
        quick = [name for name in QUICK if name in known_to(recipe)]
        words += [word for name in quick for word in ("--set", f"{name}={QUICK[name]}")]
    patch.setattr("sys.argv", words)
    try:
        cli.main()
    except SystemExit as stopped:
        return int(stopped.code or 0)
    return 0


def run_page(page: Path, directory: Path, patch: pytest.MonkeyPatch) -> None:
    """Everything on a page, in the order in which it stands there."""
    patch.chdir(directory)
    sections = re.split(r"^## ", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    here = "\n".join(text for text in sections if text.splitlines()[0] not in ELSEWHERE)
    found = re.findall(r"^```(\w*)\n(.*?)^```", here, re.MULTILINE | re.DOTALL)
    on_page = commands(page)
    for language, text in found:
        if language == "python":
            exec(compile(text, f"{page.name}: {text.splitlines()[0]}", "exec"), {"__name__": "snippet"})
        elif language in SHELL:
            lines = [line.split("  #")[0].strip() for line in text.splitlines()]
            lines = [re.sub(r"^.*? -m difloat ", "difloat ", line) for line in lines]
            for command in (line for line in lines if line in on_page):
                allowed = (0, 1) if "--fail-under" in command else (0,)  # tiny models may miss a gate
                assert carry_out(command, patch) in allowed, f"{page.name}: {command}"


def test_sections_that_are_run_elsewhere_are() -> None:
    text = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
    for section, test in ELSEWHERE.items():
        file, name = test.split("::")
        assert f"def {name}(" in (ROOT / "tests" / file).read_text(encoding="utf-8")
        assert f"\n## {section}\n" in text


@pytest.fixture(scope="module")
def after_readme(tiny_world: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory in which a reader has done everything in the README; other pages start there."""
    directory = tmp_path_factory.mktemp("readme")
    before = os.getcwd()
    try:
        run_page(ROOT / "README.md", directory, tiny_world)
    finally:
        os.chdir(before)
    return directory


def test_everything_in_the_readme_runs(after_readme: Path) -> None:
    assert {"out", "pictures", "emoji-w4a8"} <= {path.name for path in after_readme.iterdir()}
    assert (after_readme / "out" / "report.html").is_file()


@pytest.mark.parametrize(
    "page",
    [page for page in PAGES if page.name != "README.md" and (commands(page) or blocks(page, "python"))],
    ids=lambda page: page.name,
)
def test_everything_on_other_pages_runs(
    page: Path, after_readme: Path, tiny_world: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    before, directory = os.getcwd(), Path(shutil.copytree(after_readme, tmp_path / "page"))
    try:
        run_page(page, directory, tiny_world)
    finally:
        os.chdir(before)
    assert MADE.get(page.name, set()) <= {path.name for path in directory.iterdir()}


def test_the_readme_is_short() -> None:
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) < 120


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_in_documents_names_what_exists(page: Path) -> None:
    for text in blocks(page, "python"):
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "difloat":
                assert hasattr(difloat, node.attr), node.attr


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_to_files_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)#\s]+)", page.read_text(encoding="utf-8"))
    missing = [link for link in links if "://" not in link and not (page.parent / link).exists()]
    assert not missing


def test_public_names_exist_and_are_in_documents() -> None:
    text = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
    assert [name for name in difloat.__all__ if not hasattr(difloat, name)] == []
    assert [name for name in difloat.__all__ if not re.search(rf"\b{name}\b", text)] == []


def test_every_recipe_file_is_in_the_table() -> None:
    files = {path.stem for path in Path(recipes.__file__).parent.glob("*.py")} - {"__init__"}
    assert files == {row.plan.__module__.rsplit(".", 1)[1] for row in recipes.RECIPES.values()}


def test_every_example_is_run() -> None:
    assert {path.name for path in (ROOT / "examples").glob("*.py")} == set(EXAMPLES)


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_run(name: str, tmp_path: Path) -> None:
    arguments = [*EXAMPLES[name], "--out", str(tmp_path / "out")]
    if name != "plain_module.py":
        from tiny import tiny_unet

        tiny_unet().save_pretrained(tmp_path / "tiny")
        arguments += ["--model", str(tmp_path / "tiny")]
    script = ROOT / "examples" / name
    result = subprocess.run([sys.executable, script, *arguments], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    if name == "train_lora.py":
        before, after = map(float, re.findall(r"loss ([\d.]+) before, ([\d.]+) after", result.stdout)[0])
        assert after < before and (tmp_path / "out" / "pytorch_lora_weights.safetensors").is_file()
    else:
        assert all(finding.passed for finding in difloat.verify(tmp_path / "out"))


def test_no_paths_of_a_machine_in_text_files() -> None:
    files = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    pattern = re.compile(r"(?<![\w.])/(?:home|root|work|Users)/\w")
    texts = [
        f
        for f in files
        if f.endswith((".py", ".md", ".toml", ".txt", ".json", "Makefile")) and (ROOT / f).exists()
    ]
    found = [
        f
        for f in texts
        if f != "tests/test_docs.py" and pattern.search((ROOT / f).read_text(encoding="utf-8"))
    ]
    assert not found
