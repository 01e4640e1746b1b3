"""Bad input as a user meets it on the command line: one sentence, exit code 2, and nothing half-written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests
import torch
from diffusers import DiffusionPipeline, PixArtTransformer2DModel
from huggingface_hub import errors
from PIL import Image

import difloat
from difloat import evaluation, pipelines
from test_cli import FAST, Run, call, refused
from tiny import tiny_pixart

# diffusers' DPM solver hands torch tensors to numpy in a way numpy 2 deprecates; nothing here can change that.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
SMALL = ["--recipe", "lbfp", "--set", "rounding=nearest", "--samples", 4, "--steps", 2]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Run:
    return lambda *arguments: call(monkeypatch, capfd, *arguments)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("bad") / "source"
    tiny_pixart().save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def mixed(source: Path) -> Path:
    """A pipeline whose denoiser is stored in another dtype than its text encoder."""
    directory, pipeline = source.parent / "mixed", tiny_pixart()
    pipeline.transformer.to(torch.bfloat16)
    pipeline.save_pretrained(directory)
    return directory


def unreachable() -> Exception:
    """What diffusers raises where there is no network: an error of its own, while one of the hub's library is handled."""
    error = OSError("Cannot load model owner/model: the model is not fully cached locally (Cannot find")
    error.__context__ = errors.LocalEntryNotFoundError("offline")
    return error


@pytest.mark.parametrize("verb", [["quantize", "out"], ["generate", "out"], ["inspect"]])
@pytest.mark.parametrize(
    ("raised", "said"),
    [
        (unreachable(), "must be in the hub's cache where there is no network, but is not; hf download owner/model"),
        (errors.GatedRepoError("gated", response=requests.Response()), "accept its licence on its page"),
        (requests.ConnectionError("[Errno -2] Name or service not known"), "check its name and the network"),
    ],
)  # fmt: skip
def test_a_hub_that_gives_nothing(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, verb: list[str], raised: Exception, said: str
) -> None:
    def download(*_: Any, **__: Any) -> None:
        raise raised

    monkeypatch.setattr(DiffusionPipeline, "download", download)
    monkeypatch.chdir(tmp_path)
    result = run(verb[0], "owner/model", *verb[1:])
    refused(result, "'owner/model'", said)
    assert result.err.startswith("error: ") and not list(tmp_path.iterdir())


@pytest.mark.parametrize("device", ["cuda:99", "tpu", ""])
@pytest.mark.parametrize("verb", ["quantize", "generate", "evaluate", "repair"])
def test_a_device_that_is_not_there(run: Run, source: Path, tmp_path: Path, verb: str, device: str) -> None:
    places = [source, tmp_path / "out"] if verb != "repair" else [source, source, tmp_path / "out"]
    result = run(verb, *places, "--device", device)
    refused(result, "device must be one", f"got '{device}'", "choose one of these")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_an_accelerator_that_fills_up_keeps_the_cache_and_the_next_run_goes_on(
    run: Run, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward, calls, last = PixArtTransformer2DModel.forward, [0], [10**9]

    def counted(self: Any, *arguments: Any, **named: Any) -> Any:
        calls[0] += 1
        if calls[0] > last[0]:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return forward(self, *arguments, **named)

    monkeypatch.setattr(PixArtTransformer2DModel, "forward", counted)
    words = [*FAST, "--images", 0, "--cache"]
    assert run("quantize", source, tmp_path / "whole", *words, tmp_path / "other").code == 0
    whole, calls[0], last[0] = calls[0], 0, calls[0] - 1
    result = run("quantize", source, tmp_path / "out", *words, tmp_path / "cache")
    refused(result, "memory of the accelerator", "--memory-mb", "--batch 1", "--device cpu", "--cache")
    assert (tmp_path / "cache").is_dir() and not (tmp_path / "out").exists()
    calls[0], last[0] = 0, 10**9
    assert run("quantize", source, tmp_path / "out", *words, tmp_path / "cache").code == 0
    assert calls[0] < whole
    files = [
        (tmp_path / out / "transformer/diffusion_pytorch_model.safetensors").read_bytes()
        for out in ("whole", "out")
    ]
    assert files[0] == files[1]


def test_an_accelerator_that_fills_up_over_pictures_leaves_the_checkpoint(
    run: Run, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(evaluation, "generate", full)
    result = run("quantize", source, tmp_path / "out", "--recipe", "rtn", "--images", 2)
    refused(result, "memory of the accelerator", "--batch 1")
    assert all(finding.passed for finding in difloat.verify(tmp_path / "out"))


def test_dtypes_that_do_not_fit_together(run: Run, mixed: Path, tmp_path: Path) -> None:
    said = [
        "must compute in one dtype",
        "float32 in text_encoder",
        "bfloat16 in transformer",
        "--dtype float32",
    ]
    refused(run("quantize", mixed, tmp_path / "out", "--dtype", "stored", *SMALL), *said)
    assert not (tmp_path / "out").exists()
    drawn = ["--dtype", "stored", "--recipe", "rtn", "--images", 2]
    refused(run("quantize", mixed, tmp_path / "out", *drawn), *said)
    assert all(finding.passed for finding in difloat.verify(tmp_path / "out"))


@pytest.mark.parametrize(
    ("pair", "words"),
    [
        ("image", ["an input must be name=FILE", "'image'"]),
        ("image=nowhere.png", ["'nowhere.png', which is none", "check the path"]),
        ("image=text.png", ["does not open as one", "convert it to PNG"]),
        ("image_embeds=objects.npy", ["must be an array of numbers", "objects.npy", "numpy.save"]),
        ("colour=photo.png", ["--input must name arguments that PixArtAlphaPipeline takes", "'colour'"]),
        ("latents=noise.npy", ["--input must not set latents, which difloat sets itself"]),
    ],
)
def test_inputs_that_are_none(
    run: Run, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pair: str, words: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("text.png").write_text("no picture", encoding="utf-8")
    Image.new("RGB", (4, 4)).save("photo.png")
    np.save("noise.npy", np.zeros(4, np.float32))
    np.save("objects.npy", np.array([{}], dtype=object), allow_pickle=True)
    refused(run("generate", source, "out", "--input", pair), *words)
    refused(run("quantize", source, "out", "--input", pair), *words)
    assert not Path("out").exists()


def test_an_array_is_a_tensor_of_one_sample(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.arange(3, dtype=np.float32))
    found = pipelines.inputs_of([f"embeds={tmp_path}/a.npy"])["embeds"]
    assert torch.equal(found, torch.tensor([[0.0, 1.0, 2.0]]))


def test_a_package_that_diffusers_uses_without_having_it_is_named() -> None:
    class WithoutPackage:
        def __call__(self) -> None:
            raise NameError("name 'ftfy' is not defined", name="ftfy")

    with pytest.raises(
        ValueError, match=r"WithoutPackage must find every package .* 'ftfy' .*pip install ftfy"
    ):
        pipelines.call(WithoutPackage(), {}, {})


def test_copies_of_a_scheduler_step_themselves() -> None:
    """Pipelines that denoise frames at steps of their own copy the scheduler for every frame (SkyReels)."""
    import copy

    from diffusers import UniPCMultistepScheduler

    from difloat.evaluation.generation import _recorded_steps

    scheduler = UniPCMultistepScheduler()
    sample = torch.ones(1, 4)
    with _recorded_steps(scheduler, keep_states=False) as (timesteps, _):
        copied = copy.deepcopy(scheduler)
        copied.set_timesteps(2)
        copied.step(sample, copied.timesteps[0], sample)
    assert timesteps == [float(copied.timesteps[0])]
    assert copied.step_index == 1 and scheduler.step_index is None and "step" not in vars(scheduler)


def test_what_a_pipeline_draws_without_a_generator_has_the_seed_of_the_picture() -> None:
    pipeline = tiny_pixart()
    encode = pipeline.encode_prompt

    def noisy(*arguments: Any, **named: Any) -> Any:
        first, *others = encode(*arguments, **named)
        return (first + torch.randn_like(first), *others)

    pipeline.encode_prompt = noisy
    drawn = [
        evaluation.generate(pipeline, ["a red cat"], seeds=[seed], steps=2, progress=False).images
        for seed in (1, 1, 2)
    ]
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
