"""GGUF: blocks against the gguf package, whole files against it and against diffusers' loader, foreign files as a source."""

from __future__ import annotations

import functools
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from torch import Tensor

import difloat
import families
from difloat import api, interchange, sources
from difloat.checkpoint.layout import CheckpointError
from difloat.interchange import gguf_files
from difloat.interchange.gguf_blocks import encode, obstacle
from difloat.layers import packed
from difloat.numbers import tables
from difloat.numbers.formats import parse
from difloat.pipelines import denoiser_of
from difloat.plan.encode import dequantize, plan_layer
from difloat.plan.plan import LayerPlan, Plan
from difloat.plan.specs import Part, QuantSpec
from difloat.sources import Source
from tiny import PROMPTS, tiny_pixart, tiny_unet


def layer_of(
    name: str, shape: tuple[int, ...] = (5, 96), group: int | None = 32, zero: bool = False
) -> LayerPlan:
    """A random layer of a format with float16 scales, where levels allow it of both signs."""
    generator = torch.Generator().manual_seed(0)
    weight, format = torch.randn(shape, generator=generator), parse(name)
    spec = QuantSpec(format, "group" if group else "channel", group, zero_point=zero)
    count = spec.scale_count(*shape[:2])
    scale = (torch.rand(count, generator=generator) + 0.1).mul(3 / format.max).half().float()
    if format.levels:
        scale[::2] *= -1
    zeros = torch.randn(count, generator=generator).half().float()
    part = Part(shape[1], spec)
    return plan_layer(weight, [part], [scale], weight_zero_points=[zeros] if zero else None)


CASES = [
    ("iq4nl", "IQ4_NL", {}),
    ("iq4nl", "IQ4_NL", {"group": 64}),
    ("iq4nl", "IQ4_NL", {"group": None}),
    ("int4", "Q4_0", {}),
    ("e1m2", "Q4_0", {}),
    ("int3", "Q4_0", {}),
    ("uint4", "Q4_1", {}),
    ("uint4", "Q4_1", {"zero": True}),
    ("uint2", "Q4_1", {"zero": True}),
    ("int8", "Q8_0", {}),
    ("e2m3", "Q8_0", {}),
    ("int8", "Q8_0", {"shape": (4, 8, 3, 4), "group": None}),
    ("iq4nl", "IQ4_NL", {"shape": (4, 64, 1, 1)}),
]


@pytest.mark.parametrize(("format", "block", "more"), CASES)
def test_the_package_decodes_the_very_weight(format: str, block: str, more: dict) -> None:
    layer = layer_of(format, **more)
    assert obstacle(layer) == ""
    kind, data = encode(layer)
    assert kind.name == block
    found = gguf.dequantize(data.numpy(), gguf.GGMLQuantizationType[block])
    assert np.array_equal(found.reshape(layer.shape), dequantize(layer).numpy())


def test_our_table_is_that_of_the_package() -> None:
    assert tables.named()["iq4nl"] == gguf.quants.IQ4_NL.kvalues


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q8_0"])
def test_blocks_that_the_package_made_are_made_again(kind: str) -> None:
    """What its own rounding writes, encoded from the same codes and scales, gives the same bytes."""
    weight = np.random.default_rng(0).standard_normal((6, 64)).astype(np.float32)
    data = gguf.quantize(weight, gguf.GGMLQuantizationType[kind])
    blocks = torch.from_numpy(data).reshape(-1, gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]][1])
    values = torch.from_numpy(gguf.dequantize(data, gguf.GGMLQuantizationType[kind]))
    scale = blocks[:, :2].contiguous().view(torch.float16).float().flatten()
    name, zero = {"Q4_0": ("int4", None), "Q4_1": ("uint4", 1), "Q8_0": ("int8", None)}[kind]
    zeros = None if zero is None else [blocks[:, 2:4].contiguous().view(torch.float16).float().flatten()]
    if kind == "Q4_0":  # its scales have both signs, ours of integers are positive
        values[(scale < 0).reshape(6, 2).repeat_interleave(32, 1)] *= -1
        scale, blocks = scale.abs(), None
    spec = QuantSpec(parse(name), "group", 32, zero_point=zero is not None)
    layer = plan_layer(values, [Part(64, spec)], [scale], weight_zero_points=zeros)
    assert torch.equal(dequantize(layer), values)
    if blocks is not None:
        assert torch.equal(encode(layer)[1], torch.from_numpy(data))


@pytest.mark.parametrize(
    ("layer", "words"),
    [
        (layer_of("e2m1"), "grid of e2m1, which no block of GGUF has; quantize with --for gguf"),
        (layer_of("e4m3"), "grid of e4m3"),
        (layer_of("uint8", zero=True), "grid of uint8 with zero points"),
        (layer_of("int8", group=16), "one scale per 16 weights, finer than 32"),
        (layer_of("int8", shape=(4, 40)), "has 40 weights in a row, no multiple of 32"),
        (layer_of("int8", shape=(4, 32, 3, 3)), "convolution with scales per group"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_no_block_holds_is_refused_with_advice(layer: LayerPlan, words: str) -> None:
    assert words in obstacle(layer)


def test_scales_beyond_float16_are_refused() -> None:
    spec = QuantSpec(parse("int8"), "channel")
    layer = plan_layer(torch.randn(2, 32), [Part(32, spec)], [torch.tensor([0.1, 0.5])])
    assert "no float16 numbers; quantize with --set scale_format=float16" in obstacle(layer)


# Whole files


OPTIONS = {
    "IQ4_NL": ("rtn", "w4a16", {"weight_format": "iq4nl"}),
    "Q8_0": ("rtn", "w8a16", {"grid": "int"}),
    "Q4_1": ("qdit", "w4a16", {}),
}


def tiny() -> object:
    """A Stable Diffusion 3 of width 32, which diffusers loads in one file."""
    from diffusers import SD3Transformer2DModel

    pipeline = families.sd3()
    config = {**pipeline.transformer.config, "attention_head_dim": 16, "caption_projection_dim": 32}
    pipeline.transformer = families.seeded(lambda: SD3Transformer2DModel.from_config(config)).eval()
    return pipeline


@functools.cache
def planned(kind: str) -> Plan:
    recipe, bits, options = OPTIONS[kind]
    options = {"group_size": 32, "scale_format": "float16", **options}
    if recipe == "rtn":
        options |= {"weight_granularity": "group", "keep_8bit": (), "split": False}
    arguments = {"prompts": PROMPTS, "samples": 4, "steps": 2, "progress": False}
    return api.plan(tiny(), recipe, bits, exclude=["pos_embed.proj"], **arguments, **options)


@pytest.fixture(params=OPTIONS)
def exported(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, object, Path]:
    pipeline = api.apply(tiny(), planned(request.param))
    difloat.save(pipeline, tmp_path / "own")
    file = interchange.export_checkpoint(tmp_path / "own", tmp_path / "m.gguf", "gguf")
    return request.param, pipeline, file


def decoded_state(module: torch.nn.Module) -> dict[str, Tensor]:
    """The float weights of a model, those of its quantized layers decoded."""
    plan = api.plan_of(module)
    own = {f"{name}.{key}" for name, layer in plan.layers.items() for key in layer.tensors}
    state = {name: tensor for name, tensor in module.state_dict().items() if name not in own}
    return state | {f"{name}.weight": dequantize(layer) for name, layer in plan.layers.items()}


def test_a_file_holds_every_value(exported: tuple[str, object, Path]) -> None:
    kind, pipeline, file = exported
    read, counts = gguf_files.read(file)
    expected = decoded_state(pipeline.transformer)
    assert read.keys() == expected.keys() and counts[kind] > 0.5 * sum(counts.values())
    for name, tensor in expected.items():
        assert torch.equal(read[name], tensor), name
    levels = [remark.level for remark in interchange.validate(file, tiny().transformer.state_dict())]
    assert levels == ["ok"]
    reader = gguf.GGUFReader(file)
    types = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert reader.get_field("general.architecture").contents() == "sd3"
    assert types["transformer_blocks.0.attn.to_q.weight"] == kind
    assert types["transformer_blocks.0.attn.to_q.bias"] == "F32"


def test_diffusers_reads_and_samples_it(exported: tuple[str, object, Path]) -> None:
    """Through GGUFLinear: its products ``d * code`` are float16, of IQ4_NL float32, and nothing else is rounded."""
    from diffusers import GGUFQuantizationConfig, SD3Transformer2DModel
    from diffusers.quantizers.gguf.utils import GGUFLinear, dequantize_gguf_tensor

    kind, pipeline, file = exported
    tiny().save_pretrained(file.parent / "float")
    read = SD3Transformer2DModel.from_single_file(
        str(file),
        config=str(file.parent / "float"),
        subfolder="transformer",
        torch_dtype=torch.float32,
        quantization_config=GGUFQuantizationConfig(compute_dtype=torch.float32),
    )
    roundings = {"IQ4_NL": 0, "Q8_0": 1, "Q4_1": 2}[kind]
    for name, layer in api.plan_of(pipeline).layers.items():
        module = read.get_submodule(name)
        assert isinstance(module, GGUFLinear)
        weight, expected = dequantize_gguf_tensor(module.weight).float(), dequantize(layer)
        largest = max(float(expected.abs().max()), float((expected - _zeros(layer)).abs().max()))
        assert float((weight - expected).abs().max()) <= roundings * 2**-11 * largest, name
    ours = _latents(pipeline)
    pipeline.transformer = read
    assert float((ours - _latents(pipeline)).abs().max()) <= (2e-2 if roundings else 1e-4)


def _zeros(layer: LayerPlan) -> Tensor:
    zeros = layer.tensors.get("weight_zero_point")
    return torch.zeros(1) if zeros is None else zeros.reshape(layer.shape[0], -1).repeat_interleave(32, 1)


def _latents(pipeline: object) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    call = {
        "num_inference_steps": 3,
        "output_type": "latent",
        "generator": generator,
        "height": 16,
        "width": 16,
    }
    return pipeline("a red cat", **call).images


def test_a_foreign_file_is_a_float_source(exported: tuple[str, object, Path], tmp_path: Path) -> None:
    kind, pipeline, file = exported
    base = tmp_path / "base"
    tiny().save_pretrained(base)
    with pytest.raises(ValueError, match="base must name the pipeline that .* belongs to"):
        sources.load(Source(str(file)))
    loaded = denoiser_of(sources.load(Source(str(file), base=str(base), dtype="float32")))[1].state_dict()
    for name, tensor in decoded_state(pipeline.transformer).items():
        assert torch.equal(loaded[name], tensor), name


def test_types_that_we_do_not_write_are_read_as_floats(tmp_path: Path) -> None:
    """What llama.cpp's own tools quantize further: bfloat16, Q5_0, and K-quants if the package made them."""
    weight = np.random.default_rng(1).standard_normal((4, 64)).astype(np.float32)
    writer = gguf.GGUFWriter(tmp_path / "f.gguf", "flux")
    for kind in ("BF16", "Q5_0", "Q5_1"):
        type_ = gguf.GGMLQuantizationType[kind]
        writer.add_tensor(f"{kind}.weight", gguf.quantize(weight, type_), raw_dtype=type_)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    read, counts = gguf_files.read(tmp_path / "f.gguf")
    assert counts == {"BF16": 256, "Q5_0": 256, "Q5_1": 256}
    assert all(float((tensor.numpy() - weight).__abs__().max()) < 0.3 for tensor in read.values())
    (tmp_path / "broken.gguf").write_bytes((tmp_path / "f.gguf").read_bytes()[:200])
    with pytest.raises(CheckpointError, match="must be a whole GGUF file"):
        gguf_files.read(tmp_path / "broken.gguf")


def test_a_quantized_convolution_lies_flat_with_its_shape(tmp_path: Path) -> None:
    options = {"grid": "int", "scale_format": "float16", "keep_8bit": (), "split": False}
    model = tiny_unet().unet
    loose = [name for name, layer in packed.quantizable(model).items() if layer.weight[0].numel() % 32]
    plan = api.plan(
        tiny_unet(),
        "rtn",
        "w8a16",
        prompts=PROMPTS,
        samples=4,
        steps=2,
        progress=False,
        exclude=loose,
        **options,
    )
    api.apply(model, plan)
    difloat.save(model, tmp_path / "own")
    file = interchange.export_checkpoint(tmp_path / "own", tmp_path / "out", "gguf")
    name = next(name for name, layer in plan.layers.items() if layer.kind == "conv2d")
    assert file.name.endswith(".gguf") and (tmp_path / "out" / "config.json").is_file()
    tensor = next(t for t in gguf.GGUFReader(file).tensors if t.name == f"{name}.weight")
    assert len(tensor.shape) == 2 and tensor.tensor_type.name == "Q8_0"
    read = gguf_files.read(file)[0]
    for name, tensor in decoded_state(model).items():
        assert torch.equal(read[name], tensor), name


def test_what_does_not_fit_leaves_nothing(tmp_path: Path) -> None:
    model = api.apply(tiny_pixart(), api.plan(tiny_pixart(), "rtn", "w4a16", prompts=PROMPTS, progress=False))
    difloat.save(model, tmp_path / "own")
    with pytest.raises(ValueError, match="gguf files must hold every layer without loss, but .* --for gguf"):
        interchange.export_checkpoint(tmp_path / "own", tmp_path / "m.gguf", "gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["own"]


def test_validate_knows_what_is_wrong_with_a_file(exported: tuple[str, object, Path], tmp_path: Path) -> None:
    kind, _, file = exported
    state = {name: -tensor for name, tensor in tiny().transformer.state_dict().items()}
    messages = [remark.message for remark in interchange.validate(file, state)]
    assert any("near the float one" in message for message in messages)
    content = bytearray(file.read_bytes())
    tensor = next(t for t in gguf.GGUFReader(file).tensors if t.tensor_type.name == kind)
    content[tensor.data_offset : tensor.data_offset + 2] = b"\x00\x7c"  # the first d is infinite
    (tmp_path / "bad.gguf").write_bytes(content)
    (remark, *_) = interchange.validate(tmp_path / "bad.gguf")
    assert (remark.level, remark.place) == ("error", tensor.name)
    writer = gguf.GGUFWriter(tmp_path / "float.gguf", "pixart")
    writer.add_tensor("a.weight", np.zeros((2, 2), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = [(remark.level, remark.message[:24]) for remark in interchange.validate(tmp_path / "float.gguf")]
    assert found == [("error", "file must hold quantized"), ("suspicion", "general.architecture is ")]
