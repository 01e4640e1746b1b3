"""OpenVINO: exported denoisers on its CPU runtime beside ours, our codes among its constants, refusals."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import openvino as ov
import pytest
import torch
from torch import Tensor

import difloat
import families
from difloat import api, interchange
from difloat.interchange import openvino_ir
from difloat.layers import packed
from difloat.numbers.formats import parse
from difloat.pipelines import denoiser_of
from difloat.plan.encode import dequantize, plan_layer
from difloat.plan.plan import Plan
from difloat.plan.rules import Rule, asymmetric_integers, draft_layer
from difloat.plan.specs import Part, QuantSpec
from tiny import tiny_pixart, tiny_unet

EXACT = {"INFERENCE_PRECISION_HINT": "f32"}


def computed(weight: ov.Node) -> np.ndarray:
    """What the operations of a compressed weight come to."""
    model = ov.Model([weight], [])
    return ov.Core().compile_model(model, "CPU", EXACT)([])[0]


@pytest.mark.parametrize("granularity", ["tensor", "channel", "group"])
@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("int4", "i4"),
        ("uint4", "u4"),
        ("int8", "i8"),
        ("uint8", "u8"),
        ("e1m2", "i4"),
        ("e2m1", "f4e2m1"),
        ("e4m3fn", "f8e4m3"),
        ("e4m3", "u8"),
        ("iq4nl", "u8"),
        ("int6", "i8"),
    ],
)
def test_a_weight_is_its_very_numbers(name: str, kind: str, granularity: str) -> None:
    generator = torch.Generator().manual_seed(0)
    format = parse(name)
    for shape in ((6, 32), (4, 32, 3, 3), (4, 40)):
        spec = QuantSpec(
            format, granularity, 16 if granularity == "group" else None, zero_point=not format.signed
        )
        count = spec.scale_count(*shape[:2])
        scale = torch.rand(count, generator=generator) * 0.01 + 0.001
        zeros = [torch.randn(count, generator=generator)] if not format.signed else None
        weight = torch.randn(shape, generator=generator) * scale.max() * format.max
        layer = plan_layer(weight, [Part(shape[1], spec)], [scale], weight_zero_points=zeros)
        node = openvino_ir._compressed(ov, layer)
        types = set()
        stack = [node]
        while stack:
            one = stack.pop()
            stack += [port.get_source_output().get_node() for port in one.inputs()]
            types.add(one.get_output_element_type(0).get_type_name())
        assert kind in types
        assert np.array_equal(computed(node), dequantize(layer).numpy())


def quantized(pipeline: object, **rule: object) -> object:
    """All layers, data-free, weights only."""
    module = denoiser_of(pipeline)[1]
    layers = {}
    for name, layer in packed.quantizable(module).items():
        asked = Rule(**rule) if rule else asymmetric_integers(4, "channel")
        layers[name] = draft_layer(layer.weight, [layer.weight.shape[1]], asked).plan()
    return api.apply(pipeline, Plan("rtn", "w4a16", layers))


PIPELINES = {"unet": tiny_unet, "pixart": tiny_pixart, "sdxl": families.sdxl, "flux": families.flux}
INT4 = {"formats": (parse("int4"),), "granularity": "channel"}


def outputs(module: torch.nn.Module, call: tuple, file: Path) -> tuple[Tensor, Tensor]:
    """Of a call, ours and OpenVINO's."""
    arguments = openvino_ir.by_name(module, call)
    inputs = {}
    for path, leaf in torch.utils._pytree.tree_flatten_with_path(arguments)[0]:
        if isinstance(leaf, Tensor):
            inputs[openvino_ir._name(path)] = leaf.numpy()
    with torch.no_grad():
        ours = module(**{**arguments, "return_dict": False})[0]
    compiled = ov.Core().compile_model(file, "CPU", EXACT)
    assert all(port.get_names() & inputs.keys() for port in compiled.inputs) and len(compiled.inputs) == len(
        inputs
    )
    return ours, torch.from_numpy(compiled(inputs)[0])


@pytest.mark.parametrize("family", PIPELINES)
def test_the_runtime_gives_our_outputs(family: str, tmp_path: Path) -> None:
    pipeline = quantized(PIPELINES[family](), **INT4)
    difloat.save(pipeline, tmp_path / "own")
    file = interchange.export_checkpoint(tmp_path / "own", tmp_path / "ir", "openvino")
    assert sorted(path.name for path in (tmp_path / "ir").iterdir())[0] == "config.json"
    name, module = denoiser_of(pipeline)
    call = openvino_ir.example_call(pipeline, name, api.prompts_for(pipeline, None))
    ours, theirs = outputs(module, call, file)
    assert float((ours - theirs).abs().max()) <= 2e-5 * float(ours.abs().max())


def test_other_sizes_go_through(tmp_path: Path) -> None:
    """Traced with two rows of 8 x 8 latents, run with three of 16 x 8."""
    pipeline = quantized(tiny_unet(), **INT4)
    difloat.save(pipeline, tmp_path / "own")
    file = interchange.export_checkpoint(tmp_path / "own", tmp_path / "m.xml", "openvino")
    generator = torch.Generator().manual_seed(0)
    x, text = torch.randn(3, 4, 16, 8, generator=generator), torch.randn(3, 12, 16, generator=generator)
    ours, theirs = outputs(pipeline.unet, ((x, torch.tensor(500), text), {}), file)
    assert float((ours - theirs).abs().max()) <= 2e-5 * float(ours.abs().max())


def test_the_file_is_as_small_as_ours_and_keeps_inputs_float(tmp_path: Path) -> None:
    pipeline = quantized(tiny_unet())
    difloat.save(pipeline, tmp_path / "own")
    file = interchange.export_checkpoint(tmp_path / "own", tmp_path / "m.xml", "openvino")
    codes = {"u4": 0}
    for node in ov.Core().read_model(file).get_ops():
        if node.get_type_name() == "Constant" and node.get_element_type().get_type_name() in codes:
            codes["u4"] += int(np.prod(node.get_output_shape(0)))
    plan = api.plan_of(pipeline)
    assert codes["u4"] == sum(int(np.prod(layer.shape)) for layer in plan.layers.values())
    assert [remark.level for remark in interchange.validate(file)] == ["ok"]
    own = (tmp_path / "own" / "unet" / "diffusion_pytorch_model.safetensors").stat().st_size
    assert file.with_suffix(".bin").stat().st_size < 1.2 * own
    assert (
        ov.Core().read_model(file).get_rt_info(["runtime_options", "DYNAMIC_QUANTIZATION_GROUP_SIZE"]).value
        == "0"
    )


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    pipeline = tiny_unet()
    plan = api.plan(pipeline, "rtn", "w4a8", forward_loop=None, progress=False)
    difloat.save(api.apply(pipeline, plan), tmp_path / "own")
    with pytest.raises(
        ValueError,
        match="openvino files must hold every layer .*quantize with --set split=false|weights only",
    ):
        interchange.export_checkpoint(tmp_path / "own", tmp_path / "m.xml", "openvino")
    with pytest.raises(ValueError, match="checkpoint must be of a pipeline to be traced"):
        interchange.export_checkpoint(tmp_path / "own" / "unet", tmp_path / "m.xml", "openvino")
    assert [path.name for path in tmp_path.iterdir()] == ["own"]


def test_validate_knows_what_is_wrong_with_a_file(tmp_path: Path) -> None:
    from openvino import opset13 as op

    x = op.parameter([-1, 4], np.float32)
    for name, codes in (("float", np.ones((4, 4), np.float32)), ("int8", np.ones((4, 4), np.int8))):
        weight = op.convert(op.constant(codes), np.float32)
        ov.save_model(ov.Model([op.matmul(x, weight, False, True)], [x]), tmp_path / f"{name}.xml")
    assert [r.message for r in interchange.validate(tmp_path / "float.xml")][0].startswith(
        "file must hold compressed"
    )
    assert [remark.level for remark in interchange.validate(tmp_path / "int8.xml")] == ["ok", "suspicion"]
    (tmp_path / "float.xml").unlink()
    assert [remark.level for remark in interchange.validate(tmp_path)] == ["ok", "suspicion"]  # its directory
    (tmp_path / "int8.xml").write_text("<net")
    assert "must be read by OpenVINO" in interchange.validate(tmp_path / "int8.xml")[0].message
    (tmp_path / "int8.bin").unlink()
    assert "int8.bin must be beside the file" in interchange.validate(tmp_path / "int8.xml")[0].message
