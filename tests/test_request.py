"""A request is made and checked once, and the command line is made of the fields of its records."""

from __future__ import annotations

import dataclasses
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
import typer

from difloat import api, cli, job
from difloat.evaluation.diagnosis import DiagnosisSettings
from difloat.layers.exclude import excluded
from difloat.layers.quantizable import check_weights
from difloat.plan import options
from difloat.plan.request import CalibrationSettings, RepairSettings, Request
from difloat.plan.rules import Bits
from difloat.plan.validation import descriptions
from tiny import PROMPTS, tiny_pixart

# diffusers' DPM solver hands torch tensors to numpy in a way numpy 2 deprecates; nothing here can change that.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

ONCE = (options.make_options, Bits.parse, excluded, check_weights)
FLAGS = {"prompts_per_batch": "--batch", "guidance_scale": "--guidance", "memory_bytes": "--memory-mb"}
COMPUTING = ("quantize", "repair", "demo", "generate", "evaluate", "diagnose", "report")


@contextmanager
def calls(*functions: Any) -> Iterator[Counter[str]]:
    """How often each of the functions is called inside, whoever calls it under whatever name."""
    found: Counter[str] = Counter()
    names = {function.__code__: function.__qualname__ for function in functions}

    def note(frame: FrameType, event: str, _: Any) -> None:
        if event == "call" and frame.f_code in names:
            found[names[frame.f_code]] += 1

    sys.setprofile(note)
    try:
        yield found
    finally:
        sys.setprofile(None)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny full-precision pipeline, saved by diffusers, and prompts beside it."""
    directory = tmp_path_factory.mktemp("request") / "source"
    tiny_pixart().save_pretrained(directory)
    (directory.parent / "prompts.txt").write_text("\n".join(PROMPTS[:2]), encoding="utf-8")
    return directory


def command(monkeypatch: pytest.MonkeyPatch, *words: object) -> int:
    monkeypatch.setattr("sys.argv", ["difloat", *map(str, words)])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    return int(stopped.value.code or 0)


def parameters(name: str) -> dict[str, Any]:
    """The options of a command, by flag."""
    group = typer.main.get_command(cli.app)
    return {flag: one for one in group.commands[name].params for flag in one.opts}


def test_one_command_checks_each_thing_once(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["quantize", source, tmp_path / "out", "--prompts", source.parent / "prompts.txt"]
    words += ["--samples", 6, "--steps", 2, "--images", 0, "--exclude", "*.to_q"]
    with calls(*ONCE) as found:
        code = command(
            monkeypatch, *words, "--recipe", "lbfp", "--set", "iterations=2", "--set", "rounding_rows=4"
        )
    assert code == 0
    assert found == {function.__qualname__: 1 for function in ONCE}


def test_components_are_read_once_each(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["quantize", source, tmp_path / "out", "--recipe", "rtn", "--images", 0]
    with calls(*ONCE) as found:
        assert command(monkeypatch, *words, "--components", "transformer,text_encoder,vae=w8a8") == 0
    # The bits of the call and of the VAE, and the text of the settings that either component stores.
    assert found["Bits.parse"] == 2 + 2
    assert (found["make_options"], found["excluded"], found["check_weights"]) == (1, 1, 1)


def test_a_request_is_plain_frozen_data() -> None:
    asked = job.request(
        "rtn", " W4A32 ", {"keep_8bit": "first"}, exclude=["a"], components=["unet", "vae=w8a8"]
    )
    assert asked.bits == Bits(4, None) and str(asked.bits) == "w4a32"
    assert asked.options.keep_8bit == ("first",) and asked.exclude == ("a",)
    assert asked.components == {"unet": None, "vae": Bits(8, 8)} and asked.device is None
    with pytest.raises(dataclasses.FrozenInstanceError):
        asked.recipe = "lbfp"  # type: ignore[misc]
    assert job.request("rtn", "w4a8", {}, device="cpu").device == torch.device("cpu")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"bits": 4}, "bits must look like 'w4a8' or 'w3.5a8', got 4"),
        ({"bits": "w4"}, "bits must look like 'w4a8' or 'w3.5a8', got 'w4'"),
        ({"recipe": "best"}, "recipe must be one of lbfp"),
        (
            {"target": "gpu"},
            "target must be one of any, cpu, comfy, gguf, openvino, vllm, diffusers, got 'gpu'",
        ),
        ({"exclude": 3}, "exclude must be names"),
        ({"components": ["vae=8"]}, "bits must look like 'w4a8' or 'w3.5a8', got '8'"),
        ({"components": 3}, "components must be names of components"),
        ({"device": "gpu"}, "device must be one of auto, cpu, cuda"),
        ({"guidance_scale": float("nan")}, "guidance must be finite, got nan"),
        ({"samples": 0}, "calibration setting 'samples' must be a whole number of at least 1, got 0"),
    ],
)
def test_what_is_not_allowed_is_said_before_anything_is_looked_at(
    arguments: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(ValueError) as caught:
        api.plan(object(), **{"recipe": "rtn", **arguments})
    assert str(caught.value).startswith(sentence) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "record", "left_out"),
    [
        ("quantize", Request, ("options", "calibration", "device")),
        ("quantize", CalibrationSettings, ()),
        ("repair", RepairSettings, ()),
        ("repair", CalibrationSettings, ()),
        ("diagnose", DiagnosisSettings, ()),
    ],
)
def test_options_are_the_fields_of_records(name: str, record: type[Any], left_out: tuple[str, ...]) -> None:
    found, texts = parameters(name), descriptions(record)
    for field in dataclasses.fields(record):
        if field.name in left_out:
            continue
        option = found[FLAGS.get(field.name, "--" + field.name.replace("_", "-"))]
        assert texts[field.name] in option.help
        usual = option.default
        if field.name == "memory_bytes":
            assert usual << 20 == field.default
        elif isinstance(field.default, int | float | bool | None):
            assert usual == field.default
        elif isinstance(field.default, tuple):
            assert list(usual or ()) == list(field.default)
        else:
            assert usual == str(field.default)


def test_limits_are_those_of_the_fields(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for words, said in (
        (["--samples", 0], "Invalid value for '--samples'"),
        (["--memory-mb", 0], "Invalid value for '--memory-mb'"),
        (["--seed", 2**41], "Invalid value for '--seed'"),
        (["--timesteps", "noisy"], "'timesteps' must be sampler or clean, got 'noisy'"),
        (["--bits", "4"], "bits must look like 'w4a8' or 'w3.5a8', got '4'"),
        (["--dtype", "int8"], "dtype must be one of auto"),
    ):
        assert command(monkeypatch, "quantize", source, tmp_path / "out", *words) == 2
        assert said in " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert not (tmp_path / "out").exists()


def test_every_command_that_computes_takes_a_device() -> None:
    assert all(parameters(name)["--device"].default == "auto" for name in COMPUTING)


@pytest.mark.parametrize(
    ("device", "sentence"),
    [
        (
            "gpu",
            "device must be one of auto, cpu, cuda, cuda:1 and so on, xpu or mps, got 'gpu'; choose one of",
        ),
        ("meta", "device must be one of auto"),
        ("cuda:99", "device must be one that torch finds on this machine, got 'cuda:99' where there are"),
    ],
)
def test_a_device_that_is_not_there_is_bad_input_of_every_command(
    source: Path,
    tmp_path: Path,
    device: str,
    sentence: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    places = {"quantize": [source, out], "repair": [source, source, out], "demo": ["--out", out]}
    places |= {"generate": [source, out], "evaluate": [source, source], "diagnose": [source, source]}
    places |= {"report": [source, source]}
    for name in COMPUTING:
        assert command(monkeypatch, name, *places[name], "--device", device) == 2, name
        err = capsys.readouterr().err
        assert " ".join(err.split()).startswith(f"error: {sentence}") and "Traceback" not in err
    assert not out.exists()


def test_a_pipeline_computes_on_the_device_of_the_command(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from difloat import devices, run

    moved: list[tuple[str, str]] = []
    real = devices.move

    def move(model: Any, device: Any) -> Any:
        moved.append((type(model).__name__, str(device)))
        return real(model, device)

    monkeypatch.setattr(run.devices, "move", move)
    arguments = ["--steps", 2, "--count", 1, "--prompt", PROMPTS[0]]
    assert command(monkeypatch, "generate", source, tmp_path / "out", *arguments, "--device", "cpu") == 0
    assert moved == [("PixArtAlphaPipeline", "cpu")]
