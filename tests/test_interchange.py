"""Files of other programs: bytes after the published layouts, loss refused, round trips, and diffusers' own reader."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

import difloat
from difloat import api, interchange
from difloat.calibration.collect import denoiser_of
from difloat.interchange.layers import decode, encode, obstacle, split_scales
from difloat.interchange.schemes import COMFY, DIALECTS, FP8_ROWS, MXFP4, NVFP4, from_tiles, to_tiles
from difloat.layers import packed
from difloat.numbers.formats import parse
from difloat.plan.encode import dequantize, plan_layer
from difloat.plan.plan import LayerPlan, Plan
from difloat.plan.specs import Part, QuantSpec

COMFY_NVFP4, COMFY_FP8, COMFY_E5M2, COMFY_MXFP8, COMFY_INT8, _ = COMFY  # rotated int8: test_comfy_tables.py
SCHEMES = [NVFP4, FP8_ROWS, MXFP4, *COMFY[:5]]
E2M1 = [0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6]  # OCP MX v1.0, table 5


def layer_for(scheme, rows: int = 20, columns: int = 64, seed: int = 0) -> LayerPlan:
    """A random layer that the scheme holds exactly."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    per_row = columns // scheme.group_size if scheme.group_size else 1
    count = 1 if scheme.group_size is None else rows * per_row
    if scheme.scales == "e8m0":
        scale = torch.exp2(torch.randint(-9, 3, (count,), generator=generator).float())
    elif scheme.scales == "e4m3":
        numbers = torch.rand(count, generator=generator).mul(400).add(0.1).to(torch.float8_e4m3fn).float()
        scale = numbers * 0.00123  # a float32 number without short mantissa
    else:
        scale = torch.rand(count, generator=generator) * 0.01 + 1e-4
    granularity = "tensor" if scheme.group_size is None else "group" if scheme.group_size else "channel"
    spec = QuantSpec(scheme.element, granularity, scheme.group_size or None)
    return plan_layer(weight, [Part(columns, spec)], [scale])


def decoded_by_hand(tensors: dict[str, Tensor], scheme, shape: tuple[int, int]) -> np.ndarray:
    """The float32 weight, element by element after the published layouts; nothing of the package is called."""
    raw = tensors["weight"].view(torch.uint8).numpy()
    scale = tensors["weight_scale"]
    scale_bytes = (
        scale.contiguous().view(torch.uint8).numpy().reshape(-1) if scale.dtype != torch.float32 else None
    )
    fp8 = torch.float8_e4m3fn if scheme.element.mantissa_bits == 3 else torch.float8_e5m2
    columns_of_scales = -(-raw.shape[1] * (2 if scheme.element.bits == 4 else 1) // (scheme.group_size or 1))
    result = np.zeros(shape, np.float32)
    for row in range(shape[0]):
        for column in range(shape[1]):
            if scheme.element.bits == 4:
                byte = int(raw[row, column // 2])
                upper = (column % 2 == 0) == scheme.high_first
                value = E2M1[byte >> 4 if upper else byte & 15]
            elif scheme.element.integer:
                value = int(raw[row, column]) - 256 * (int(raw[row, column]) > 127)
            else:
                value = float(torch.tensor([raw[row, column]]).view(fp8).float())
            if scheme.group_size:
                group = column // scheme.group_size
                at = row * columns_of_scales + group
                if scheme.tiled:  # cuBLAS, "1D block scaling factors layout"
                    tiles = -(-columns_of_scales // 4)
                    tile = row // 128 * tiles + group // 4
                    at = tile * 512 + row % 32 * 16 + row % 128 // 32 * 4 + group % 4
                byte = int(scale_bytes[at])
                if scheme.scales == "e8m0":
                    factor = np.float32(2.0 ** (byte - 127))
                else:
                    number = float(torch.tensor([byte], dtype=torch.uint8).view(torch.float8_e4m3fn).float())
                    factor = np.float32(number) * np.float32(tensors["weight_scale_2"])
            else:
                factor = np.float32(scale.reshape(-1)[row if scheme.group_size == 0 else 0])
            result[row, column] = np.float32(value) * factor
    return result


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.name)
@pytest.mark.parametrize("shape", [(20, 64), (130, 160)])
def test_an_independent_reader_gets_the_weight_bit_for_bit(scheme, shape) -> None:
    layer = layer_for(scheme, *shape)
    assert obstacle(layer, scheme) == ""
    tensors = encode(layer, scheme)
    assert tuple(tensors["weight_scale"].shape) == scheme.scale_shape(shape)
    expected = dequantize(layer).numpy()
    assert np.array_equal(decoded_by_hand(tensors, scheme, shape), expected)
    assert torch.equal(dequantize(decode(tensors, scheme, shape)), torch.from_numpy(expected))


def test_the_files_that_diffusers_decodes() -> None:
    from diffusers.quantizers.bfl.utils import dequantize_fp8r, dequantize_nvfp4

    layer = layer_for(NVFP4)
    tensors = encode(layer, NVFP4)
    got = dequantize_nvfp4(tensors["weight"], tensors["weight_scale"], tensors["weight_scale_2"])
    assert torch.equal(got, dequantize(layer)) and tensors["input_scale"].shape == ()
    layer = layer_for(FP8_ROWS)
    tensors = encode(layer, FP8_ROWS)
    assert torch.equal(dequantize_fp8r(tensors["weight"], tensors["weight_scale"]), dequantize(layer))


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 300), st.integers(1, 9))
def test_tiles_are_cublas_tiles(rows: int, columns: int) -> None:
    scales = torch.randint(1, 255, (rows, columns), dtype=torch.uint8)
    tiled = to_tiles(scales).reshape(-1)
    assert torch.equal(from_tiles(tiled, rows, columns), scales)
    for row, column in [(0, 0), (rows - 1, columns - 1), (rows // 2, columns // 2)]:
        tile = row // 128 * -(-columns // 4) + column // 4
        assert tiled[tile * 512 + row % 32 * 16 + row % 128 // 32 * 4 + column % 4] == scales[row, column]
    assert (
        tiled.numel() == -(-rows // 128) * -(-columns // 4) * 512 and tiled.count_nonzero() == scales.numel()
    )


@settings(max_examples=60, deadline=None)
@given(st.floats(2**-40, 2**20, width=32), st.lists(st.integers(1, 126), min_size=1, max_size=12))
def test_scales_split_into_e4m3_numbers_and_one_float(shared: float, codes: list[int]) -> None:
    numbers = torch.tensor(codes, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    scales = numbers * torch.tensor(shared)
    found = split_scales(scales)
    assert found is not None and torch.equal(found[0].float() * found[1], scales)


def test_scales_of_another_grid_do_not_split() -> None:
    assert split_scales(torch.tensor([1.0, 1.0 + 2**-20])) is None
    assert split_scales(torch.rand(64, generator=torch.Generator().manual_seed(0))) is None


def small(spec: QuantSpec, activation: QuantSpec | None = None, **scales: Tensor) -> LayerPlan:
    count = spec.scale_count(4, 64)
    weight = torch.randn(4, 64, generator=torch.Generator().manual_seed(1))
    return plan_layer(weight, [Part(64, spec, activation)], [scales.get("scale", torch.full((count,), 0.5))])


TOKEN_E4M3 = QuantSpec(parse("e4m3fn"), "token", online=True)
GROUP16 = QuantSpec(parse("e2m1"), "group", 16)


@pytest.mark.parametrize(
    ("layer", "scheme", "words"),
    [
        (small(GROUP16, TOKEN_E4M3), NVFP4, "quantizes its input to e4m3fn; quantize weights only"),
        (small(QuantSpec(parse("e1m2"), "group", 16)), NVFP4, "on the grid of e1m2, not e2m1"),
        (small(QuantSpec(parse("int4"), "group", 16)), NVFP4, "on the grid of int4"),
        (small(QuantSpec(parse("e2m1"), "group", 8)), NVFP4, "finer than 16 input channels"),
        (small(GROUP16), MXFP4, "finer than 32 input channels"),
        (small(GROUP16, scale=torch.linspace(0.1, 1, 16)), NVFP4, "scale_format=e4m3"),
        (small(QuantSpec(parse("e2m1"), "channel"), scale=torch.full((4,), 0.3)), MXFP4, "powers of two"),
        (small(QuantSpec(parse("e4m3"), "channel"), scale=torch.full((4,), 0.004)), FP8_ROWS, "uses 480"),
        (small(QuantSpec(parse("e4m3fn"), "channel")), COMFY_FP8, "weight_granularity=tensor"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_what_would_be_lost_is_refused_with_advice(layer: LayerPlan, scheme, words: str) -> None:
    assert words in obstacle(layer, scheme)


def test_what_is_only_arranged_otherwise_is_not_refused() -> None:
    """Coarser scales are repeated, e4m3 without its 480 is e4m3fn, e4m3fn inputs per token are what fp8 readers do."""
    coarse = small(QuantSpec(parse("e2m1"), "channel"), scale=torch.tensor([0.5, 1.0, 2.0, 0.25]))
    for scheme in (NVFP4, MXFP4, COMFY_NVFP4):
        assert obstacle(coarse, scheme) == ""
        assert torch.equal(dequantize(decode(encode(coarse, scheme), scheme, (4, 64))), dequantize(coarse))
    inputs = small(QuantSpec(parse("e4m3"), "channel"), TOKEN_E4M3, scale=torch.full((4,), 0.05))
    assert obstacle(inputs, FP8_ROWS) == ""


def test_empty_groups_and_negative_zeros_are_read() -> None:
    tensors = encode(layer_for(NVFP4, 4, 32), NVFP4)
    tensors["weight_scale"] = tensors["weight_scale"].clone()
    tensors["weight_scale"][1, 1] = 0
    tensors["weight"][0, 0] = 0x88  # two negative zeros
    layer = decode(tensors, NVFP4, (4, 32))
    weight = dequantize(layer)
    assert bool((weight[1, 16:] == 0).all()) and bool((weight[0, :2] == 0).all())
    assert bool((layer.tensors["weight_scale"] > 0).all())
    assert not bool((layer.codes()[0] == 8).any()), "negative zero is no code of ours"
    assert obstacle(layer, NVFP4) == ""


# Whole files


class Net(nn.Module):
    """Two linear layers and a norm, with the parts of a denoiser that a file must keep as they are."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.second = (
            nn.Linear(64, 96),
            nn.LayerNorm(96),
            nn.Linear(96, 32, bias=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.norm(self.first(x)).relu())


def net(seed: int = 0) -> Net:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Net()


def bytes_of(tensor: Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


OPTIONS = {
    "nvfp4": ("w4a16", {"group_size": 16, "weight_granularity": "group", "scale_format": "e4m3"}),
    "fp8": ("w8a16", {"weight_format": "e4m3fn"}),
    "mxfp4": ("w4a16", {"group_size": 32, "weight_granularity": "group", "scale_format": "e8m0"}),
    "comfy": ("w4a16", {"group_size": 16, "weight_granularity": "group", "scale_format": "e4m3"}),
}


@functools.cache
def planned(kind: str) -> Plan:
    bits, options = OPTIONS[kind]

    def loop(module: nn.Module) -> None:
        module(torch.randn(8, 64, generator=torch.Generator().manual_seed(0)))

    return api.plan(net(), "rtn", bits, forward_loop=loop, samples=8, keep_8bit=(), progress=False, **options)


@pytest.mark.parametrize("kind", DIALECTS)
def test_rtn_makes_plans_that_survive_export_and_import(kind: str, tmp_path: Path) -> None:
    model = api.apply(net(), planned(kind))
    difloat.save(model, tmp_path / "own")
    file = interchange.export_checkpoint(tmp_path / "own", tmp_path / "foreign.safetensors", kind)
    for reference in (None, net().state_dict()):
        remarks = interchange.validate(file, reference)
        assert [remark.level for remark in remarks] == ["ok"] and remarks[0].message.startswith("2 quantized")
    again = net(seed=1)
    plan = interchange.import_into(again, file, kind)
    assert set(plan.layers) == {"first", "second"}
    for name, layer in planned(kind).layers.items():
        assert torch.equal(dequantize(plan.layers[name]), dequantize(layer))
    x = torch.randn(3, 64)
    assert torch.equal(again(x), model(x))
    difloat.save(again, tmp_path / "again")
    assert all(finding.passed for finding in difloat.verify(tmp_path / "again"))
    second = interchange.export_checkpoint(tmp_path / "again", tmp_path / "second.safetensors", kind)
    first_tensors, second_tensors = load_file(file), load_file(second)
    assert first_tensors.keys() == second_tensors.keys()
    for name, tensor in first_tensors.items():
        assert bytes_of(tensor) == bytes_of(second_tensors[name]), name


def test_input_scales_of_a_file_come_back(tmp_path: Path) -> None:
    difloat.save(api.apply(net(), planned("nvfp4")), tmp_path / "own")
    scales = {"first": 0.125}
    file = interchange.export_checkpoint(
        tmp_path / "own", tmp_path / "a.safetensors", "nvfp4", input_scales=scales
    )
    assert float(load_file(file)["first.input_scale"]) == 0.125
    model = net()
    interchange.import_into(model, file, "nvfp4")
    difloat.save(model, tmp_path / "again")
    file = interchange.export_checkpoint(tmp_path / "again", tmp_path / "b.safetensors", "nvfp4")
    assert float(load_file(file)["first.input_scale"]) == 0.125
    with pytest.raises(ValueError, match="input_scales must name quantized layers, got 'third'"):
        interchange.export_checkpoint(
            tmp_path / "own", tmp_path / "c.safetensors", "nvfp4", input_scales={"third": 1.0}
        )


def test_comfy_files_carry_both_kinds_of_marks(tmp_path: Path) -> None:
    difloat.save(api.apply(net(), planned("comfy")), tmp_path / "own")
    file = interchange.export_checkpoint(tmp_path / "own", tmp_path / "c.safetensors", "comfy")
    with safe_open(file, framework="pt") as opened:
        marks = json.loads(opened.metadata()["_quantization_metadata"])
        mark = json.loads(bytes(opened.get_tensor("first.comfy_quant").tolist()))
        assert opened.get_tensor("norm.weight").dtype == torch.float32
    assert marks == {
        "format_version": "1.0",
        "layers": {"first": {"format": "nvfp4"}, "second": {"format": "nvfp4"}},
    }
    assert mark == {"format": "nvfp4"}


def test_loss_and_taken_names_are_refused_and_leave_nothing(tmp_path: Path) -> None:
    difloat.save(api.apply(net(), planned("nvfp4")), tmp_path / "own")
    for kind, words in (("fp8", "grid of e2m1, not e4m3fn"), ("mxfp4", "finer than 32")):
        with pytest.raises(ValueError, match=words):
            interchange.export_checkpoint(tmp_path / "own", tmp_path / "out.safetensors", kind)
    with pytest.raises(
        ValueError, match="format must be one of nvfp4, fp8, mxfp4, comfy, gguf, openvino, vllm, got 'onnx'"
    ):
        interchange.export_checkpoint(tmp_path / "own", tmp_path / "out.safetensors", "onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["own"]
    (tmp_path / "out.safetensors").write_bytes(b"mine")
    with pytest.raises(FileExistsError, match="output must be new"):
        interchange.export_checkpoint(tmp_path / "own", tmp_path / "out.safetensors", "nvfp4")
    assert (tmp_path / "out.safetensors").read_bytes() == b"mine"


def test_files_of_another_kind_or_model_are_refused_before_any_change(tmp_path: Path) -> None:
    difloat.save(api.apply(net(), planned("nvfp4")), tmp_path / "own")
    file = interchange.export_checkpoint(tmp_path / "own", tmp_path / "a.safetensors", "nvfp4")
    model = net(seed=1)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match="mxfp4 file must hold layers of MXFP4, but 'first' is NVFP4"):
        interchange.import_into(model, file, "mxfp4")
    other = nn.Sequential(nn.Linear(64, 96))
    with pytest.raises(ValueError, match="has the layer 'first'"):
        interchange.import_into(other, file, "nvfp4")
    model.extra = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="'extra.bias' is missing"):
        interchange.import_into(model, file, "nvfp4")
    del model.extra
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("kind", ["nvfp4", "fp8"])
def test_diffusers_bfl_backend_loads_an_export(kind: str, tmp_path: Path) -> None:
    """FLUX from a single file on the CPU: the very weights, dequantized by diffusers' own layers."""
    from diffusers import BFLQuantizationConfig, FluxTransformer2DModel
    from diffusers.quantizers.bfl.utils import QUANTIZED_LINEARS

    from families import flux

    pipeline = flux()
    model = denoiser_of(pipeline)[1]
    bits, options = OPTIONS[kind]
    narrow = [n for n, layer in packed.quantizable(model).items() if layer.in_features % 16]
    arguments = {
        "prompts": ["a cat"],
        "samples": 2,
        "steps": 1,
        "keep_8bit": (),
        "split": False,
        "progress": False,
        "exclude": narrow,
    }
    difloat.quantize(pipeline, "rtn", bits, **arguments, **options)
    difloat.save(model, tmp_path / "own")
    out = tmp_path / "foreign"
    file = interchange.export_checkpoint(tmp_path / "own", out, kind)
    config = BFLQuantizationConfig(compute_dtype=torch.float32)
    loaded = FluxTransformer2DModel.from_single_file(
        str(file), config=str(out), quantization_config=config, torch_dtype=torch.float32
    )
    kinds = {
        name
        for name, module in loaded.named_modules()
        if isinstance(module, tuple(QUANTIZED_LINEARS.values()))
    }
    plan = api.plan_of(model)
    assert kinds == set(plan.layers) and len(kinds) > 10
    restored = api.restore(model)
    loaded.dequantize()
    for name, tensor in restored.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
