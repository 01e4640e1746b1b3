"""What the benchmarks share: calls in turn, and results that say what they are of."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

SCRIPTS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def harness() -> ModuleType:
    spec = importlib.util.spec_from_file_location("harness", SCRIPTS / "harness.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_contestants_take_turns_in_rotated_order(harness: ModuleType) -> None:
    called: list[str] = []
    calls = {name: lambda name=name: called.append(name) for name in "abc"}
    times = harness.interleaved(calls, 3)
    assert "".join(called) == "abcbcacab" and [len(found) for found in times.values()] == [3, 3, 3]
    called.clear()
    turns: list[int] = []
    times = harness.interleaved(
        {"a": calls["a"]},
        4,
        pause_s=0.01,
        prelude=True,
        budget_s=0.025,
        after_turn=lambda turn, _: turns.append(turn),
    )
    assert 1 <= len(turns) < 4  # a third turn would end after the budget
    assert turns == [*range(1, len(turns) + 1)] and len(times["a"]) == len(turns)
    assert called == ["a"] * 2 * len(turns)
    assert harness.medians({"a": [3.0, 1.0, 2.0]}) == {"a": 2.0}


def test_results_say_what_they_are_of(
    harness: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["somewhere/kernels.py", "--quick"])
    monkeypatch.setenv("DIFLOAT_CPU_ISA", "avx2")
    file = tmp_path / "results" / "x.json"
    harness.write(file, {"rows": [1], "versions": {"other": "2"}})
    found = json.loads(file.read_text())
    assert found["command"] == "DIFLOAT_CPU_ISA=avx2 python benchmarks/kernels.py --quick"
    assert found["rows"] == [1] and found["versions"] == {"other": "2"}
    assert {"commit", "machine"} <= found.keys() and found["machine"]["threads"] >= 1
    assert harness.add(file, {"more": 2}) == {**found, "more": 2} == harness.stored(file)
    assert harness.stored(tmp_path / "none.json") == {}


def test_a_script_takes_its_arguments(harness: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["x.py", "--repeats", "5"])
    monkeypatch.setattr(sys, "path", [str(SCRIPTS), *sys.path])
    options = harness.arguments(harness.parser("What it does.", repeats=3, out=Path("here.json")))
    assert vars(options) == {"repeats": 5, "out": Path("here.json")}
    assert str(SCRIPTS) not in sys.path


@pytest.mark.parametrize(
    "script", sorted(path.stem for path in SCRIPTS.glob("*.py") if path.stem != "harness")
)
def test_nothing_is_imported_from_another_script_but_what_is_shared(script: str) -> None:
    """Commit, machine and times stand in one place."""
    text = (SCRIPTS / f"{script}.py").read_text(encoding="utf-8")
    assert "rev-parse" not in text and "sys.path.remove" not in text and "from quantization_time" not in text
