"""Documents keep their word: commands parse, Python compiles, links lead somewhere, examples run."""

from __future__ import annotations

import ast
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer

import difloat
from difloat import cli, recipes

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


def commands() -> list[str]:
    lines = [
        line for page in PAGES for language in ("", "sh", "bash") for text in blocks(page, language)
        for line in text.splitlines()
    ]  # fmt: skip
    return sorted({line.split("  #")[0].strip() for line in lines if line.startswith("difloat ")})


@pytest.mark.parametrize("command", commands())
def test_commands_in_documents_parse(command: str) -> None:
    verb, *arguments = shlex.split(command)[1:]
    parser = typer.main.get_command(cli.app).commands[verb]
    parser.make_context(verb, [a for a in arguments if a != "..."])


def test_there_are_commands_for_every_verb() -> None:
    assert {command.split()[1] for command in commands()} == set(typer.main.get_command(cli.app).commands)


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
