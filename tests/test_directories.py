"""Output directories: nothing of the user's is deleted, one run at a time, and killed runs leave nothing for good."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from difloat import checkpoint
from difloat.checkpoint import CheckpointError, directories
from difloat.checkpoint.directories import foreign_files, replace_file, reserved, resolved, whole_directory
from difloat.checkpoint.manifest import MANIFEST
from difloat.report import build, model_card
from test_checkpoint import GOLDEN, contents, quantized

OWN = ("report.json", "report-pictures.npz", "report.html")


@pytest.fixture
def target(tmp_path: Path) -> Path:
    """A checkpoint with its report and its card."""
    directory = checkpoint.save(quantized(), tmp_path / "out")
    for name in OWN:
        (directory / name).write_bytes(b"report")
    (directory / model_card.CARD).write_text(f"---\n---\n{directories.CARD_MARK}\n")
    (directory / f".{OWN[0]}.0a1b2c3d.partial").write_bytes(
        b"rep"
    )  # of a process killed while it wrote the report
    return directory


def test_difloats_own_files_are_replaced(target: Path) -> None:
    assert (build.RECORD, build.PICTURES, build.PAGE) == OWN
    assert foreign_files(target) == []
    checkpoint.save(quantized(), target, overwrite=True)
    assert contents(target) == contents(GOLDEN), "and nothing of the old report is left"


def own_card(target: Path) -> str:
    (target / model_card.CARD).write_text("my notes")
    return model_card.CARD


def nested(target: Path) -> str:
    (target / "notes/more").mkdir(parents=True)
    (target / "notes/more/thesis.txt").write_text("years")
    return "notes/more/thesis.txt"


def hidden(target: Path) -> str:
    (target / ".env").write_text("x")
    return ".env"


def link_to_file(target: Path) -> str:
    (target.parent / "elsewhere.txt").write_text("x")
    (target / "link").symlink_to(target.parent / "elsewhere.txt")
    return "link"


def link_to_directory(target: Path) -> str:
    (target.parent / "pictures").mkdir()
    (target / "pictures").symlink_to(target.parent / "pictures")
    return "pictures"


def nearly_own(target: Path) -> str:
    (target / ".thesis.txt.0a1b2c3d.partial").write_text("x")
    return ".thesis.txt.0a1b2c3d.partial"


def report_of_mine(target: Path) -> str:
    (target / "sub").mkdir()
    (target / "sub/report.html").write_text("x")
    return "sub/report.html"


FOREIGN = [own_card, nested, hidden, link_to_file, link_to_directory, nearly_own, report_of_mine]


@pytest.mark.parametrize("add", FOREIGN, ids=lambda add: add.__name__)
def test_a_file_of_the_users_is_named_and_kept(target: Path, add) -> None:
    name = add(target)
    before = contents(target)
    with pytest.raises(CheckpointError, match=rf"holds '{name}'.*; move that away or choose another"):
        checkpoint.save(quantized(1), target, overwrite=True)
    assert contents(target) == before


def test_a_file_that_comes_while_saving_is_kept(target: Path) -> None:
    with pytest.raises(CheckpointError, match="holds 'new.txt'"), whole_directory(target, True, 0) as partial:
        (partial / "x").write_text("x")
        (target / "new.txt").write_text("just now")
    assert (target / "new.txt").read_text() == "just now" and [p.name for p in target.parent.iterdir()] == [
        "out"
    ]


def test_a_damaged_manifest_vouches_for_nothing(target: Path) -> None:
    (target / MANIFEST).write_text("{}")
    with pytest.raises(CheckpointError, match="is damaged; choose another"):
        checkpoint.save(quantized(), target, overwrite=True)


def left_by_kill(target: Path, *suffixes: str) -> None:
    for number, suffix in enumerate(suffixes):
        left = target.with_name(f".{target.name}.{number:08x}.{suffix}")
        left.mkdir()
        (left / "tensors").write_bytes(b"half")


def test_leftovers_of_killed_runs_are_removed(tmp_path: Path) -> None:
    target = tmp_path / "out"
    left_by_kill(target, "partial", "partial")
    theirs = [".out.notes.partial", ".outer.00000000.partial", ".out.00000000.partial.zip"]
    for name in theirs:
        (tmp_path / name).mkdir()
    (tmp_path / ".out.difloat-lock").touch()  # of a process that is gone
    checkpoint.save(quantized(), target)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*theirs, "out"])


def test_what_a_killed_run_had_moved_away_comes_back(target: Path) -> None:
    before = contents(target)
    target.rename(target.with_name(".out.0a1b2c3d.old"))
    left_by_kill(target, "partial")
    with reserved(target):
        assert contents(target) == before
    assert [path.name for path in target.parent.iterdir()] == ["out"]


HOLDER = """
import sys, time
from pathlib import Path
from difloat.checkpoint.directories import whole_directory
with whole_directory(Path(sys.argv[1]), False, 0) as partial:
    (partial / "half").write_text("half")
    print("writing", flush=True)
    time.sleep(60)
"""


def test_another_process_is_kept_out_until_it_is_gone(tmp_path: Path) -> None:
    target = tmp_path / "new" / "out"
    command = [sys.executable, "-c", HOLDER, str(target)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "writing\n"
        with pytest.raises(CheckpointError, match="one run at a time, but another one is at work on it"):
            checkpoint.save(quantized(), target)
        assert len(list(target.parent.glob(".out.*.partial"))) == 1, "what the other one writes stays"
        checkpoint.save(quantized(), target.with_name("beside"))
        process.send_signal(signal.SIGKILL)
    assert len(list(target.parent.glob(".out.*"))) == 2  # the lock's file and the half directory
    checkpoint.save(quantized(), target)
    assert sorted(path.name for path in target.parent.iterdir()) == ["beside", "out"]


def test_threads_keep_each_other_out_and_one_may_enter_twice(tmp_path: Path) -> None:
    target, refused = tmp_path / "out", []

    def other() -> None:
        try:
            with reserved(target):
                pass
        except CheckpointError as error:
            refused.append(str(error))

    with reserved(target), reserved(target):
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    assert len(refused) == 1 and list(tmp_path.iterdir()) == []
    other()
    assert len(refused) == 1


def test_parents_made_for_nothing_are_removed(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), reserved(tmp_path / "a/b/out"):
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_links_to_themselves(tmp_path: Path) -> None:
    loop, good = tmp_path / "loop", tmp_path / "good"
    loop.symlink_to(loop)
    good.symlink_to(tmp_path / "real")
    for path in (loop, loop / "inside"):
        with pytest.raises(CheckpointError, match="a link to itself"):
            checkpoint.save(quantized(), path)
    assert resolved(good) == tmp_path / "real" and checkpoint.save(quantized(), good) == tmp_path / "real"


def test_a_write_that_fails_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = replace_file(tmp_path / "report.html", b"old")

    def fail(*_: object) -> None:
        raise OSError("no")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="no"):
        replace_file(path, b"new")
    assert contents(tmp_path) == {"report.html": b"old"}
