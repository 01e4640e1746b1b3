"""ComfyUI's rotated layouts, W4A8 and int8: comfy-kitchen's eager code reads back the numbers and multiplies as ours."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path

import comfy_kitchen
import pytest
import torch
from comfy_kitchen.backends.eager.w4a8_int8 import _dequant_int4_grouped_to_int8
from comfy_kitchen.tensor import QuantizedTensor, get_layout_class
from safetensors.torch import load_file, save_file
from torch import Tensor

import difloat
from difloat import api, interchange
from difloat.interchange.comfy_tables import FORMAT
from difloat.numbers.formats import parse
from difloat.plan.encode import dequantize, stored_values
from difloat.plan.plan import LayerPlan, Plan
from difloat.plan.rules import Rule, draft_layer
from difloat.plan.specs import QuantSpec, Rotation
from difloat.plan.target import COMFY_ROTATION, fit

INT8_INPUTS = QuantSpec(parse("int8"), "token", online=True)
SHAPE = (24, 512)


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(SHAPE[1], SHAPE[0])


def layer_of(kind: str, rotation: Rotation | None = COMFY_ROTATION) -> LayerPlan:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(SHAPE, generator=generator) * torch.rand(SHAPE[0], 1, generator=generator) / 20
    weight[3] = 0
    rule = Rule((parse("int8"),), "channel")
    if kind == FORMAT:
        asked = fit(Rule((parse("e2m1"),)), False, True, SHAPE[1], "comfy", inputs=8)
        assert isinstance(asked, Rule)
        rule = asked
    turned = weight if rotation is None else rotation.forward(weight)
    layer = draft_layer(turned, [SHAPE[1]], rule).plan()
    part = replace(layer.parts[0], activation=INT8_INPUTS)
    return replace(layer, rotation=rotation, parts=(part,))


def written(layer: LayerPlan, folder: Path) -> tuple[Path, dict[str, Tensor], dict]:
    model = api.apply(Net(), Plan("rtn", "w4a8", {"layer": layer}))
    difloat.save(model, folder / "own")
    file = interchange.export_checkpoint(folder / "own", folder / "c.safetensors", "comfy")
    tensors = load_file(file)
    return file, tensors, json.loads(bytes(tensors["layer.comfy_quant"].tolist()))


def read(tensors: dict[str, Tensor], mark: dict) -> QuantizedTensor:
    """The weight as comfy-kitchen holds it."""
    if mark["format"] == "int8_tensorwise":
        layout = get_layout_class("TensorWiseINT8Layout")
        named = {"convrot": mark["convrot"], "convrot_groupsize": mark["convrot_groupsize"]}
        params = layout.Params(
            scale=tensors["layer.weight_scale"], orig_dtype=torch.float32, orig_shape=SHAPE, **named
        )
        return QuantizedTensor(tensors["layer.weight"], "TensorWiseINT8Layout", params)
    layout = get_layout_class("AsymW4A8Int8Layout")
    params = layout.Params(
        scale=tensors["layer.weight_s_rel"],
        s_channel=tensors["layer.weight_s_channel"],
        codebook=tensors["layer.weight_codebook"],
        orig_dtype=torch.float32,
        orig_shape=SHAPE,
        group_size=mark["group_size"],
        convrot_groupsize=mark["convrot_groupsize"],
    )
    return QuantizedTensor(tensors["layer.weight"], "AsymW4A8Int8Layout", params)


def test_the_eager_reader_decodes_the_very_numbers(tmp_path: Path) -> None:
    """In the rotated basis they are equal; turned back by a product of matrices they differ by its rounding."""
    layer = layer_of(FORMAT)
    _, tensors, mark = written(layer, tmp_path)
    assert mark == {
        "format": FORMAT,
        "orig_dtype": "torch.float32",
        "group_size": 16,
        "convrot_groupsize": 256,
    }
    numbers = _dequant_int4_grouped_to_int8(
        tensors["layer.weight"], tensors["layer.weight_s_rel"], tensors["layer.weight_codebook"], 16
    )
    assert torch.equal(numbers.float() * tensors["layer.weight_s_channel"][:, None], stored_values(layer))
    with comfy_kitchen.use_backend("eager"):
        found = read(tensors, mark).dequantize()
    wanted = dequantize(layer)
    assert float((found - wanted).abs().max()) <= 1e-6 * float(wanted.abs().max())


@pytest.mark.parametrize("kind", [FORMAT, "int8_tensorwise"])
def test_a_rotated_layer_is_multiplied_as_ours(kind: str, tmp_path: Path) -> None:
    """A sum of other order before inputs are rounded moves some by a step of 8 bits."""
    layer = layer_of(kind)
    _, tensors, mark = written(layer, tmp_path)
    assert mark["format"] == kind
    model = api.apply(Net(), Plan("rtn", "w4a8", {"layer": layer}))
    x = torch.randn(40, SHAPE[1], generator=torch.Generator().manual_seed(1))
    with torch.no_grad(), comfy_kitchen.use_backend("eager"):
        theirs = torch.nn.functional.linear(x, read(tensors, mark), model.layer.bias)
        ours = model.layer(x)
        exact = torch.nn.functional.linear(x, dequantize(layer), model.layer.bias)
    assert float((ours - theirs).norm()) <= 0.1 * float((ours - exact).norm())


def test_int8_rotated_is_read_back_bit_for_bit(tmp_path: Path) -> None:
    layer = layer_of("int8_tensorwise")
    file, tensors, mark = written(layer, tmp_path)
    assert mark["convrot"] and mark["convrot_groupsize"] == 256
    other = Net()
    found = interchange.import_into(other, file, "comfy").layers["layer"]
    assert found.rotation == layer.rotation
    for name in ("weight", "weight_scale"):
        assert torch.equal(found.tensors[name], layer.tensors[name])
    assert all(remark.level == "ok" for remark in interchange.validate(file))


def test_w4a8_is_imported_as_the_int8_numbers_that_comfyui_multiplies(tmp_path: Path) -> None:
    layer = layer_of(FORMAT)
    file, _, _ = written(layer, tmp_path)
    other = Net()
    found = interchange.import_into(other, file, "comfy").layers["layer"]
    assert found.parts[0].weight.format.name == "int8" and found.rotation == COMFY_ROTATION
    assert torch.equal(stored_values(found), stored_values(layer))
    assert all(remark.level == "ok" for remark in interchange.validate(file))


def test_files_that_comfy_kitchen_made_itself_are_imported(tmp_path: Path) -> None:
    weight = torch.randn(SHAPE, generator=torch.Generator().manual_seed(2))
    layout = get_layout_class("AsymW4A8Int8Layout")
    with comfy_kitchen.use_backend("eager"):
        qdata, params = layout.quantize(weight)
        wanted = layout.dequantize(qdata, params)
    tensors = {f"layer.weight{key}": t for key, t in layout.state_dict_tensors(qdata, params).items()}
    mark = json.dumps({"format": FORMAT, "group_size": 16, "convrot_groupsize": 256}).encode()
    tensors |= {"layer.comfy_quant": torch.frombuffer(bytearray(mark), dtype=torch.uint8)}
    tensors["layer.bias"] = torch.zeros(SHAPE[0])
    save_file(tensors, tmp_path / "theirs.safetensors")
    model = Net()
    found = interchange.import_into(model, tmp_path / "theirs.safetensors", "comfy").layers["layer"]
    difference = (dequantize(found) - wanted).abs().max()
    assert float(difference) <= 1e-6 * float(wanted.abs().max())
    x = torch.randn(5, SHAPE[1])
    with torch.no_grad():
        torch.testing.assert_close(model.layer(x), x @ wanted.T, rtol=1e-4, atol=1e-3)


REFUSED = {
    "another rotation": (
        lambda layer: replace(layer, rotation=Rotation(256)),
        "is not rotated by the regular",
    ),
    "inputs of 4 bits": (
        lambda layer: replace(
            layer,
            parts=(replace(layer.parts[0], activation=QuantSpec(parse("int4"), "token", online=True)),),
        ),
        "otherwise than to int8 per token",
    ),
    "other scales": (
        lambda layer: replace(
            layer, tensors={**layer.tensors, "weight_scale": layer.tensors["weight_scale"] * 1.01}
        ),
        "no whole multiples of one number per row; quantize with --for comfy --bits w4a8",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused_with_what_to_do(case: str, tmp_path: Path) -> None:
    change, words = REFUSED[case]
    with pytest.raises(ValueError, match=words):
        written(change(layer_of(FORMAT)), tmp_path)


@pytest.mark.parametrize("to", ["gguf", "nvfp4", "fp8"])
def test_other_files_refuse_rotated_layers(to: str, tmp_path: Path) -> None:
    layer = layer_of("int8_tensorwise")
    bare = replace(layer, parts=(replace(layer.parts[0], activation=None),))
    difloat.save(api.apply(Net(), Plan("rtn", "w8a16", {"layer": bare})), tmp_path / "own")
    ending = "gguf" if to == "gguf" else "safetensors"
    with pytest.raises(ValueError, match="rotates its input; quantize without"):
        interchange.export_checkpoint(tmp_path / "own", tmp_path / f"out.{ending}", to)


DAMAGES = {
    "no levels": (lambda t, m: t.pop("layer.weight_codebook"), "got no weight_codebook"),
    "a correction": (
        lambda t, m: t.update({"layer.weight_correction": torch.zeros(1)}),
        "got a correction, which makes it asymmetric",
    ),
    "another block": (
        lambda t, m: m.update(convrot_groupsize=64),
        "must be of 256 and groups of 4 or more, got 64",
    ),
    "other scales": (
        lambda t, m: t.update({"layer.weight_s_rel": t["layer.weight_s_rel"][:, :8].contiguous()}),
        "weight_s_rel must be floating point",
    ),
    "rows of zero": (
        lambda t, m: t.update({"layer.weight_s_channel": torch.zeros(SHAPE[0])}),
        "weight_s_channel must be finite",
    ),
    "other bytes": (
        lambda t, m: t.update({"layer.weight": t["layer.weight"].view(torch.uint8)}),
        "weight must be int8",
    ),
}


@pytest.mark.parametrize("case", DAMAGES)
def test_damaged_files_are_named_and_not_imported(case: str, tmp_path: Path) -> None:
    damage, words = DAMAGES[case]
    _, tensors, mark = written(layer_of(FORMAT), tmp_path)
    tensors = copy.copy(tensors)
    damage(tensors, mark)
    tensors["layer.comfy_quant"] = torch.frombuffer(bytearray(json.dumps(mark).encode()), dtype=torch.uint8)
    save_file(tensors, tmp_path / "bad.safetensors")
    with pytest.raises(ValueError, match=words):
        interchange.import_into(Net(), tmp_path / "bad.safetensors", "comfy")
    remarks = interchange.validate(tmp_path / "bad.safetensors")
    assert any(remark.level == "error" and words in remark.message for remark in remarks)


def test_made_for_comfy_from_the_start(tmp_path: Path) -> None:
    """Linear layers in blocks of 256 have 4 bits and a rotation, others 8 bits, and all of them are written."""
    model = torch.nn.Sequential(torch.nn.Linear(512, 32), torch.nn.SiLU(), torch.nn.Linear(32, 16))
    plan = api.plan(model, "rtn", "w4a8", target="comfy", keep_8bit=(), progress=False)
    first, last = plan.layers["0"], plan.layers["2"]
    assert first.rotation == COMFY_ROTATION and first.parts[0].weight.format.bits == 4
    assert last.rotation is None and last.parts[0].weight.format.name == "int8"
    difloat.save(api.apply(model, plan), tmp_path / "own")
    file = interchange.export_checkpoint(tmp_path / "own", tmp_path / "c.safetensors", "comfy")
    formats = json.loads(bytes(load_file(file)["0.comfy_quant"].tolist()))
    assert formats["format"] == FORMAT
    assert all(remark.level == "ok" for remark in interchange.validate(file))
    with pytest.raises(ValueError, match="rounding must be nearest for comfy files at w4a8"):
        fit(Rule((parse("e2m1"),)), True, True, 512, "comfy", inputs=8)


def test_scales_are_whole_multiples_of_a_row_and_cost_little() -> None:
    weight = torch.randn(64, 512, generator=torch.Generator().manual_seed(3))
    asked = fit(Rule((parse("e2m1"),)), False, True, 512, "comfy", inputs=8)
    assert isinstance(asked, Rule)
    layer = draft_layer(weight, [512], asked).plan()
    free = draft_layer(weight, [512], replace(asked, scales="float32")).plan()
    errors = [float((dequantize(one) - weight).square().mean()) for one in (layer, free)]
    assert errors[1] < errors[0] < 1.5 * errors[1]
    with pytest.raises(ValueError, match="whole multiples of a row's number must be scales of channels"):
        Rule((parse("int8"),), "tensor", scales="whole")
