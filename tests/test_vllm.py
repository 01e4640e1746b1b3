"""vLLM-Omni: SVDQuant files decoded as its documentation says, and loaded by its own code where that is installed."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import difloat
from difloat import api, interchange
from difloat.interchange import vllm
from difloat.layers import packed
from difloat.numbers.formats import parse
from difloat.plan.encode import stored_values
from difloat.plan.plan import LayerPlan, Plan
from difloat.plan.rules import Rule, draft_layer
from difloat.plan.specs import QuantSpec, Side
from tiny import PROMPTS, tiny_pixart

NVFP4 = Rule((parse("e2m1"),), "group", 16, scales="e4m3")
CALL = {"prompts": PROMPTS, "samples": 8, "steps": 2, "progress": False}
CALL["call_kwargs"] = {"use_resolution_binning": False}


class Exported:
    """A tiny transformer quantized for vLLM-Omni, and what was written of it."""

    def __init__(self, folder: Path) -> None:
        pipeline = tiny_pixart()
        self.plan = api.plan(pipeline, "svdquant", "w4a16", target="vllm", **CALL)
        difloat.save(api.apply(pipeline, self.plan), folder / "own")
        self.model, self.own = pipeline.transformer, folder / "own"
        self.file = interchange.export_checkpoint(self.own, folder / "out", "vllm")
        self.tensors = load_file(self.file)
        self.config = json.loads((folder / "out/config.json").read_text())["quantization_config"]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return Exported(tmp_path_factory.mktemp("vllm"))


def e2m1(packed_weight: Tensor) -> Tensor:
    """Two numbers per byte, the even column in the low nibble, its highest bit the sign, as NVFP4 kernels read them."""
    magnitudes = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
    bytes_ = packed_weight.view(torch.uint8).int()
    nibbles = torch.stack((bytes_ & 15, bytes_ >> 4), -1).flatten(1)
    return magnitudes[nibbles & 7] * (1 - 2 * (nibbles >> 3))


def test_a_decoder_of_the_documented_layout_gets_the_very_numbers(exported: Exported) -> None:
    assert len(exported.plan.layers) == 25 and exported.config["rank"] == 2
    for name, layer in exported.plan.layers.items():
        found = {key: exported.tensors[f"{name}.{key}"] for key in ("qweight", "wscales", "wtscale")}
        scales = found["wscales"].float().t() * found["wtscale"].float()
        assert torch.equal(e2m1(found["qweight"]) * scales.repeat_interleave(16, 1), stored_values(layer))
        rank = layer.side.rank
        down, up = exported.tensors[f"{name}.proj_down"].float(), exported.tensors[f"{name}.proj_up"].float()
        assert torch.equal(down[:, :rank].t(), layer.tensors["side_down"].float())
        assert torch.equal(up[:, :rank], layer.tensors["side_up"].float())
        assert not down[:, rank:].any() and not up[:, rank:].any()
        smooth = exported.tensors[f"{name}.smooth_factor"].float()
        assert torch.equal(1 / smooth, layer.tensors["input_factor"].float())
        assert bool((exported.tensors[f"{name}.wcscales"] == 1).all())


def stub(monkeypatch: pytest.MonkeyPatch, name: str, **members: Any) -> None:
    module = ModuleType(name)
    module.__dict__.update(members)
    monkeypatch.setitem(sys.modules, name, module)


class Nvfp4Kernel:
    """What stands for vLLM's NVFP4 kernels, which need a GPU: the product with the decoded weight, inputs left as they are."""

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        scales = layer.weight_scale.float() * layer.alpha
        layer.decoded = e2m1(layer.weight) * scales.repeat_interleave(16, 1)

    def apply_weights(self, layer: nn.Module, x: Tensor, bias: None) -> Tensor:
        return (x.float() @ layer.decoded.t()).to(x.dtype)


def copy_into(param: Tensor, loaded: Tensor) -> None:
    assert param.shape == loaded.shape and param.dtype == loaded.dtype
    param.data.copy_(loaded)


@pytest.fixture
def omni(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """vLLM-Omni's own file about SVDQuant, with the few names that it takes from vLLM, which installs on no plain CPU."""
    found = importlib.util.find_spec("vllm_omni")
    if found is None or not found.submodule_search_locations:
        pytest.skip("vLLM-Omni is missing: pip install --no-deps vllm-omni")
    path = Path(found.submodule_search_locations[0]) / "quantization/svdquant_config.py"
    kernels = (
        "Cutlass",
        "Fbgemm",
        *(f"FlashInfer{k}" for k in ("B12x", "Cudnn", "CuteDsl", "Cutlass", "Trtllm")),
    )
    classes = {f"{name}NvFp4LinearKernel": type(name, (), {}) for name in kernels}
    classes["CutlassNvFp4LinearKernel"] = Nvfp4Kernel
    layers, base = "vllm.model_executor.layers", type("Base", (), {"packed_modules_mapping": {}})
    made: Callable[[], Nvfp4Kernel] = Nvfp4Kernel
    stub(monkeypatch, "vllm.logger", init_logger=lambda name: SimpleNamespace(info_once=lambda text: None))
    stub(
        monkeypatch,
        "vllm.model_executor.kernels.linear",
        NvFp4LinearKernel=base,
        init_nvfp4_linear_kernel=made,
        **classes,
    )
    stub(
        monkeypatch,
        f"{layers}.linear",
        LinearBase=nn.Module,
        LinearMethodBase=base,
        UnquantizedLinearMethod=type("Unquantized", (), {}),
    )
    stub(monkeypatch, f"{layers}.quantization.base_config", QuantizationConfig=base, QuantizeMethodBase=base)
    stub(
        monkeypatch,
        f"{layers}.quantization.utils.quant_utils",
        is_layer_skipped=lambda prefix, ignored, mapping, match_mode: any(n in prefix for n in ignored),
    )
    stub(monkeypatch, "vllm.model_executor.model_loader.weight_utils", default_weight_loader=copy_into)
    stub(
        monkeypatch,
        "vllm.model_executor.utils",
        set_weight_attrs=lambda tensor, named: [setattr(tensor, key, value) for key, value in named.items()],
    )
    newest = SimpleNamespace(major=10, minor=3)
    platform = SimpleNamespace(is_cuda=lambda: True, get_device_capability=lambda: newest)
    stub(monkeypatch, "vllm.platforms", current_platform=platform)
    stub(monkeypatch, "vllm.platforms.interface", DeviceCapability=SimpleNamespace)
    spec = importlib.util.spec_from_file_location("svdquant_of_vllm_omni", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_its_own_code_loads_and_multiplies_every_layer(exported: Exported, omni: ModuleType) -> None:
    config = omni.DiffusionSVDQuantConfig.from_config(exported.config)
    generator = torch.Generator().manual_seed(0)
    floats = packed.quantizable(tiny_pixart().transformer)
    methods = {
        name: config.get_quant_method(layer, name)
        for name, layer in floats.items()
        if layer.weight.dim() == 2
    }
    quantized = {n for n, m in methods.items() if isinstance(m, omni.DiffusionSVDQuantLinearMethod)}
    assert quantized == set(exported.plan.layers)
    for name, plan in exported.plan.layers.items():
        rows, columns = plan.shape
        theirs, method = nn.Module(), methods[name]
        method.create_weights(theirs, columns, [rows], columns, rows, torch.bfloat16)
        for key, parameter in theirs.named_parameters():
            parameter.weight_loader(parameter, exported.tensors[f"{name}.{key}"])
        method.process_weights_after_loading(theirs)
        assert torch.equal(theirs.decoded, stored_values(plan)) and theirs.output_channel_scale is None
        ours = exported.model.get_submodule(name)
        x = torch.randn(2, 5, columns, generator=generator).bfloat16()
        bias = None if ours.bias is None else ours.bias.bfloat16()
        with torch.no_grad():
            wanted, got = ours(x.float()), method.apply(theirs, x, bias).float()
        # The product, the branch, their sum and the bias are rounded to the 8 bits of bfloat16 each.
        assert float((wanted - got).abs().max()) <= 4 * 2**-8 * float(wanted.abs().max())


def test_the_export_says_what_the_reader_does_otherwise(exported: Exported) -> None:
    assert exported.config | {"rank": 0} == {
        "quant_method": "svdquant",
        "rank": 0,
        "precision": "nvfp4",
        "act_unsigned": False,
        "modules_to_not_convert": ["proj_out"],
    }
    assert interchange.remarks_of(exported.own, "vllm") == [
        "vLLM-Omni rounds the inputs of all 25 layers to E2M1 in groups of 16"
    ]


def test_validation(exported: Exported, tmp_path: Path) -> None:
    (whole,) = interchange.validate(exported.file)
    assert (whole.level, whole.message[:19]) == ("ok", "25 quantized layers")
    name, file = next(iter(exported.plan.layers)), tmp_path / "wrong.safetensors"
    for key, wrong, words in [
        ("wscales", lambda t: t.t().contiguous(), "wscales must be torch.float8_e4m3fn"),
        ("smooth_factor", torch.zeros_like, "smooth_factor must be positive"),
        ("proj_up", lambda t: t.half(), "proj_up must be torch.bfloat16"),
        ("proj_down", lambda t: t * torch.nan, "proj_down must be finite"),
        ("qweight", lambda t: t.view(torch.uint8), "qweight must be int8"),
    ]:
        tensors = {**exported.tensors, f"{name}.{key}": wrong(exported.tensors[f"{name}.{key}"])}
        save_file(tensors, file)
        (found,) = interchange.validate(file)
        assert found.level == "error" and found.place == name and words in found.message


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(32, 48)
        self.block = nn.ModuleDict({"proj": nn.Linear(32, 48)})

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x) + self.block["proj"](x)


def written(layer: LayerPlan, folder: Path) -> Path:
    model = api.apply(Net(), Plan("rtn", "w4a16", {"block.proj": layer}))
    return interchange.export_checkpoint(difloat.save(model, folder / "own"), folder / "out", "vllm")


def plain() -> LayerPlan:
    return draft_layer(torch.randn(48, 32, generator=torch.Generator().manual_seed(0)), [32], NVFP4).plan()


def branched(down: float = 0.5) -> LayerPlan:
    side = {"side_down": torch.full((1, 32), down).half(), "side_up": torch.ones(48, 1).half()}
    layer = plain()
    return replace(layer, side=Side(1), tensors={**layer.tensors, **side})


def test_a_layer_in_float_whose_name_others_contain_is_not_named(tmp_path: Path) -> None:
    """The reader leaves alone whatever contains a name of its list, so "proj" there would free "block.proj" as well."""
    config = json.loads((written(branched(), tmp_path).parent / "config.json").read_text())
    assert config["quantization_config"]["modules_to_not_convert"] == []
    _, named = interchange.remarks_of(tmp_path / "own", "vllm")
    assert named.startswith("proj: in float, but not in modules_to_not_convert")


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    part = replace(branched().parts[0], activation=QuantSpec(parse("int8"), "token", online=True))
    integers = draft_layer(torch.randn(48, 32), [32], Rule((parse("int4"),), "group", 16)).plan()
    rough = {**branched().tensors, "weight_scale": branched().tensors["weight_scale"] * 1.0001}
    for number, (layer, words) in enumerate(
        [
            (plain(), "must have a low-rank branch beside a weight, got none"),
            (branched(0.5004883), "branch or factors that bfloat16 does not hold"),
            (replace(branched(), parts=(part,)), "quantizes its input to int8; quantize weights only"),
            (
                replace(branched(), parts=integers.parts),
                "is on the grid of int4, not e2m1; quantize with --recipe svdquant",
            ),
            (replace(branched(), tensors=rough), "no e4m3 numbers times one bfloat16 number"),
        ]
    ):
        with pytest.raises(ValueError, match=words):
            written(layer, tmp_path / str(number))
    model = difloat.save(api.apply(Net(), Plan("rtn", "w4a16", {"block.proj": branched()})), tmp_path / "own")
    with pytest.raises(ValueError, match="output must be a directory for vllm files"):
        interchange.export_checkpoint(model, tmp_path / "a.safetensors", "vllm")
    assert not (tmp_path / "a.safetensors").exists()


@pytest.mark.parametrize(
    ("recipe", "bits", "options", "words"),
    [
        (
            "rtn",
            "w4a16",
            {},
            "recipe must make a weight and a low-rank branch per layer for vllm files, got none",
        ),
        ("hsvd", "w4a16", {}, "got integers and a branch beside them; take svdquant"),
        ("svdquant", "w4a16", {"rank": 0}, "take svdquant with a rank above 0"),
        (
            "svdquant",
            "w4a4",
            {},
            "bits must leave inputs as they are for vllm files, such as w4a16, got w4a4",
        ),
        ("svdquant", "w8a16", {}, "bits must be w4a16 for vllm files, got w8a16"),
        ("svdquant", "w4a16", {"target": "gguf"}, "must make one ordinary weight per layer for gguf files"),
    ],
)
def test_plans_that_no_file_holds_are_refused_before_calibration(
    recipe: str, bits: str, options: dict[str, Any], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        api.plan(tiny_pixart(), recipe, bits, **{"target": "vllm", **CALL, **options})


def test_scales_of_one_number_are_split_by_what_bfloat16_holds() -> None:
    scales = torch.tensor([[1.0, 1.0]]) * 0.75
    ratio, shared = interchange.layers.split_scales(scales, torch.bfloat16)
    assert torch.equal(ratio.float() * shared, scales) and shared.bfloat16().float() == shared
    assert vllm.rank_of({"a": branched()}, {}) == 1
