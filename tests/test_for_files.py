"""`quantize --for`: plans that a kind of file holds exactly from the start, with and without learned rounding."""

from __future__ import annotations

from pathlib import Path

import pytest

import difloat
from difloat import api, interchange
from difloat.numbers.formats import parse
from difloat.plan.rules import Rule
from difloat.plan.target import BRANCH_FILES, FILES, check_file, fit, fit_inputs
from tiny import PROMPTS, tiny_pixart, tiny_unet

EXPORTS = {"comfy": "comfy", "gguf": "gguf", "openvino": "openvino", "diffusers": "nvfp4"}
FAST = {"iterations": 2, "rounding_rows": 4}
CASES = [
    ("rtn", "w4a16", {}),
    ("rtn", "w8a16", {}),
    ("lbfp", "w4a16", FAST),
    *(
        pytest.param(*case, marks=pytest.mark.slow)
        for case in [
            ("lbfp", "w8a16", {}),
            ("fp4dit", "w4a16", FAST),
            ("qdit", "w4a16", {}),
            ("qdiffusion", "w4a16", FAST),
        ]
    ),
]


@pytest.mark.parametrize("target", EXPORTS)
@pytest.mark.parametrize(("recipe", "bits", "options"), CASES)
def test_what_is_made_for_a_file_is_exported(
    target: str, recipe: str, bits: str, options: dict, tmp_path: Path
) -> None:
    pipeline = tiny_pixart()
    call = {"use_resolution_binning": False}
    arguments = {"prompts": PROMPTS, "samples": 8, "steps": 2, "progress": False, "call_kwargs": call}
    plan = api.plan(pipeline, recipe, bits, target=target, **arguments, **options)
    assert plan.options["target"] == target and not plan.attention
    inner = [name for name in plan.layers if name.startswith("transformer_blocks")]
    assert len(inner) == 20
    difloat.save(api.apply(pipeline, plan), tmp_path / "own")
    file = interchange.export_checkpoint(tmp_path / "own", tmp_path / "out", EXPORTS[target])
    assert file.stat().st_size > 1000


def test_a_unet_of_convolutions_and_concatenations(tmp_path: Path) -> None:
    for target in EXPORTS:
        pipeline = tiny_unet()
        arguments = {"prompts": PROMPTS, "samples": 4, "steps": 2, "progress": False}
        plan = api.plan(pipeline, "rtn", "w8a16", target=target, **arguments)
        convolutions = [name for name, layer in plan.layers.items() if layer.kind == "conv2d"]
        assert bool(convolutions) == (target == "openvino")
        if not convolutions:
            assert f"convolution, which {target} files hold in float" in plan.skipped["conv_in"]
        difloat.save(api.apply(pipeline, plan), tmp_path / target)
        interchange.export_checkpoint(tmp_path / target, tmp_path / f"{target}-out", EXPORTS[target])


def test_inputs_that_a_reader_rounds_as_the_plan_does(tmp_path: Path) -> None:
    for target, format in (("comfy", "int8"), ("diffusers", "e4m3fn")):
        pipeline = tiny_pixart()
        plan = api.plan(pipeline, "rtn", "w8a8", target=target, prompts=PROMPTS, progress=False)
        found = {layer.parts[0].activation.format.name for layer in plan.layers.values()}
        assert found == {format}
        difloat.save(api.apply(pipeline, plan), tmp_path / target)
        interchange.export_checkpoint(tmp_path / target, tmp_path / f"{target}-out", EXPORTS[target])


@pytest.mark.parametrize(
    ("recipe", "bits", "target", "words"),
    [
        (
            "rtn",
            "w4a8",
            "gguf",
            "bits must leave inputs as they are for gguf files, such as w4a16, got w4a8",
        ),
        ("rtn", "w3a8", "comfy", "such as w3a16 or w8a8, w4a8"),
        ("msfp", "w4a4", "gguf", "recipe must make one ordinary weight per layer for gguf files"),
        ("viditq", "w4a16", "openvino", "for openvino files, got one that trains, smooths"),
    ],
)
def test_what_cannot_fit_is_refused_before_calibration(
    recipe: str, bits: str, target: str, words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        api.plan(tiny_pixart(), recipe, bits, target=target, prompts=PROMPTS, progress=False)


def test_names_of_files_and_machines() -> None:
    assert {*FILES} == {*EXPORTS, *BRANCH_FILES}  # those with branches are in `test_vllm`
    assert check_file("gguf", "any") == "gguf"
    with pytest.raises(
        ValueError, match="for must be one of comfy, gguf, openvino, vllm, diffusers, got 'onnx'"
    ):
        check_file("onnx", "any")
    with pytest.raises(ValueError, match="target must be left out where --for"):
        check_file("gguf", "cpu")


def test_rules_of_gguf() -> None:
    four = Rule((parse("e2m1"), parse("e1m2")), "tensor")
    found = fit(four, False, True, 64, "gguf")
    assert [f.name for f in found.formats] == ["iq4nl", "int4"] and found.scales == "float16"
    assert [f.name for f in fit(four, True, True, 64, "gguf").formats] == ["int4"]
    assert (
        fit(four, False, True, 40, "gguf")
        == "40 input channels, no multiple of 32, which gguf files hold in float"
    )
    zero = fit(Rule((parse("uint4"),), "channel", zero_points=(1.0,)), False, True, 64, "gguf")
    assert [f.name for f in zero.formats] == ["uint4"] and zero.zero_points == (1.0,)
    assert fit_inputs(None, 4, "gguf") is None and fit_inputs(8, 8, "any") is None
