"""Saving, loading and verifying plain modules: golden bytes, exactness, hostile and broken files."""

from __future__ import annotations

import copy
import errno
import json
import math
import shutil
import struct
from collections import namedtuple
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn

from difloat import checkpoint
from difloat.checkpoint import CheckpointError
from difloat.layers import install
from difloat.numbers import formats
from difloat.plan.encode import dequantize, plan_layer
from difloat.plan.plan import LayerPlan, Plan
from difloat.plan.specs import Part, QuantSpec
from mixed_rows import in_bands

GOLDEN = Path(__file__).parent / "golden" / "v1"
GOLDEN_ROWS = GOLDEN.parent / "v1-rows"


def spec(name: str, granularity: str = "channel", **fields) -> QuantSpec:
    return QuantSpec(formats.parse(name), granularity, **fields)


ONLINE = spec("e4m3", "token", online=True)
STATIC = spec("e4m3", "tensor")
STATIC_ZERO = spec("ue4m4", "tensor", zero_point=True)


class Tiny(nn.Module):
    """Odd channel counts, a convolution, a layer that stays float, and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(7, 5)
        self.conv = nn.Conv2d(5, 3, 3, padding=1, bias=False)
        self.blocks = nn.ModuleList([nn.Linear(9, 4)])
        self.norm = nn.LayerNorm(4)
        self.register_buffer("steps", torch.arange(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x).movedim(-1, 1)
        return self.norm(self.blocks[0](self.conv(x).flatten(2).movedim(1, -1).flatten(1)[:, :9]))


def tiny(seed: int = 0) -> Tiny:
    """Weights that are multiples of 1/64, so that they are the same on every machine."""
    generator = torch.Generator().manual_seed(seed)
    model = Tiny()
    for tensor in model.parameters():
        tensor.data = torch.randint(-64, 65, tensor.shape, generator=generator) / 64
    return model.eval()


def simple_layer(weight: torch.Tensor, parts: list[Part], scale: float = 0.25) -> LayerPlan:
    """Powers of two as scales, which make every value exact."""
    scales, zeros, inputs, input_zeros = [], [], [], []
    for number, part in enumerate(parts):
        count = part.weight.scale_count(weight.shape[0], part.channels)
        scales.append(scale * 2.0 ** (torch.arange(count) % 3))
        zeros.append(torch.full((count,), 0.125) if part.weight.zero_point else torch.zeros(0))
        static = part.activation is not None and not part.activation.online
        inputs.append(torch.tensor([0.5 + number]) if static else None)
        input_zeros.append(torch.tensor([-0.25]) if static and part.activation.zero_point else None)
    return plan_layer(
        weight.detach(),
        parts,
        scales,
        weight_zero_points=zeros,
        input_scales=inputs,
        input_zero_points=input_zeros,
    )


def tiny_plan(model: Tiny) -> Plan:
    """Two parts, groups, zero points, static and online inputs, three widths."""
    parts = {
        "first": [Part(7, spec("e2m1"), STATIC)],
        "conv": [
            Part(2, spec("e3m2", "tensor"), STATIC_ZERO),
            Part(3, spec("uint3", zero_point=True), STATIC),
        ],
        "blocks.0": [Part(9, spec("int8", "group", group_size=4), ONLINE)],
    }
    plans = {name: simple_layer(model.get_submodule(name).weight, entry) for name, entry in parts.items()}
    return Plan("golden", "w4a8", plans, {"norm": "no weight matrix"}, {"skip": ["norm"], "target": "any"})


def quantized(seed: int = 0) -> Tiny:
    model = tiny(seed)
    plan = tiny_plan(model)
    install.apply(model, plan)
    checkpoint.mark_quantized(model, plan)
    return model


def saved(directory: Path, **options) -> Path:
    return checkpoint.save(quantized(), directory / "saved", **options)


def contents(directory: Path) -> dict[str, bytes]:
    return {
        path.relative_to(directory).as_posix(): path.read_bytes()
        for path in directory.rglob("*")
        if path.is_file()
    }


def same_state(model: nn.Module, other: nn.Module) -> bool:
    a, b = model.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


# Golden bytes


def test_saving_gives_the_golden_bytes(tmp_path):
    assert contents(saved(tmp_path)) == contents(GOLDEN)


def band_by_the_document(state: dict, band: dict, parts: list, stretched: bool) -> np.ndarray:
    """The values of the next rows; what was read is taken off `state`."""
    out, at = band["rows"], 0
    sizes = [
        -(-part["channels"] * formats.parse(weight["format"]).bits // 8)
        for part, weight in zip(parts, band["weights"], strict=True)
    ]
    packed = state["weight"]
    if stretched:
        mine, state["weight"] = packed[: out * sum(sizes)], packed[out * sum(sizes) :]
        packed = mine.reshape(out, sum(sizes), *mine.shape[1:])
    pieces = []
    for part, weight, size in zip(parts, band["weights"], sizes, strict=True):
        channels, number = part["channels"], formats.parse(weight["format"])
        stream = np.moveaxis(packed[:, at : at + size], 1, -1)
        at += size
        bits = np.unpackbits(stream, axis=-1, bitorder="little")[..., : channels * number.bits]
        codes = bits.reshape(*bits.shape[:-1], channels, number.bits) @ (1 << np.arange(number.bits))
        group = {"tensor": None, "channel": channels}.get(weight["granularity"], weight.get("group_size"))
        count = 1 if group is None else out * -(-channels // group)

        def take(key, count=count, group=group, channels=channels, ndim=codes.ndim):
            vector, state[key] = state[key][:count], state[key][count:]
            if group is None:
                return vector
            wide = np.repeat(vector.reshape(out, -1), group, axis=1)[:, :channels]
            return wide.reshape(out, *[1] * (ndim - 2), channels)

        value = np.array(number.decode_table, np.float32)[codes] * take("weight_scale")
        if weight.get("zero_point"):
            value = value + take("weight_zero_point")
        pieces.append(np.moveaxis(value, -1, 1))
    return np.concatenate(pieces, axis=1)


def read_by_the_document(directory: Path) -> dict[str, np.ndarray]:
    """A reader after docs/format.md in plain numpy: float weights of the quantized layers, with input vectors aside."""
    config = json.loads((directory / "config.json").read_text())["quantization_config"]
    raw = (directory / "model.safetensors").read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    header, data = json.loads(raw[8 : 8 + length]), raw[8 + length :]
    header.pop("__metadata__", None)
    kinds = {"U8": np.uint8, "F32": "<f4", "I64": "<i8"}
    tensors = {
        name: np.frombuffer(data[slice(*entry["data_offsets"])], kinds[entry["dtype"]]).reshape(
            entry["shape"]
        )
        for name, entry in header.items()
    }
    result = {}
    for name, layer in config["layers"].items():
        out, parts = layer["shape"][0], layer["parts"]
        bands = layer.get("bands") or [{"rows": out, "weights": [part["weight"] for part in parts]}]
        state = {key: tensors.get(f"{name}.{key}") for key in ("weight", "weight_scale", "weight_zero_point")}
        if "bands" in layer:  # one stretch of bytes per kernel position
            state["weight"] = state["weight"][0]
        rows = [band_by_the_document(state, band, parts, "bands" in layer) for band in bands]
        value = np.concatenate(rows)
        if "bands" in layer:
            stored, value = value, np.empty_like(value)
            value[np.argsort(tensors[f"{name}.row_band"], kind="stable")] = stored
        result[name] = value
    at = 0
    for name, layer in sorted(config["layers"].items()):
        static = [
            p["activation"] for p in layer["parts"] if "activation" in p and not p["activation"].get("online")
        ]
        for key, count in {
            "scale": len(static),
            "zero": sum(a.get("zero_point", False) for a in static),
        }.items():
            result[f"{name}.{key}"] = tensors["difloat.input"][at : at + count]
            at += count
    return result


def test_a_reader_after_the_document_decodes_the_golden_file():
    model, got = tiny(), read_by_the_document(GOLDEN)
    for name, layer in tiny_plan(model).layers.items():
        np.testing.assert_array_equal(got[name], dequantize(layer).numpy())
    np.testing.assert_array_equal(got["first.scale"], [0.5])
    np.testing.assert_array_equal(got["conv.scale"], [0.5, 1.5])
    np.testing.assert_array_equal(got["conv.zero"], [-0.25])
    assert got["blocks.0.scale"].size == 0


def test_the_golden_file_loads_and_verifies():
    assert same_state(checkpoint.load(GOLDEN, into=tiny(1)), quantized())
    assert all(finding.passed for finding in checkpoint.verify(GOLDEN))


# Exactness


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shard_bytes", [None, 100])
def test_loading_is_bit_exact(tmp_path, dtype, shard_bytes):
    directory = saved(tmp_path, max_shard_bytes=shard_bytes)
    assert (len(list(directory.glob("*.safetensors"))) > 1) == (shard_bytes is not None)
    model = checkpoint.load(directory, into=tiny(1), dtype=dtype)
    for name, layer in checkpoint.plan_of(quantized()).layers.items():
        loaded = model.get_submodule(name).plan()
        assert loaded.parts == layer.parts
        for key, tensor in layer.tensors.items():
            assert loaded.tensors[key].dtype == tensor.dtype and torch.equal(loaded.tensors[key], tensor)
    assert model.first.bias.dtype == model.norm.weight.dtype == (dtype or torch.float32)
    assert model.steps.dtype == torch.int64


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("channels", [(1,), (13,), (5, 6), (3, 1, 7)])
def test_every_width_survives_and_verifies(tmp_path, bits, channels):
    generator = torch.Generator().manual_seed(bits)
    model = nn.Sequential(nn.Linear(sum(channels), 3))
    model[0].weight.data = torch.randn(model[0].weight.shape, generator=generator)
    kinds = [formats.candidates(bits)[0].name, f"int{bits}", f"uint{bits}"]
    parts = [
        Part(
            n,
            spec(
                kind,
                "group" if n > 4 else "channel",
                group_size=4 if n > 4 else None,
                zero_point=kind[0] == "u",
            ),
        )
        for n, kind in zip(channels, kinds, strict=False)
    ]
    layer = simple_layer(model[0].weight, parts, 0.37)
    plan = Plan("rtn", f"w{bits}", {"0": layer})
    install.apply(model, plan)
    checkpoint.mark_quantized(model, plan)
    directory = checkpoint.save(model, tmp_path / "a")
    loaded = checkpoint.load(directory, into=nn.Sequential(nn.Linear(sum(channels), 3)))
    assert torch.equal(loaded[0].dequantized_weight(), dequantize(layer))
    assert [finding.message for finding in checkpoint.verify(directory) if not finding.passed] == []


def test_save_load_save_gives_the_same_bytes(tmp_path):
    first = saved(tmp_path)
    meta = copy.deepcopy(tiny(1)).to("meta")
    for number, target in enumerate([tiny(1), meta, quantized(2)]):
        again = checkpoint.save(copy.deepcopy(checkpoint.load(first, into=target)), tmp_path / str(number))
        assert contents(again) == contents(first)


def test_half_precision_comes_back_as_it_was(tmp_path):
    model = tiny()
    plan = tiny_plan(model)
    install.apply(model.half(), plan)
    checkpoint.mark_quantized(model, plan)
    loaded = checkpoint.load(checkpoint.save(model, tmp_path / "a"), into=tiny(1))
    assert loaded.norm.weight.dtype == torch.float16 and same_state(loaded, model)


def test_tied_parameters_are_stored_twice(tmp_path):
    model = quantized()
    model.blocks.append(nn.Linear(4, 4))
    model.blocks.append(nn.Linear(4, 4))
    model.blocks[2].weight = model.blocks[1].weight
    target = tiny(1)
    target.blocks.extend([nn.Linear(4, 4), nn.Linear(4, 4)])
    loaded = checkpoint.load(checkpoint.save(model, tmp_path / "a"), into=target)
    assert torch.equal(loaded.blocks[2].weight, model.blocks[1].weight)


def test_a_file_is_little_more_than_its_tensors(tmp_path):
    model = nn.Sequential(*[nn.Linear(160, 160) for _ in range(120)])  # 3 million parameters
    part = [Part(160, spec("e2m1"), STATIC)]
    plan = Plan("rtn", "w4a8", {str(n): simple_layer(model[n].weight, part) for n in range(120)})
    install.apply(model, plan)
    checkpoint.mark_quantized(model, plan)
    directory = checkpoint.save(model, tmp_path / "a")
    tensors_bytes = sum(tensor.nbytes for tensor in model.state_dict().values())
    assert (directory / "model.safetensors").stat().st_size < 1.03 * tensors_bytes


# Saving


def test_only_a_checkpoint_of_its_own_is_overwritten(tmp_path):
    model, target = quantized(), tmp_path / "a"
    target.mkdir()
    checkpoint.save(model, target)  # an empty directory is free
    with pytest.raises(CheckpointError, match="pass overwrite=True"):
        checkpoint.save(model, target)
    checkpoint.save(model, target, overwrite=True)
    assert contents(target) == contents(GOLDEN)
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("years")
    with pytest.raises(CheckpointError, match="choose another directory"):
        checkpoint.save(model, mine, overwrite=True)
    with pytest.raises(CheckpointError, match="but is a file"):
        checkpoint.save(model, mine / "thesis.txt", overwrite=True)
    assert contents(mine) == {"thesis.txt": b"years"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "mine"]


def full_disk_by_errno(*args, **kwargs):
    raise OSError(errno.ENOSPC, "No space left on device")


def full_disk_by_safetensors(*args, **kwargs):
    raise safetensors.SafetensorError(
        "Error while serializing: I/O error: No space left on device (os error 28)"
    )


@pytest.mark.parametrize("failure", [full_disk_by_errno, full_disk_by_safetensors])
def test_a_full_disk_is_one_sentence_and_loses_nothing(tmp_path, monkeypatch, failure):
    directory = saved(tmp_path)
    before = contents(directory)
    monkeypatch.setattr(safetensors.torch, "save_file", failure)
    with pytest.raises(CheckpointError, match="but is full; free some space"):
        checkpoint.save(quantized(1), directory, overwrite=True)
    assert contents(directory) == before and list(tmp_path.iterdir()) == [directory]


def test_too_little_space_is_noticed_before_writing(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")(10, 0, 10)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(CheckpointError, match="but is full; free some space"):
        saved(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_save_leaves_nothing(tmp_path, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(safetensors.torch, "save_file", interrupt)
    with pytest.raises(KeyboardInterrupt):
        saved(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_saved_is_refused(tmp_path):
    with pytest.raises(ValueError, match="must be quantized by difloat.apply"):
        checkpoint.save(tiny(), tmp_path / "a")
    with pytest.raises(ValueError, match="was cast to torch.float16"):
        cast = quantized()
        cast.first.weight_scale = cast.first.weight_scale.half()
        checkpoint.save(cast, tmp_path / "a")
    plan = tiny_plan(tiny())
    with pytest.raises(ValueError, match="options of a plan must be numbers"):
        checkpoint.mark_quantized(tiny(), Plan("x", "w4", plan.layers, options={"when": object()}))
    assert list(tmp_path.iterdir()) == []


# Broken and hostile input


def edit_config(change) -> object:
    """Damage that changes the JSON of config.json in place."""

    def damage(directory: Path) -> None:
        path = directory / "config.json"
        config = json.loads(path.read_text())
        change(config["quantization_config"])
        path.write_text(json.dumps(config))

    return damage


def edit_tensors(change) -> object:
    """Damage that rewrites the tensors."""

    def damage(directory: Path) -> None:
        tensors = safetensors.torch.load_file(directory / "model.safetensors")
        tensors = {name: tensor.clone() for name, tensor in tensors.items()}
        change(tensors)
        safetensors.torch.save_file(tensors, directory / "model.safetensors")

    return damage


def edit_header(old: bytes, new: bytes) -> object:
    """Damage that changes the safetensors header without changing its length."""

    def damage(directory: Path) -> None:
        path = directory / "model.safetensors"
        data = path.read_bytes()
        assert len(old) == len(new) and data.count(old) == 1
        path.write_bytes(data.replace(old, new))

    return damage


def cut(directory: Path) -> None:
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-20])


def write(name: str, text: str) -> object:
    return lambda directory: (directory / name).write_text(text)


def set_layer(**fields) -> object:
    return edit_config(lambda config: config["layers"]["first"].update(fields))


def set_tensor(name: str, value) -> object:
    return edit_tensors(lambda tensors: tensors.update({name: value(tensors[name])}))


def huge_length(directory: Path) -> None:
    path = directory / "model.safetensors"
    path.write_bytes(struct.pack("<Q", 2**62) + path.read_bytes()[8:])


DAMAGES = {
    "no directory": (shutil.rmtree, "does not exist; check the path"),
    "no config": (lambda d: (d / "config.json").unlink(), "config.json must be in the checkpoint directory"),
    "no weights": (lambda d: (d / "model.safetensors").unlink(), "neither exists; download it again"),
    "config is no JSON": (write("config.json", "{\x00"), "must be JSON, but"),
    "config is deep JSON": (write("config.json", "[" * 100_000), "must be JSON, but"),
    "config is a list": (write("config.json", "[]"), "must be a JSON object, got list"),
    "config without plan": (write("config.json", "{}"), "must hold a quantization_config of difloat"),
    "plan is a list": (
        write("config.json", '{"quantization_config": [1]}'),
        "must hold a quantization_config",
    ),
    "other method": (
        edit_config(lambda c: c.update(quant_method="gguf")),
        "quant_method must be 'difloat', got 'gguf'",
    ),
    "other version": (edit_config(lambda c: c.update(version=3)), "must be of version 1 or 2, got 3"),
    "no version": (edit_config(lambda c: c.pop("version")), "must be of version 1 or 2, got None"),
    "missing field": (edit_config(lambda c: c.pop("bits")), "must have the fields"),
    "layers is a list": (edit_config(lambda c: c.update(layers=[])), "layers must be an object, got"),
    "layer is a number": (
        edit_config(lambda c: c["layers"].update(first=3)),
        "plan of layer 'first' must be valid",
    ),
    "unknown format": (
        set_layer(parts=[{"channels": 7, "weight": {"format": "e9m9"}}]),
        "plan of layer 'first' must be valid, but format must have 1 to 8 bits",
    ),
    "format is a number": (set_layer(parts=[{"channels": 7, "weight": {"format": 4}}]), "must be valid"),
    "negative shape": (set_layer(shape=[-5, 7]), "size in a shape must be a whole number from 1 to"),
    "huge shape": (set_layer(shape=[2**62, 7]), "size in a shape must be a whole number from 1 to"),
    "shape of text": (set_layer(shape="57"), "shape must be a list"),
    "parts do not add up": (set_layer(shape=[5, 8]), "parts must add up to 8 input channels"),
    "unknown layer": (
        edit_config(lambda c: c["layers"].update({"ghost": c["layers"].pop("first")})),
        "tensor 'ghost.weight' of the plan must be stored, but is missing",
    ),
    "truncated": (cut, "must be a whole safetensors file, but"),
    "huge header": (huge_length, "must be a whole safetensors file, but"),
    "header lies about offsets": (
        edit_header(
            b'"first.weight":{"dtype":"U8","shape":[5,4]', b'"first.weight":{"dtype":"U8","shape":[5,9]'
        ),
        "must be a whole safetensors file, but",
    ),
    "header is no JSON": (
        edit_header(b'{"__metadata__"', b"\xff\xff\xff\xff\xff\xff\xff\xff_____ _"),
        "whole safetensors",
    ),
    "tensor missing": (
        edit_tensors(lambda t: t.pop("conv.weight_scale")),
        "'conv.weight_scale' of the plan must be stored",
    ),
    "float tensor missing": (
        edit_tensors(lambda t: t.pop("norm.bias")),
        "'norm.bias' must be stored as the module has it",
    ),
    "bundle missing": (
        edit_tensors(lambda t: t.pop("difloat.input")),
        "'difloat.input' of the plan must be stored",
    ),
    "tensor too many": (
        edit_tensors(lambda t: t.update({"first.lora": torch.ones(1)})),
        "stored tensors must be in the plan, but 'first.lora' is not",
    ),
    "float tensor too many": (
        edit_tensors(lambda t: t.update(extra=torch.ones(1))),
        "'extra' must be stored as",
    ),
    "wrong shape": (
        set_tensor("first.weight", lambda w: w.T.contiguous()),
        r"must be U8 of shape \[5, 4\], got U8 \[4, 5\]",
    ),
    "wrong dtype": (
        set_tensor("first.weight_scale", lambda s: s.half()),
        r"must be F32 of shape \[5\], got F16 \[5\]",
    ),
    "wrong float shape": (
        set_tensor("norm.bias", lambda b: b[:3].clone()),
        r"'norm.bias' .* but has the shape \[3\]",
    ),
    "float stored as integers": (
        set_tensor("norm.bias", lambda b: b.to(torch.int8)),
        "'norm.bias' .* but is I8 instead of torch.float32",
    ),
    "integers stored as floats": (
        set_tensor("steps", lambda b: b.float()),
        "'steps' .* but is F32 instead of",
    ),
    "NaN scale": (
        set_tensor("first.weight_scale", lambda s: s * math.nan),
        "must be finite and positive, got nan",
    ),
    "negative scale": (
        set_tensor("first.weight_scale", lambda s: -s),
        "must be finite and positive, got -0.25",
    ),
    "infinite zero point": (set_tensor("conv.weight_zero_point", lambda z: z / 0), "must be finite, got inf"),
}


@pytest.mark.parametrize("case", DAMAGES)
def test_damage_is_one_sentence_and_leaves_the_module_alone(tmp_path, case):
    damage, message = DAMAGES[case]
    directory = saved(tmp_path)
    (directory / "difloat.json").unlink()  # which would notice the size first
    damage(directory)
    target = tiny(1)
    with pytest.raises((CheckpointError, FileNotFoundError), match=message) as caught:
        checkpoint.load(directory, into=target)
    text = str(caught.value)
    assert "\n" not in text and len(text) < 700 and same_state(target, tiny(1))


@pytest.mark.parametrize("case", DAMAGES)
def test_verify_notices_the_damage(tmp_path, case):
    directory = saved(tmp_path)
    DAMAGES[case][0](directory)
    findings = checkpoint.verify(directory)  # reports, never raises
    assert not all(finding.passed for finding in findings)
    assert not any("\n" in finding.message for finding in findings)


def test_a_half_downloaded_checkpoint_is_noticed_by_its_manifest(tmp_path):
    directory = saved(tmp_path)
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes() + b"more")
    with pytest.raises(CheckpointError, match=r"model.safetensors must have \d+ bytes, got"):
        checkpoint.load(directory, into=tiny(1))
    path.unlink()
    with pytest.raises(FileNotFoundError, match="is missing in"):
        checkpoint.load(directory, into=tiny(1))


SHARD_DAMAGES = {
    "shard missing": (lambda d, i: sorted(d.glob("model-*"))[1].unlink(), "must be beside its index"),
    "path traversal": (
        lambda d, i: i["weight_map"].update({"first.bias": "../x.safetensors"}),
        "must be safetensors files beside",
    ),
    "absolute path": (
        lambda d, i: i["weight_map"].update({"first.bias": "/x.safetensors"}),
        "must be safetensors files beside",
    ),
    "pickle": (
        lambda d, i: i["weight_map"].update({"first.bias": "x.bin"}),
        "must be safetensors files beside",
    ),
    "shard is a number": (lambda d, i: i["weight_map"].update({"first.bias": 3}), "must have a weight_map"),
    "no map": (lambda d, i: i.pop("weight_map"), "must have a weight_map"),
    "map lacks a tensor": (
        lambda d, i: i["weight_map"].pop("first.bias"),
        "must agree, but not on 'first.bias'",
    ),
    "map has one too many": (
        lambda d, i: i["weight_map"].update(ghost=i["weight_map"]["first.bias"]),
        "must agree, but not on 'ghost'",
    ),
}


@pytest.mark.parametrize("case", SHARD_DAMAGES)
def test_damaged_shards(tmp_path, case):
    damage, message = SHARD_DAMAGES[case]
    directory = saved(tmp_path, max_shard_bytes=100)
    (directory / "difloat.json").unlink()
    path = directory / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    damage(directory, index)
    path.write_text(json.dumps(index))
    with pytest.raises((CheckpointError, FileNotFoundError), match=message):
        checkpoint.load(directory, into=tiny(1))


def test_another_architecture_is_refused(tmp_path):
    directory = saved(tmp_path)
    with pytest.raises(CheckpointError, match="plan must name layers of the module, but"):
        checkpoint.load(directory, into=nn.Linear(3, 3))
    other = tiny(1)
    other.first = nn.Linear(8, 5)
    with pytest.raises(CheckpointError, match=r"'first' must have the planned shape \[5, 7\], got \[5, 8\]"):
        checkpoint.load(directory, into=other)
    with pytest.raises(CheckpointError, match="into must be a Tiny of the saved architecture"):
        checkpoint.load(directory)


# Verifying


def failed(directory: Path) -> dict[str, str]:
    return {finding.check: finding.message for finding in checkpoint.verify(directory) if not finding.passed}


def test_a_clean_checkpoint_passes_every_check(tmp_path):
    findings = checkpoint.verify(saved(tmp_path, max_shard_bytes=100))
    assert [finding.check for finding in findings] == [
        "hashes",
        "plan",
        "scales",
        "codes",
        "re-encode",
        "size",
    ]
    assert all(finding.passed for finding in findings)


def test_one_changed_number_fails_the_hash_alone(tmp_path):
    directory = saved(tmp_path)

    def change(tensors):
        tensors["conv.weight_scale"][0] *= 2

    edit_tensors(change)(directory)
    path = directory / "model.safetensors"
    # Written again with the library's metadata, so that the size is as before.
    tensors = safetensors.torch.load_file(path)
    safetensors.torch.save_file(tensors, path, metadata={"format": "pt"})
    assert failed(directory).keys() == {"hashes"} and "SHA-256 is another" in failed(directory)["hashes"]


def test_missing_manifest_and_extra_weights_fail_the_hashes(tmp_path):
    directory = saved(tmp_path)
    (directory / "pytorch_model.bin").write_bytes(b"pickle")
    assert "pytorch_model.bin must not be there" in failed(directory)["hashes"]
    (directory / "difloat.json").unlink()
    assert failed(directory) == {
        "hashes": "difloat.json must be there to prove the files, but is missing; save the model with difloat.save"
    }


@pytest.mark.parametrize(
    ("name", "format_name", "code", "message"),
    [
        ("negative zero", "e2m1", 0b1000, "code 8 of e2m1, which is -0.0"),
        ("NaN of fn", "e4m3fn", 0x7F, "code 127 of e4m3fn, which is nan"),
        ("infinity of ieee", "e5m2ieee", 0x7C, "code 124 of e5m2ieee, which is inf"),
        ("padding", "e2m1", 0x50, "padding bits that are not zero"),
    ],
)
def test_illegal_codes_are_found(tmp_path, name, format_name, code, message):
    model = nn.Sequential(nn.Linear(3, 2))
    plan = Plan("rtn", "w", {"0": simple_layer(model[0].weight, [Part(3, spec(format_name))])})
    install.apply(model, plan)
    checkpoint.mark_quantized(model, plan)
    model[0].weight.data[1, -1 if name == "padding" else 0] = code
    assert message in failed(checkpoint.save(model, tmp_path / "a"))["codes"]


def test_codes_that_no_encoder_would_write_are_found(tmp_path):
    model = quantized()
    # So large an offset leaves no digits for the values.
    model.conv.weight_zero_point.fill_(2.0**30)
    assert "must be its own nearest encoding" in failed(checkpoint.save(model, tmp_path / "a"))["re-encode"]


def test_hidden_bytes_are_found(tmp_path):
    directory = saved(tmp_path)
    tensors = safetensors.torch.load_file(directory / "model.safetensors")
    safetensors.torch.save_file(tensors, directory / "model.safetensors", metadata={"hidden": "x" * 4000})
    assert "which must be at most 1.03" in failed(directory)["size"]


def test_manifest_with_a_foreign_path_is_refused(tmp_path):
    directory = saved(tmp_path)
    path = directory / "difloat.json"
    manifest = json.loads(path.read_text())
    manifest["files"]["../../passwd"] = {"bytes": 1, "sha256": ""}
    path.write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="must list files of the checkpoint"):
        checkpoint.load(directory, into=tiny(1))
    assert "must list files of the checkpoint" in failed(directory)["hashes"]


# Rows of several widths


def banded(seed: int = 0) -> Tiny:
    """Rows of 1 to 5 bits: two parts, groups and a smoothed input in one layer, a convolution, an online input."""
    model = tiny(seed)
    factors = 2.0 ** (torch.arange(7) % 3 - 1)
    static = [Part(3, spec("e2m1"), STATIC_ZERO), Part(4, spec("e2m1"), STATIC)]
    plans = {
        "first": in_bands(model.first.weight, static, ["uint1", "e2m1"], factors),
        "conv": in_bands(model.conv.weight, [Part(5, spec("e2m1"), STATIC)], ["uint1", "uint2", "e2m0"]),
        "blocks.0": in_bands(model.blocks[0].weight, [Part(9, spec("e2m1"), ONLINE)], ["int5", "ue3m1"]),
    }
    plan = Plan("golden", "w2a8", plans, {"norm": "no weight matrix"}, {})
    install.apply(model, plan)
    checkpoint.mark_quantized(model, plan)
    return model


def saved_bands(directory: Path) -> Path:
    return checkpoint.save(banded(), directory / "saved")


def test_rows_of_several_widths_have_golden_bytes(tmp_path):
    assert contents(saved_bands(tmp_path)) == contents(GOLDEN_ROWS)


def test_a_reader_after_the_document_decodes_rows_of_several_widths():
    model, got = banded(), read_by_the_document(GOLDEN_ROWS)
    for name, layer in checkpoint.plan_of(model).layers.items():
        np.testing.assert_array_equal(got[name], dequantize(replace(layer, smoothed=False)).numpy())
    np.testing.assert_array_equal(got["first.zero"], [-3])


def test_rows_of_several_widths_load_verify_and_save_again(tmp_path):
    loaded = checkpoint.load(GOLDEN_ROWS, into=tiny(1))
    assert same_state(loaded, banded()) and loaded.conv.weight.dim() == 4
    config = checkpoint.plan_config.quantization_config
    assert config(checkpoint.plan_of(loaded)) == config(checkpoint.plan_of(banded()))
    assert all(finding.passed for finding in checkpoint.verify(GOLDEN_ROWS))
    assert contents(checkpoint.save(loaded, tmp_path / "a")) == contents(GOLDEN_ROWS)


def edit_bands(change) -> object:
    return edit_config(lambda config: change(config["layers"]["conv"]))


BAND_DAMAGES = {
    "rows do not add up": (edit_bands(lambda e: e["bands"][0].update(rows=2)), "bands must add up to 3 rows"),
    "no rows": (edit_bands(lambda e: e["bands"][0].update(rows=0)), "rows of a band must be a whole number"),
    "rows of text": (
        edit_bands(lambda e: e["bands"][0].update(rows="1")),
        "rows of a band must be a whole number",
    ),
    "true rows": (
        edit_bands(lambda e: e["bands"][0].update(rows=True)),
        "rows of a band must be a whole number",
    ),
    "huge rows": (
        edit_bands(lambda e: e["bands"][0].update(rows=2**70)),
        "rows of a band must be a whole number",
    ),
    "one band": (edit_bands(lambda e: e.update(bands=[{**e["bands"][0], "rows": 3}])), "2 to 256 bands"),
    "bands are a number": (edit_bands(lambda e: e.update(bands=7)), "plan of layer 'conv' must be valid"),
    "band is a list": (
        edit_bands(lambda e: e.update(bands=[[1], [2]])),
        "plan of layer 'conv' must be valid",
    ),
    "unknown field": (
        edit_bands(lambda e: e["bands"][0].update(order=1)),
        "band of rows must have the fields rows, weights",
    ),
    "no weights": (
        edit_bands(lambda e: e["bands"][1].update(weights=[])),
        "must have rows and a weight spec",
    ),
    "spec too many": (
        edit_bands(lambda e: e["bands"][1]["weights"].append({"format": "e2m1"})),
        "a weight spec for each of the 1 parts",
    ),
    "online weight": (
        edit_bands(lambda e: e["bands"][1]["weights"][0].update(online=True)),
        "a weight cannot have online scales",
    ),
    "other first band": (
        edit_bands(lambda e: e["bands"].reverse()),
        "weight specs of the parts must be those of the first band",
    ),
    "unknown format": (
        edit_bands(lambda e: e["bands"][1]["weights"][0].update(format="e0m0")),
        "format must have 1 to 8 bits",
    ),
    "wider than stored": (
        edit_bands(lambda e: e["bands"][1]["weights"][0].update(format="uint8")),
        r"'conv.weight' must be U8 of shape \[1, 8, 3, 3\], got U8 \[1, 5, 3, 3\]",
    ),
    "bands forgotten": (edit_bands(lambda e: e.pop("bands")), "'conv.weight' must be U8 of shape"),
    "row in another band": (set_tensor("conv.row_band", lambda b: b * 0), "'conv.row_band' must put"),
    "band that is not there": (set_tensor("conv.row_band", lambda b: b + 250), "'conv.row_band' must put"),
    "floating bands": (set_tensor("conv.row_band", lambda b: b.float()), "must be U8 of shape"),
    "bands missing": (edit_tensors(lambda t: t.pop("conv.row_band")), "'conv.row_band' of the plan must"),
    "weight cut": (
        set_tensor("conv.weight", lambda w: w[:, 1:].clone()),
        "'conv.weight' must be U8 of shape",
    ),
    "NaN scale": (set_tensor("conv.weight_scale", lambda s: s * math.nan), "must be finite and positive"),
}


@pytest.mark.parametrize("case", BAND_DAMAGES)
def test_damaged_bands_are_one_sentence_and_fail_the_proof(tmp_path, case):
    damage, message = BAND_DAMAGES[case]
    directory = saved_bands(tmp_path)
    (directory / "difloat.json").unlink()
    damage(directory)
    target = tiny(1)
    with pytest.raises(CheckpointError, match=message) as caught:
        checkpoint.load(directory, into=target)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 700 and same_state(target, tiny(1))
    assert failed(directory).keys() - {"hashes"}


def test_illegal_codes_in_a_band_are_found(tmp_path):
    model = banded()
    model.conv.weight.data[0, -1] |= 0b1000_0000  # padding of the last row
    assert "padding bits that are not zero" in failed(checkpoint.save(model, tmp_path / "a"))["codes"]
