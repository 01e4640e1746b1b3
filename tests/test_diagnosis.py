"""A layer that was broken on purpose is found, in no more sampling runs than said, and both pipelines stay as they were."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import difloat
from difloat import api
from difloat.evaluation import diagnosis
from difloat.evaluation.diagnosis import _bisect, runs_needed
from difloat.layers import packed
from difloat.layers.packed import QuantizedLayer
from tiny import tiny_pixart, tiny_unet

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
ARGUMENTS = {"prompts": ["a red cat", "the blue house"], "samples": 6, "steps": 2, "progress": False}
CALL = {"pixart": {"use_resolution_binning": False}, "unet": {}}
MAKE: dict[str, Callable[[], Any]] = {"pixart": tiny_pixart, "unet": tiny_unet}


def quantized(kind: str, recipe: str = "rtn", bits: str = "w8a16", **options: Any) -> Any:
    pipeline = MAKE[kind]()
    difloat.quantize(pipeline, recipe, bits, call_kwargs=CALL[kind], **ARGUMENTS, **options)
    return pipeline


def run(kind: str, broken: Any, **more: Any) -> diagnosis.Diagnosis:
    return difloat.diagnose(MAKE[kind](), broken, call_kwargs=CALL[kind], **ARGUMENTS, **more)


def damage(pipeline: Any, name: str, change: Callable[[Tensor], Tensor]) -> None:
    layer = api.denoiser(pipeline).get_submodule(name)
    layer.weight_scale = change(layer.weight_scale)


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("pixart", "transformer_blocks.1.ff.net.2"),
        ("pixart", "proj_out"),
        ("unet", "up_blocks.0.attentions.0.transformer_blocks.0.attn2.to_v"),
        ("unet", "down_blocks.0.resnets.0.conv2"),
    ],
)
def test_the_broken_layer_is_found(kind: str, name: str) -> None:
    pipeline = quantized(kind)
    damage(pipeline, name, lambda scale: scale * 12)
    model = api.denoiser(pipeline)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    modules = dict(model.named_modules())
    found = run(kind, pipeline)
    assert found.exclude == (name,)
    assert found.after < found.before * 0.5 == found.goal
    assert found.layers[0].name == name and found.layers[0].error == pytest.approx(11, rel=0.2)
    assert name.startswith(found.blocks[0].name)
    assert found.runs <= runs_needed(api.denoiser(MAKE[kind]()), model)
    after = model.state_dict()
    assert modules == dict(model.named_modules()) and all(
        torch.equal(after[key], before[key]) for key in before
    )
    assert not [m for m in model.modules() if m._forward_hooks or m._forward_pre_hooks]


def test_the_errors_are_those_of_the_layer_alone_and_of_all_before_it() -> None:
    pipeline = quantized("pixart")
    first, last = "transformer_blocks.0.attn1.to_v", "transformer_blocks.1.ff.net.2"
    damage(pipeline, first, lambda scale: scale * 12)
    found = run("pixart", pipeline)
    forced = {layer.name: layer.error for layer in found.layers}
    assert forced[first] > 5 and forced[last] < 0.1, "its inputs are the float model's"
    block = next(block for block in found.blocks if block.name == "transformer_blocks.1")
    assert set(block.forced) == set(block.accumulated) and len(block.forced) == 2
    assert all(block.accumulated[timestep] > 10 * error for timestep, error in block.forced.items())
    assert max(block.forced.values()) < 0.1 < max(block.accumulated.values())


def test_a_layer_that_gives_nan_is_found_although_no_picture_is_finite() -> None:
    pipeline = quantized("pixart")
    name = "transformer_blocks.0.ff.net.0.proj"
    damage(pipeline, name, lambda scale: scale * torch.nan)
    found = run("pixart", pipeline)
    assert found.before == math.inf and found.exclude == (name,) and found.after < 1
    assert not found.layers[0].finite and found.layers[0].error == math.inf


def test_values_beyond_float16_are_named() -> None:
    pipeline = quantized("pixart")
    name = "transformer_blocks.1.attn1.to_q"
    damage(pipeline, name, lambda scale: scale * 1e7)
    wide = [layer.name for layer in run("pixart", pipeline).layers if layer.overflows_float16]
    assert wide == [name]


def test_layers_that_depend_on_the_timestep() -> None:
    pipeline = quantized("pixart", "viditq", "w8a8")
    name = "transformer_blocks.1.ff.net.2"
    damage(pipeline, name, lambda scale: scale * 12)
    found = run("pixart", pipeline)
    assert found.layers[0].name == name and name in found.exclude


def test_what_does_not_belong_together_is_refused() -> None:
    pipeline = quantized("pixart")
    for pair, words in (
        ((pipeline, tiny_pixart()), "second model must be quantized"),
        ((pipeline, pipeline), "as a float layer"),
        ((tiny_unet(), pipeline), "as a float layer"),
    ):
        with pytest.raises(ValueError, match=words):
            difloat.diagnose(*pair, **ARGUMENTS)
    with pytest.raises(ValueError, match="share must be between 0 and 1"):
        difloat.diagnose(tiny_pixart(), pipeline, share=1.0, **ARGUMENTS)


@pytest.mark.parametrize("count", [1, 2, 3, 7, 8, 20])
def test_bisection_finds_the_least_number_in_the_runs_it_may_take(count: int) -> None:
    groups = [[f"layer{index}"] for index in range(count)]
    for needed in [*range(1, count + 1), None]:
        asked: list[int] = []

        def error(names: Any, needed: int | None = needed, asked: list[int] = asked) -> float:
            asked.append(len(names))
            return 1.0 if needed is None or len(names) < needed else 0.1

        found = _bisect([], groups, error, 0.5)
        assert found == ((needed, 0.1) if needed else (None, 1.0))
        assert len(asked) <= math.ceil(math.log2(count + 1)) and len(set(asked)) == len(asked)


def test_units_cover_every_quantized_layer() -> None:
    pipeline = quantized("unet", exclude=["mid_block"])
    original, model = api.denoiser(tiny_unet()), api.denoiser(pipeline)
    units = diagnosis._units(original, model)
    taken = [name for name, module in model.named_modules() if isinstance(module, QuantizedLayer)]
    assert sorted(name for members in units.values() for name in members) == sorted(taken)
    assert set(packed.quantizable(original)) - set(taken) == {
        name for name in packed.quantizable(original) if name.startswith("mid_block.")
    }
