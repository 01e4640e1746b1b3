"""ComfyUI: files read back by comfy-kitchen's own eager code, and multiplied by it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import comfy_kitchen
import pytest
import torch
from comfy_kitchen.tensor import QuantizedTensor, get_layout_class
from safetensors.torch import load_file
from torch import Tensor

import difloat
from difloat import api, interchange
from difloat.layers import packed
from difloat.methods.smoothed_branch import nearest_beside_branch, powers_of_two
from difloat.numbers.formats import parse
from difloat.plan.encode import dequantize, join_variants, stored_values
from difloat.plan.plan import LayerPlan, Plan
from difloat.plan.rules import Rule, draft_layer
from difloat.plan.specs import QuantSpec, Side
from tiny import tiny_unet

LAYOUTS = {
    "int8_tensorwise": "TensorWiseINT8Layout",
    "float8_e4m3fn": "TensorCoreFP8Layout",
    "nvfp4": "TensorCoreNVFP4Layout",
    "mxfp8": "TensorCoreMXFP8Layout",
    "svdquant_w4a4": "TensorCoreSVDQuantW4A4Layout",
}
RULES = {
    "int8_tensorwise": Rule((parse("int8"),), "channel"),
    "float8_e4m3fn": Rule((parse("e4m3fn"),), "tensor"),
    "nvfp4": Rule((parse("e2m1"),), "group", 16, scales="e4m3"),
    "mxfp8": Rule((parse("e4m3fn"),), "group", 32, scales="e8m0"),
    "svdquant_w4a4": Rule((parse("int4"),), "group", 64, scales="float16"),
}


def layer_of(kind: str, shape: tuple[int, int] = (64, 128)) -> LayerPlan:
    generator = torch.Generator().manual_seed(0)
    layer = draft_layer(torch.randn(shape, generator=generator), [shape[1]], RULES[kind]).plan()
    if kind != "svdquant_w4a4":
        return layer
    down, up = torch.randn(8, shape[1], generator=generator), torch.randn(shape[0], 8, generator=generator)
    return replace(
        layer, side=Side(8), tensors={**layer.tensors, "side_down": down.half(), "side_up": up.half()}
    )


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(128, 64)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def written(layer: LayerPlan, folder: Path) -> tuple[dict[str, Tensor], dict]:
    """The tensors of one layer in a file of ComfyUI's, and its mark."""
    model = api.apply(Net(), Plan("rtn", "w8a16", {"layer": layer}))
    difloat.save(model, folder / "own")
    tensors = load_file(interchange.export_checkpoint(folder / "own", folder / "c.safetensors", "comfy"))
    return tensors, json.loads(bytes(tensors["layer.comfy_quant"].tolist()))


def read(tensors: dict[str, Tensor], mark: dict, shape: tuple[int, ...]) -> QuantizedTensor:
    """The weight as comfy-kitchen holds it, its parameters named as ComfyUI's loader names them."""
    layout = get_layout_class(LAYOUTS[mark["format"]])
    named = {"orig_dtype": torch.float32, "orig_shape": shape}
    scale = tensors["layer.weight_scale"]
    if mark["format"] == "svdquant_w4a4":
        for key in ("proj_down", "proj_up", "smooth_factor"):
            named[key] = tensors[f"layer.weight_{key}"].float()
        scale = (
            scale.float()
        )  # its dtype is what the eager code computes in: the numbers are those of the file
    if mark["format"] == "nvfp4":
        named |= {"block_scale": scale}
        scale = tensors["layer.weight_scale_2"]
    if mark["format"] == "mxfp8":
        scale = scale.view(torch.float8_e8m0fnu)
    return QuantizedTensor(
        tensors["layer.weight"], LAYOUTS[mark["format"]], layout.Params(scale=scale, **named)
    )


@pytest.mark.parametrize("kind", ["int8_tensorwise", "float8_e4m3fn", "nvfp4", "mxfp8"])
def test_the_eager_reader_gets_the_very_weight(kind: str, tmp_path: Path) -> None:
    layer = layer_of(kind)
    tensors, mark = written(layer, tmp_path)
    assert mark["format"] == kind
    with comfy_kitchen.use_backend("eager"):
        found = read(tensors, mark, layer.shape).dequantize()
    assert torch.equal(found, dequantize(layer))


def test_int8_files_say_what_comfyui_wants_to_know(tmp_path: Path) -> None:
    tensors, mark = written(layer_of("int8_tensorwise"), tmp_path)
    assert mark == {"format": "int8_tensorwise", "orig_dtype": "torch.float32", "per_row": True}
    assert tensors["layer.weight"].dtype == torch.int8 and tuple(tensors["layer.weight_scale"].shape) == (
        64,
        1,
    )


def test_a_plan_of_int8_inputs_is_multiplied_as_ours(tmp_path: Path) -> None:
    """W8A8 with inputs rounded per token is what ComfyUI computes, up to the rounding of its own sums."""
    layer = layer_of("int8_tensorwise")
    part = replace(layer.parts[0], activation=QuantSpec(parse("int8"), "token", online=True))
    tensors, mark = written(replace(layer, parts=(part,)), tmp_path)
    model = api.apply(Net(), Plan("rtn", "w8a8", {"layer": replace(layer, parts=(part,))}))
    x = torch.randn(5, 128, generator=torch.Generator().manual_seed(1))
    with torch.no_grad(), comfy_kitchen.use_backend("eager"):
        theirs = torch.nn.functional.linear(x, read(tensors, mark, layer.shape), model.layer.bias)
        ours = model.layer(x)
    assert float((ours - theirs).abs().max()) <= 1e-5 * float(ours.abs().max())


def smoothed_by(factors: Tensor) -> LayerPlan:
    """What recipe svdquant makes of a layer with these factors of input channels."""
    weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
    laid_out = join_variants([draft_layer(weight, [128], RULES["svdquant_w4a4"]).plan()], (), factors)
    return nearest_beside_branch(weight, laid_out, RULES["svdquant_w4a4"], 32)


@pytest.mark.parametrize("smoothed", [False, True])
def test_a_branch_in_int4_is_multiplied_as_ours(smoothed: bool, tmp_path: Path) -> None:
    layer = layer_of("svdquant_w4a4")
    if smoothed:
        layer = smoothed_by(powers_of_two(torch.logspace(-1, 1, 128)))
        assert layer.side == Side(4) and len(layer.tensors["input_factor"].unique()) > 4
    part = replace(layer.parts[0], activation=QuantSpec(parse("int4"), "group", 64, online=True))
    layer = replace(layer, parts=(part,))
    tensors, mark = written(layer, tmp_path)
    assert mark == {"format": "svdquant_w4a4"}
    model = api.apply(Net(), Plan("rtn", "w4a4", {"layer": layer}))
    x = torch.randn(5, 128, generator=torch.Generator().manual_seed(1))
    with torch.no_grad(), comfy_kitchen.use_backend("eager"):
        # In float32: they compute in the dtype of the scales, whose numbers stay those of the file.
        wide = {key: t.float() for key, t in tensors.items() if t.dtype == torch.float16}
        smooth, down = wide["layer.weight_smooth_factor"], wide["layer.weight_proj_down"]
        act, scales, low = comfy_kitchen.quantize_svdquant_w4a4(x, smooth=smooth, lora_down=down)
        theirs = comfy_kitchen.scaled_mm_svdquant_w4a4(
            act=act,
            wgt=tensors["layer.weight"],
            ascales=scales,
            wscales=wide["layer.weight_scale"],
            lora_act_in=low,
            lora_up=wide["layer.weight_proj_up"],
            bias=model.layer.bias,
        )[: len(x)]
        ours = model.layer(x)
    assert float((ours - theirs).abs().max()) <= 1e-5 * float(ours.abs().max())
    assert {name.removeprefix("layer.weight") for name in tensors} >= _suffixes(tensors, layer)
    assert [remark.level for remark in interchange.validate(tmp_path / "c.safetensors")] == ["ok"]
    codes = packed_int4(tensors["layer.weight"])
    weight = codes * tensors["layer.weight_scale"].float().t().repeat_interleave(64, 1)
    assert torch.equal(weight, stored_values(layer))
    assert torch.equal(tensors["layer.weight_proj_down"], layer.tensors["side_down"].t())


def test_smoothing_by_other_numbers_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match="has factors of input channels that are no powers of two; quantize with"
    ):
        written(smoothed_by(torch.logspace(-1, 1, 128)), tmp_path)


def test_a_plan_of_svdquant_goes_into_a_file(tmp_path: Path) -> None:
    model = Net()
    x = torch.randn(8, 128, generator=torch.Generator().manual_seed(1))
    plan = difloat.plan(
        model, "svdquant", "w4a4", forward_loop=lambda module: module(x), keep_8bit=(), progress=False
    )
    assert plan.layers["layer"].side == Side(4) and plan.layers["layer"].smoothed
    tensors, mark = written(plan.layers["layer"], tmp_path)
    assert mark == {"format": "svdquant_w4a4"}
    weight = packed_int4(tensors["layer.weight"])
    weight *= tensors["layer.weight_scale"].float().t().repeat_interleave(64, 1)
    assert torch.equal(weight, stored_values(plan.layers["layer"]))


def _suffixes(tensors: dict[str, Tensor], layer: LayerPlan) -> set[str]:
    """What comfy-kitchen's own layout calls its tensors behind the weight's name."""
    layout = get_layout_class(LAYOUTS["svdquant_w4a4"])
    names = {key: tensors[f"layer.weight_{key}"] for key in ("proj_down", "proj_up", "smooth_factor")}
    params = layout.Params(
        scale=tensors["layer.weight_scale"], orig_dtype=torch.float16, orig_shape=layer.shape, **names
    )
    return set(layout.state_dict_tensors(tensors["layer.weight"], params))


def packed_int4(weight: Tensor) -> Tensor:
    """Signed nibbles, the even column in the low one, decoded by comfy-kitchen."""
    from comfy_kitchen.backends.eager.svdquant import _unpack_int4_row_major

    return _unpack_int4_row_major(weight).float()


def test_int8_files_come_back(tmp_path: Path) -> None:
    layer = layer_of("int8_tensorwise")
    written(layer, tmp_path)
    again = Net()
    plan = interchange.import_into(again, tmp_path / "c.safetensors", "comfy")
    assert torch.equal(dequantize(plan.layers["layer"]), dequantize(layer))
    assert [remark.level for remark in interchange.validate(tmp_path / "c.safetensors")] == ["ok"]


def test_a_refusal_speaks_of_the_layer_s_own_format(tmp_path: Path) -> None:
    """Not of FP8 where the layer has int8, and of the option that makes such files from the start."""
    grouped = draft_layer(torch.randn(64, 128), [128], Rule((parse("int8"),), "group", 32)).plan()
    with pytest.raises(ValueError, match="finer than all input channels of ComfyUI int8; .* or --for comfy$"):
        written(grouped, tmp_path)
    with pytest.raises(ValueError, match="what --for diffusers makes is written with nvfp4"):
        interchange.export_checkpoint(tmp_path / "own", tmp_path / "out", "diffusers")


def test_rotated_files_are_refused(tmp_path: Path) -> None:
    tensors, mark = written(layer_of("int8_tensorwise"), tmp_path)
    text = json.dumps({**mark, "convrot": True, "convrot_groupsize": 256}).encode()
    tensors["layer.comfy_quant"] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    from safetensors.torch import save_file

    save_file(tensors, tmp_path / "rotated.safetensors")
    with pytest.raises(ValueError, match="block of a rotation must divide the 128 input channels, got 256"):
        interchange.import_into(Net(), tmp_path / "rotated.safetensors", "comfy")


def test_convolutions_are_float_and_named(tmp_path: Path) -> None:
    model = tiny_unet().unet
    rules = {False: RULES["int8_tensorwise"], True: Rule((parse("int4"),), "group", 8)}
    layers = {
        name: draft_layer(layer.weight, [layer.weight.shape[1]], rules[layer.weight.dim() == 4]).plan()
        for name, layer in packed.quantizable(model).items()
    }
    difloat.save(api.apply(model, Plan("rtn", "w8a16", layers)), tmp_path / "own")
    tensors = load_file(interchange.export_checkpoint(tmp_path / "own", tmp_path / "c.safetensors", "comfy"))
    for name, layer in layers.items():
        if layer.kind == "conv2d":
            assert torch.equal(tensors[f"{name}.weight"], dequantize(layer)), name
        else:
            assert tensors[f"{name}.weight"].dtype == torch.int8, name
    first, second = interchange.remarks_of(tmp_path / "own", "comfy")
    assert "conv_in" in first and "ComfyUI holds no quantized convolutions" in first
    assert "rounds the inputs to 8 bits per token" in second


def test_what_does_not_fit_a_branch_is_refused(tmp_path: Path) -> None:
    layer = layer_of("svdquant_w4a4")
    wide = replace(layer_of("int8_tensorwise"), side=layer.side)
    wide = replace(wide, tensors={**wide.tensors, **{k: layer.tensors[k] for k in ("side_down", "side_up")}})
    with pytest.raises(ValueError, match="on the grid of int8, not int4"):
        written(wide, tmp_path / "a")
    rough = replace(layer, tensors={**layer.tensors, "weight_scale": layer.tensors["weight_scale"] * 1.0001})
    with pytest.raises(ValueError, match="scale_format=float16"):
        written(rough, tmp_path / "b")
