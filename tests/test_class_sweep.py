"""Every denoiser class of the installed diffusers: quantized, called, saved, loaded, called.

Packed bytes taken for numbers give pictures that are wrong without a word, and each class can do that in its own way. So a
packed model is held against the float model with the weights that the codes stand for: the same up to the order of sums.
"""

from __future__ import annotations

import copy
import importlib
import inspect
import pkgutil
from functools import cache
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import difloat
from class_table import NOT_TINY, TABLE, arguments, build
from difloat.checkpoint import data_free
from difloat.layers import packed
from difloat.layers.packed import QuantizedLayer
from difloat.plan.encode import dequantize

# What diffusers deprecates and what attention says of the CPU is not what is tested here.
pytestmark = [pytest.mark.filterwarnings(f"ignore::{kind}") for kind in ("FutureWarning", "UserWarning")]
# Those that read weights in some way, and one or two of every architecture; the others are run with `-m slow`.
QUICK = set(
    "AnyFlowTransformer3DModel AuraFlowTransformer2DModel BriaFibo2Transformer2DModel ChronoEditTransformer3DModel "
    "Cosmos3OmniTransformer HeliosTransformer3DModel HunyuanDiT2DModel JoyImageEditTransformer3DModel "
    "Kandinsky6SRTransformer3DModel MiniMaxH3Transformer3DModel MotifVideoTransformer3DModel PriorTransformer "
    "QwenImageTransformer2DModel SD3Transformer2DModel SkyReelsV2Transformer3DModel Transformer2DModel "
    "UNet2DConditionModel WanAnimate2Transformer3DModel WanAnimateTransformer3DModel WanTransformer3DModel "
    "WanVACETransformer3DModel ZImageTransformer2DModel".split()
)
FOLDERS = ("models.transformers", "models.unets", "models.controlnets", "pipelines")


@cache
def classes() -> dict[str, type]:
    """Every model class of diffusers' denoisers and control networks, and of those that live beside a pipeline."""
    from diffusers import ModelMixin

    found = {}
    for folder in FOLDERS:
        package = importlib.import_module(f"diffusers.{folder}")
        for entry in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            last = entry.name.rpartition(".")[2]
            if folder == "pipelines" and not last.startswith("modeling"):
                continue
            module = importlib.import_module(entry.name)
            found |= {
                name: value
                for name, value in vars(module).items()
                if inspect.isclass(value)
                and issubclass(value, ModelMixin)
                and value.__module__ == module.__name__
            }
    return found


def outputs(model: nn.Module, call: dict[str, Any]) -> list[Tensor]:
    with torch.no_grad():
        result = model(**copy.deepcopy(call))
    leaves = pytree.tree_leaves(result if isinstance(result, Tensor | tuple | list | dict) else tuple(result))
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


def distance(found: list[Tensor], expected: list[Tensor]) -> float:
    assert [tensor.shape for tensor in found] == [tensor.shape for tensor in expected]
    pairs = list(zip(found, expected, strict=True))
    return max(float((a.double() - b.double()).norm() / b.double().norm()) for a, b in pairs)


def with_decoded_weights(model: nn.Module, plan: difloat.Plan) -> nn.Module:
    """The float model with the weights that the plan's codes stand for."""
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for name, layer in plan.layers.items():
            packed.weight_of(twin, name).copy_(dequantize(layer))
    return twin


def tiny(name: str) -> tuple[nn.Module, dict[str, Any]]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return build(classes()[name], TABLE[name]), arguments(classes()[name], TABLE[name])


def test_every_class_is_in_the_sweep_or_has_a_reason() -> None:
    assert not TABLE.keys() & NOT_TINY.keys()
    assert classes().keys() == TABLE.keys() | NOT_TINY.keys()


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name not in QUICK)) for name in sorted(TABLE)]
)
def test_a_packed_model_computes_what_its_codes_stand_for_and_comes_back(name: str, tmp_path) -> None:
    model, call = tiny(name)
    before = outputs(model, call)
    assert all(bool(tensor.isfinite().all()) and float(tensor.float().std()) > 0.01 for tensor in before)
    plan = data_free.plan(
        model, data_free.settings({"weights": "e4m3", "bits": "w8a16", "outside": "8bit"}), progress=False
    )
    expected = outputs(with_decoded_weights(model, plan), call)
    difloat.apply(model, plan)
    assert sum(isinstance(module, QuantizedLayer) for module in model.modules()) == len(plan.layers) > 0
    found = outputs(model, call)
    assert distance(found, expected) < 1e-4
    assert distance(found, before) < 0.5
    if not hasattr(diffusers, name):
        return  # diffusers cannot load it by its name either
    difloat.save(model, tmp_path / "saved")
    assert all(finding.passed for finding in difloat.verify(tmp_path / "saved"))
    loaded = outputs(difloat.load(tmp_path / "saved"), call)
    assert all(torch.equal(a, b) for a, b in zip(found, loaded, strict=True))


@pytest.mark.parametrize("name", ["WanTransformer3DModel", "JoyImageEditTransformer3DModel"])
def test_layers_that_a_half_precision_model_keeps_in_float32_cast_to_it_after_loading(
    name: str, tmp_path
) -> None:
    model, call = tiny(name)
    model.save_pretrained(tmp_path / "float")
    model = classes()[name].from_pretrained(tmp_path / "float", torch_dtype=torch.bfloat16)
    call = pytree.tree_map_only(Tensor, lambda x: x.bfloat16() if x.dim() > 1 else x, call)
    plan = data_free.plan(
        model, data_free.settings({"weights": "e4m3", "bits": "w8a16", "outside": "8bit"}), progress=False
    )
    difloat.apply(model, plan)
    layer = model.get_submodule("condition_embedder.time_embedder.linear_1")
    assert layer.input_dtype == torch.float32 and layer.weight.dtype == torch.int8
    difloat.save(model, tmp_path / "saved")
    loaded = difloat.load(tmp_path / "saved", dtype=torch.bfloat16)
    assert loaded.get_submodule("condition_embedder.time_embedder.linear_1").input_dtype == torch.float32
    assert all(torch.equal(a, b) for a, b in zip(outputs(model, call), outputs(loaded, call), strict=True))
