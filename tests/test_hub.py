"""`difloat push`: what would be sent, what is, and how the pushed checkpoint loads; the hub is a folder."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest

import difloat
from difloat import cli
from difloat.checkpoint.layout import CheckpointError
from difloat.report import hub


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("push") / "out"
    code = run("quantize", "emoji-unet", out, "--recipe", "rtn", "--bits", "w8a16", "--images", "0")
    assert code == 0
    return out


def run(*arguments: object) -> int:
    """The command line in this process; its exit code."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stopped:
        patch.setattr("sys.argv", ["difloat", *map(str, arguments)])
        cli.main()
    return int(stopped.value.code or 0)


class Folder:
    """A hub that keeps repositories as folders."""

    root: Path
    made: list[dict[str, Any]]

    def create_repo(self, repository: str, **options: Any) -> None:
        self.made.append({"repository": repository, **options})

    def create_commit(self, repository: str, operations: list, commit_message: str) -> SimpleNamespace:
        for operation in operations:
            target = self.root / repository / operation.path_in_repo
            target.parent.mkdir(parents=True, exist_ok=True)
            source = operation.path_or_fileobj
            if isinstance(source, bytes):
                target.write_bytes(source)
            else:
                shutil.copyfile(source, target)
        return SimpleNamespace(commit_url=f"https://hub/{repository}/commit/1")


@pytest.fixture
def folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> type[Folder]:
    kept = type("Kept", (Folder,), {"root": tmp_path, "made": []})
    monkeypatch.setattr(huggingface_hub, "HfApi", kept)
    return kept


def test_a_dry_run_sends_and_writes_nothing(
    checkpoint: Path, folder: type[Folder], capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(path.name for path in checkpoint.rglob("*"))
    assert run("push", checkpoint, "owner/name", "--base-model", "owner/model") == 0
    shown = capsys.readouterr().out
    assert "README.md" in shown and "report.html" in shown and "nothing was sent, say --upload" in shown
    assert "no licence in the card" in shown
    assert not folder.made and sorted(path.name for path in checkpoint.rglob("*")) == before


def test_what_is_pushed_loads(
    checkpoint: Path, folder: type[Folder], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (checkpoint / "mine.txt").write_text("notes")
    options = ["--base-model", "owner/model", "--license", "apache-2.0", "--private", "--upload"]
    try:
        assert run("push", checkpoint, "owner/name", *options) == 0
    finally:
        (checkpoint / "mine.txt").unlink()
    shown = capsys.readouterr().out
    assert "stays here mine.txt" in shown and "sent to https://hub/owner/name/commit/1" in shown
    assert folder.made == [{"repository": "owner/name", "private": True, "exist_ok": True}]
    sent = tmp_path / "owner" / "name"
    assert not (sent / "mine.txt").exists()
    card = (sent / "README.md").read_text()
    for line in ("base_model: owner/model", "base_model_relation: quantized", "license: apache-2.0"):
        assert line in card
    difloat.load(sent, verify=True)


def test_what_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="base_model must name what was quantized"):
        hub.parcel(checkpoint, "owner/name")
    with pytest.raises(ValueError, match="repository must be owner/name, got 'name'"):
        hub.parcel(checkpoint, "name", base_model="owner/model")
    broken = tmp_path / "broken"
    shutil.copytree(checkpoint, broken)
    file = next(broken.glob("unet/*.safetensors"))
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(CheckpointError):
        hub.parcel(broken, "owner/name", base_model="owner/model")
