"""Commands for files of other programs as a user meets them: what export says, and bad input of all of them."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch
from rich.filesize import decimal
from safetensors.torch import save_file

from test_cli import Run, call, refused
from tiny import tiny_unet

WEIGHTS_ONLY = ["--recipe", "rtn", "--images", 0, "--bits"]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Run:
    return lambda *arguments: call(monkeypatch, capfd, *arguments)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("files") / "source"
    tiny_unet().save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def checkpoint(source: Path) -> Path:
    """Integers of 8 bits per row, convolutions too, made for no kind of file."""
    out = source.parent / "int8"
    words = [*WEIGHTS_ONLY, "w8a16", "--set", "weight_format=int8", "--set", "split=false"]
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stopped:
        patch.setattr("sys.argv", ["difloat", "quantize", str(source), str(out), *map(str, words)])
        from difloat import cli

        cli.main()
    assert not stopped.value.code
    return out


def test_export_says_what_stays_float_by_name_and_what_the_reader_does(
    run: Run, checkpoint: Path, tmp_path: Path
) -> None:
    file = tmp_path / "small.safetensors"
    result = run("export", checkpoint, file, "--to", "comfy")
    assert result.code == 0, result
    assert f"comfy file {file}, {decimal(file.stat().st_size, precision=2)}" in result.out
    assert re.search(
        r"conv_in, [\w.]+, [\w.]+ and \d+ more as float32: ComfyUI holds no quantized convolutions",
        result.out,
    )
    assert "ComfyUI rounds the inputs to 8 bits per token, which the checkpoint does not" in result.out


def test_the_size_of_two_files_is_said_as_one(run: Run, source: Path, tmp_path: Path) -> None:
    own, file = tmp_path / "own", tmp_path / "small.xml"
    assert run("quantize", source, own, *WEIGHTS_ONLY, "w4a16", "--for", "openvino").code == 0
    result = run("export", own, file, "--to", "openvino")
    both = file.stat().st_size + file.with_suffix(".bin").stat().st_size
    assert result.code == 0 and f"openvino file {file}, {decimal(both, precision=2)}" in result.out
    folder = run("export", own, tmp_path / "folder", "--to", "openvino")
    assert f"{decimal(both, precision=2)}" in folder.out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nowhere", "out", "--to", "gguf"], "nowhere"),
        (["{source}", "out", "--to", "gguf"], "must"),
        (["{checkpoint}", "out", "--to", "onnx"], "format must be one of nvfp4, fp8, mxfp4, comfy, gguf, openvino, vllm"),
        (["{checkpoint}", "out", "--to", "diffusers"], "what --for diffusers makes is written with nvfp4"),
        (["{checkpoint}", "out", "--to", "comfy", "--names", "mine"], "names must be one of auto, source, diffusers"),
        (["{checkpoint}", "out", "--to", "comfy", "--names", "source"], "names must be diffusers for a model that came"),
        (["{checkpoint}", "out", "--to", "comfy", "--component", "vae"], "component must be one of unet, got 'vae'"),
        (["{checkpoint}", "{checkpoint}", "--to", "comfy"], "output must be new"),
        (["{checkpoint}", "out.gguf", "--to", "comfy"], "output must end in .safetensors or be a directory for comfy"),
        (["{checkpoint}", "out.safetensors", "--to", "gguf"], "output must end in .gguf or be a directory for gguf"),
        (["{checkpoint}", "out", "--to", "gguf"], "quantize with"),
        (["{checkpoint}", "out", "--to", "vllm"], "--recipe svdquant --bits w4a16 --for vllm"),
    ],
)  # fmt: skip
def test_export_refuses(
    run: Run, source: Path, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list, said: str
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    places = {"source": source, "checkpoint": checkpoint}
    refused(run("export", *[word.format(**places) for word in words]), said)
    assert not list(tmp_path.iterdir())


def test_import_refuses(run: Run, source: Path, checkpoint: Path, tmp_path: Path) -> None:
    file, gguf = tmp_path / "comfy.safetensors", tmp_path / "model.gguf"
    assert run("export", checkpoint, file, "--to", "comfy").code == 0
    gguf.write_bytes(b"GGUF")
    out = tmp_path / "out"
    for words, said in (
        ([tmp_path / "nowhere", "--from", "comfy"], "nowhere"),
        ([file, "--from", "gguf", "--into", source], "format must be one of nvfp4, fp8, mxfp4, comfy"),
        ([file, "--from", "nvfp4", "--into", source], "nvfp4 file must hold layers of"),
        ([gguf, "--from", "comfy", "--into", source], "gguf"),
        ([file, "--from", "comfy"], "config.json"),
        ([file, "--from", "comfy", "--into", tmp_path / "nowhere"], "nowhere"),
    ):
        refused(run("import", words[0], out, *words[1:]), said)
        assert not out.exists()


def test_push_refuses(
    run: Run, source: Path, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Closed:
        def create_repo(self, repository: str, **options: object) -> None:
            raise OSError("401 Client Error\nmore of it")

    monkeypatch.setattr(huggingface_hub, "HfApi", Closed)
    base = ["--base-model", "owner/model"]
    for words, said in (
        ([tmp_path / "nowhere", "owner/name", *base], "nowhere"),
        ([source, "owner/name", *base], "must"),
        ([checkpoint, "owner/name"], "base_model must name what was quantized"),
        ([checkpoint, "name", *base], "repository must be owner/name, got 'name'"),
        ([checkpoint, "owner/na me", *base], "owner/na me"),
        (
            [checkpoint, "owner/name", *base, "--upload"],
            "hub must take 'owner/name', but does not (401 Client Error)",
        ),
    ):
        refused(run("push", *words), said)
    broken = tmp_path / "broken"
    shutil.copytree(checkpoint, broken)
    file = next(broken.glob("unet/*.safetensors"))
    file.write_bytes(file.read_bytes()[:-1])
    refused(run("push", broken, "owner/name", *base), "safetensors")


def test_validate_refuses_and_says_what_is_wrong(run: Run, checkpoint: Path, tmp_path: Path) -> None:
    for name, content in (("empty.safetensors", b""), ("text.gguf", b"text"), ("notes.txt", b"notes")):
        (tmp_path / name).write_bytes(content)
        refused(run("validate", tmp_path / name), name)
    (tmp_path / "folder").mkdir()
    refused(run("validate", tmp_path / "folder"), "folder")
    file = tmp_path / "float.safetensors"
    save_file({"a.weight": torch.ones(4, 4)}, file)
    result = run("validate", file)
    assert result.code == 1 and "file must hold quantized layers, but no tensor looks like one" in result.out
    refused(run("validate", checkpoint, "--reference", tmp_path / "nowhere"), "nowhere")
    assert run("validate", checkpoint).code == 0
