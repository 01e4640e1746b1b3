"""Where models come from: directories, hub names (from a cache), single files, components; dtypes; sentences for what fails."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch

from difloat import sources
from difloat.interchange import gguf_files
from difloat.interchange.contents import Contents
from difloat.pipelines import denoiser_of
from difloat.sources import Source, computed_in
from tiny import tiny_pixart, tiny_unet

FAKE_COMMIT = "0" * 40


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source") / "pipeline"
    tiny_pixart().to(torch.float16).save_pretrained(folder)
    return folder


def test_an_embedded_model() -> None:
    assert denoiser_of(sources.load(Source("emoji-unet")))[0] == "unet"
    assert sources.outlined(Source("emoji-unet")).stored_bytes > 1e6


@pytest.mark.parametrize(
    ("dtype", "device", "expected"),
    [
        ("stored", "cpu", torch.float16),
        ("float32", "cpu", torch.float32),
        ("auto", "cuda", torch.float16),
    ],
)
def test_dtypes(dtype: str, device: str, expected: torch.dtype, directory: Path) -> None:
    module = denoiser_of(sources.load(Source(str(directory), dtype=dtype), device))[1]
    assert {parameter.dtype for parameter in module.parameters()} == {expected}


@pytest.mark.parametrize("bfloat16", [True, False])
def test_half_precision_on_a_cpu(bfloat16: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "_computes_bfloat16", lambda: bfloat16)
    assert computed_in(torch.float16, "auto", "cpu") == (torch.bfloat16 if bfloat16 else torch.float32)
    assert computed_in(torch.bfloat16, "auto", "cpu") == torch.bfloat16
    assert computed_in(torch.float32, "auto", "cpu") == torch.float32


def test_a_variant_is_found(tmp_path: Path) -> None:
    tiny_unet().save_pretrained(tmp_path, variant="fp16")
    assert denoiser_of(sources.load(Source(str(tmp_path))))[0] == "unet"


def test_a_component_alone_and_in_its_pipeline(directory: Path) -> None:
    alone = sources.load(Source(str(directory / "transformer"), dtype="stored"))
    assert type(alone).__name__ == "PixArtTransformer2DModel"
    pipeline = sources.load(Source(str(directory / "transformer"), base=str(directory), dtype="stored"))
    module = denoiser_of(pipeline)[1]
    assert all(torch.equal(a, b) for a, b in zip(alone.parameters(), module.parameters(), strict=True))


def test_a_component_of_another_pipeline(directory: Path, tmp_path: Path) -> None:
    tiny_unet().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="base must be a pipeline with a PixArtTransformer2DModel"):
        sources.load(Source(str(directory / "transformer"), base=str(tmp_path)))


def test_a_denoiser_in_one_file(tmp_path: Path) -> None:
    """With diffusers' own names, which its single-file loader takes as they are."""
    tiny_unet().save_pretrained(tmp_path / "base")
    other = denoiser_of(tiny_unet(seed=1))[1]
    file = tmp_path / "fine-tune.safetensors"
    safetensors.torch.save_file({name: t.half() for name, t in other.state_dict().items()}, file)
    with pytest.raises(ValueError, match="base must name the pipeline that .* belongs to"):
        sources.load(Source(str(file)))
    pipeline = sources.load(Source(str(file), base=str(tmp_path / "base"), dtype="stored"))
    module = denoiser_of(pipeline)[1]
    assert all(torch.equal(a, b.half()) for a, b in zip(module.parameters(), other.parameters(), strict=True))


def test_a_class_without_names_of_its_own_in_one_file(tmp_path: Path) -> None:
    """PixArt, which diffusers loads from directories only, under diffusers' names."""
    tiny_pixart().save_pretrained(tmp_path / "base")
    state = tiny_pixart(seed=1).transformer.state_dict()
    for file in (tmp_path / "one.safetensors", tmp_path / "one.gguf"):
        if file.suffix == ".gguf":
            gguf_files.write(Contents({}, state, {"_class_name": "PixArtTransformer2DModel"}, {}), file)
        else:
            safetensors.torch.save_file(state, file)
        module = sources.load(Source(str(file), base=str(tmp_path / "base"), dtype="float32")).transformer
        assert all(torch.equal(tensor, state[name]) for name, tensor in module.state_dict().items())
    del state["proj_out.bias"]
    safetensors.torch.save_file(state, tmp_path / "one.safetensors")
    with pytest.raises(ValueError, match="so a tensor .32. under 'proj_out.bias', got none; convert it"):
        sources.load(Source(str(tmp_path / "one.safetensors"), base=str(tmp_path / "base")))


def test_a_hub_name_is_read_from_the_cache_without_a_network(directory: Path, tmp_path: Path) -> None:
    """The cache as huggingface_hub lays it out, in a process that is told to stay offline."""
    repository = tmp_path / "hub" / "models--owner--model"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(FAKE_COMMIT)
    (repository / "snapshots").mkdir()
    (repository / "snapshots" / FAKE_COMMIT).symlink_to(directory, target_is_directory=True)
    code = (
        "from difloat import sources; from difloat.sources import Source; "
        "print(type(sources.load(Source('owner/model'))).__name__)\n"
        "try: sources.load(Source('owner/other'))\n"
        "except FileNotFoundError as error: print(error)"
    )
    offline = {"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | offline, check=False
    )
    first, second = done.stdout.splitlines() or [done.stderr, ""]
    assert first == "PixArtAlphaPipeline", done.stderr
    assert "'owner/other' must be" in second and "hub" in second


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("gated", "must be open to you on the hub, but asks for consent; accept its licence"),
        ("missing", "model must exist on the hub, got 'owner/model'; check the spelling"),
        ("revision", "revision must exist on the hub"),
        ("offline", "must be in the hub's cache where there is no network"),
        ("no network", "check its name and the network, or hf download owner/model"),
        ("timeout", "check its name and the network, or hf download owner/model"),
    ],
)
def test_what_a_hub_does_not_give_is_one_sentence(
    kind: str, said: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import requests
    from diffusers import DiffusionPipeline
    from huggingface_hub import errors

    answer = requests.Response()
    raised: dict[str, Exception] = {
        "gated": errors.GatedRepoError("gated", response=answer),
        "missing": errors.RepositoryNotFoundError("missing", response=answer),
        "revision": errors.RevisionNotFoundError("revision", response=answer),
        "offline": errors.LocalEntryNotFoundError("offline"),
        "no network": requests.ConnectionError("[Errno -2] Name or service not known"),
        "timeout": requests.Timeout("timed out"),
    }

    def download(*arguments: object, **options: object) -> None:
        raise raised[kind]

    monkeypatch.setattr(DiffusionPipeline, "download", download)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=said) as caught:
        sources.load(Source("owner/model"))
    assert "\n" not in str(caught.value)


def test_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="a hub name like owner/model or one of emoji"):
        sources.load(Source("no-such-directory"))
    with pytest.raises(FileNotFoundError, match="source must hold model_index.json or config.json"):
        sources.load(Source(str(tmp_path)))
    with pytest.raises(ValueError, match="dtype must be one of auto, stored, float32"):
        Source("emoji-unet", dtype="int8")
    (tmp_path / "model.safetensors").write_bytes(b"no checkpoint")
    with pytest.raises(ValueError, match="does not load"):
        sources.load(Source(str(tmp_path / "model.safetensors")))
