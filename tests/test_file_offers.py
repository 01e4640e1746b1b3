"""What files offer a recipe that chooses by layer: each held exactly, its bytes counted as the file has them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import difloat
from difloat import api, interchange, job
from difloat.interchange import gguf_blocks, gguf_files, layers, openvino_ir
from difloat.interchange.schemes import DIALECTS
from difloat.methods.byte_counts import least_bytes
from difloat.methods.second_order import SecondOrderSettings, round_second_order
from difloat.plan.file_offers import file_bytes, float_bytes, offers
from difloat.plan.plan import LayerPlan
from difloat.plan.rules import draft_layer
from difloat.plan.target import FILES, Target
from tiny import PROMPTS, tiny_pixart, tiny_unet

DIALECT = {"comfy": "comfy", "diffusers": "nvfp4"}
CALL = {"use_resolution_binning": False}


def tensors_of(layer: LayerPlan, target: Target) -> dict[str, Tensor]:
    """What a file stores of a layer."""
    if target == "gguf":
        assert gguf_blocks.obstacle(layer) == ""
        return {"blocks": gguf_blocks.encode(layer)[1]}
    scheme = next(one for one in DIALECTS[DIALECT[target]] if not layers.obstacle(layer, one))
    return layers.encode(layer, scheme)


@pytest.mark.parametrize("target", ["gguf", "comfy", "diffusers"])
@pytest.mark.parametrize("shape", [(48, 64), (130, 96)])
def test_offers_are_held_in_the_bytes_that_are_counted(target: Target, shape: tuple[int, int]) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    made = offers(shape, False, target)
    widths = [rule.formats[0].bits for rule in made]
    assert widths == sorted(widths) and widths[0] == 4 and widths[-1] == 8
    for rule in made:
        draft = draft_layer(weight, [shape[1]], rule)
        stored = tensors_of(draft.plan(), target)
        assert sum(tensor.nbytes for tensor in stored.values()) == file_bytes(shape, rule, target)


@pytest.mark.parametrize("shape", [(48, 64), (32, 256), (16, 32, 3, 3)])
def test_bytes_of_openvino(shape: tuple[int, ...]) -> None:
    ov = openvino_ir.package()
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    made = offers(shape, False, "openvino")
    assert len(made) == {64: 3, 256: 5, 32: 2}[shape[1]]
    for rule in made:
        layer = draft_layer(weight, [shape[1]], rule).plan()
        model = ov.Model([openvino_ir._compressed(ov, layer)], [], "weight")
        constants = [node for node in model.get_ops() if node.get_type_name() == "Constant"]
        sizes = [node.data.nbytes for node in constants if node.get_element_type() != ov.Type.i64]
        assert sum(sizes) == file_bytes(shape, rule, "openvino")


def test_what_leaves_no_choice() -> None:
    assert offers((64, 64), False, "any") == offers((64, 64), False, "cpu") == ()
    assert [rule.formats[0].name for rule in offers((64, 64), True, "comfy")] == ["int8"]
    assert [rule.formats[0].name for rule in offers((64, 40), False, "diffusers")] == ["e4m3fn"]
    assert "iq4nl" not in {rule.formats[0].name for rule in offers((64, 64), False, "gguf", tables=False)}


@pytest.mark.parametrize("target", ["gguf", "comfy", "diffusers"])
def test_second_order_rounding_stays_on_the_scales_of_a_file(target: Target) -> None:
    draw = torch.Generator().manual_seed(0)
    weight = torch.randn(40, 64, generator=draw) * 0.05
    x = torch.randn(400, 64, generator=draw, dtype=torch.float64) * torch.logspace(-1, 0.5, 64)
    x += 2 * torch.randn(400, 1, generator=draw, dtype=torch.float64)
    moments = x.T @ x / len(x)
    for rule in offers((40, 64), False, target):
        draft = draft_layer(weight, [64], rule)
        found = {
            refit: round_second_order(draft, moments, SecondOrderSettings(refit=refit, sweep=False))
            for refit in (False, True)
        }
        error = {refit: float(one.row_error.sum()) for refit, one in found.items()}
        assert tensors_of(found[True].plan(), target) and error[True] <= error[False]
        assert error[True] < 0.97 * error[False] or rule.formats[0].bits == 8
        assert error[True] < 0.7 * float(found[True].nearest_error.sum())


@pytest.mark.parametrize(
    "target", ["gguf", *(pytest.param(name, marks=pytest.mark.slow) for name in FILES if name != "gguf")]
)
def test_auto_for_a_file_is_exported_within_its_bytes(target: Target, tmp_path: Path) -> None:
    pipeline = tiny_pixart()
    asked = {"prompts": PROMPTS, "samples": 16, "steps": 2, "progress": False, "call_kwargs": CALL}
    plan = api.plan(pipeline, "auto", "w5.5a16", target=target, **asked)
    formats = {layer.parts[0].weight.format.name for layer in plan.layers.values()}
    assert len(formats) > 1 and not any(layer.bands for layer in plan.layers.values())
    free = plan.measured["widths"]["offers"]
    ends = [[size for _, size, _ in one] for one in free.values()]
    budget = round(0.625 * sum(map(min, ends)) + 0.375 * sum(map(max, ends)))
    assert 0.99 * budget <= plan.measured["widths"]["bytes"] <= budget
    difloat.save(api.apply(pipeline, plan), tmp_path / "own")
    to = {"diffusers": "nvfp4"}.get(target, target)
    assert interchange.export_checkpoint(tmp_path / "own", tmp_path / "out", to).stat().st_size > 1000


@pytest.mark.slow
def test_a_size_is_that_of_the_tensors_in_the_file(tmp_path: Path) -> None:
    pipeline = tiny_unet()
    asked = {"prompts": PROMPTS, "samples": 16, "steps": 2, "progress": False, "target": "gguf"}
    size = least_bytes(pipeline.unet, frozenset(), "gguf") + 12_000
    plan = api.plan(pipeline, "auto", "w4a16", size=f"{size}B", **asked)
    difloat.save(api.apply(pipeline, plan), tmp_path / "own")
    file = interchange.export_checkpoint(tmp_path / "own", tmp_path / "m.gguf", "gguf")
    reader = gguf_files._package().GGUFReader(file)
    assert 0.99 * size <= sum(tensor.data.nbytes for tensor in reader.tensors) <= size


def test_floats_of_files() -> None:
    whole, odd = torch.ones(4, 4), torch.full((4, 4), 1 + 2**-12)
    assert [float_bytes(t, "gguf") for t in (whole, odd, whole[0])] == [32, 64, 16]
    assert [float_bytes(whole.half(), target) for target in ("openvino", "comfy", "any")] == [64, 32, 32]


@pytest.mark.parametrize(
    ("bits", "options", "words"),
    [
        (
            "w3a16",
            {},
            "bits must be averages of 4 to 8 with inputs left as they are for comfy files, .* got w3a16",
        ),
        ("w6a8", {}, "got w6a8"),
        ("w4a16", {"group_size": 64}, "group_size must be left to the file for comfy files, got 64"),
    ],
)
def test_what_a_file_cannot_follow_is_refused(bits: str, options: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        job.request("auto", bits, options, target="comfy")


@pytest.mark.parametrize("target", ["any", "gguf"])
def test_a_size_that_no_plan_meets_is_refused_before_calibration(target: Target) -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 64))
    least = least_bytes(model, frozenset(), target)
    assert (
        least
        == {"any": 2 * (64 * 64 // 4 + 64 * 4 + 64 * 4), "gguf": 2 * (64 * 64 // 32 * 18 + 64 * 4)}[target]
    )

    def loop(module: nn.Module) -> None:
        raise AssertionError("nothing may be calibrated")

    asked = {"forward_loop": loop, "progress": False, "target": target, "factor_power": 0.0}
    with pytest.raises(
        ValueError, match=f"size must be at least {least} bytes for this model, .* got {least - 1}"
    ):
        api.plan(model, "auto", "w4a16", size=f"{least - 1}B", **asked)
    with pytest.raises(ValueError, match="size must come with whole weight bits"):
        api.plan(model, "auto", "w4.5a16", size="1MB", **asked)
