"""What every recipe promises, checked on tiny real pipelines."""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from difloat import api, recipes
from difloat.calibration.collect import Calibration, CalibrationSettings, collect, denoiser_of
from difloat.checkpoint.plan_config import quantization_config
from difloat.layers import install, packed, quantizable
from difloat.methods.post_training import Bits, Task
from difloat.methods.trace import removed
from difloat.plan.encode import dequantize
from difloat.plan.plan import LayerSpec, Plan
from difloat.plan.validation import read
from tiny import tiny_pixart, tiny_unet

SETTINGS = CalibrationSettings(samples=12, steps=3, prompts_per_batch=2, seed=1)
FAST = {
    "iterations": 4,
    "rounding_rows": 8,
    "weight_granularity": "tensor",
    "epochs": 1,
    "rows": 2,
    "rank": 2,
}


LEARNING = ("iterations", "rounding_rows")  # refused where no rounding is learned


@functools.cache
def prepared_pipeline(kind: str) -> tuple[object, Calibration]:
    pipeline = {"unet": tiny_unet, "pixart": tiny_pixart}[kind]()
    return pipeline, collect(pipeline, ["a cat", "a red house"], SETTINGS, progress=False)


def prepared(kind: str) -> tuple[nn.Module, Calibration]:
    pipeline, data = prepared_pipeline(kind)
    return denoiser_of(pipeline)[1], data


def plan_with(kind: str, recipe: str, bits: str = "w4a8", seed: int = 0, **options: object) -> Plan:
    pipeline, data = prepared_pipeline(kind)
    known = recipes.RECIPES[recipe].options.__dataclass_fields__
    learns = Bits.parse(bits).weight <= 4
    fast = {name: value for name, value in FAST.items() if name in known and (learns or name not in LEARNING)}
    options = {**fast, **options}
    task = replace(api.task_of(pipeline, data, Bits.parse(bits)), seed=seed, progress=False)
    return recipes.plan(task, recipe, bits, options)


def calls_by_timestep(data: Calibration) -> list[tuple[tuple, dict]]:
    """One call per timestep, as samplers make them."""
    rows: dict[float, list[int]] = {}
    for row, timestep in enumerate(data.timesteps):
        rows.setdefault(timestep, []).append(row)
    return [data.batch(group) for group in rows.values()]


def output(model: nn.Module, data: Calibration) -> Tensor:
    with torch.no_grad():
        results = [model(*args, **kwargs) for args, kwargs in calls_by_timestep(data)]
    return torch.cat([result[0] if isinstance(result, tuple) else result.sample for result in results])


def error(model: nn.Module, plan: Plan, data: Calibration) -> float:
    twin = install.apply(install.shadow(model), plan)
    expected = output(model, data)
    return float((output(twin, data) - expected).norm() / expected.norm())


@pytest.mark.parametrize("recipe", recipes.RECIPES)
def test_leaves_the_model_untouched_and_accounts_for_every_layer(recipe: str) -> None:
    model, _ = prepared("pixart")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    hooks = [len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules()]
    plan = plan_with("pixart", recipe)
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert hooks == [
        len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules()
    ]
    staying = quantizable.staying_float(model)
    assert set(plan.layers) | set(plan.skipped) == set(packed.quantizable(model)) | set(staying)
    assert not set(plan.layers) & set(plan.skipped) and all(plan.skipped.values())


@pytest.mark.parametrize("recipe", recipes.RECIPES)
def test_same_seed_same_plan(recipe: str) -> None:
    first, second = (plan_with("pixart", recipe) for _ in range(2))
    assert quantization_config(first) == quantization_config(second)
    for name, layer in first.layers.items():
        assert all(
            torch.equal(tensor, second.layers[name].tensors[key]) for key, tensor in layer.tensors.items()
        )


@pytest.mark.parametrize("recipe", recipes.RECIPES)
def test_plan_survives_json_with_tensors(recipe: str) -> None:
    plan = plan_with("pixart", recipe)
    data = json.loads(json.dumps(quantization_config(plan)))
    for name, layer in plan.layers.items():
        again = read(LayerSpec, data["layers"][name]).with_tensors(layer.tensors)
        assert torch.equal(dequantize(again), dequantize(layer))


@pytest.mark.parametrize("recipe", recipes.RECIPES)
def test_eight_bits_cost_every_layer_little(recipe: str) -> None:
    # Layer by layer on full-precision inputs: the whole of a random network amplifies any error without limit.
    model, data = prepared("pixart")
    twin = install.apply(install.shadow(model), plan_with("pixart", recipe, "w8a8"))
    squares: dict[str, list[Tensor]] = {}
    clock = install.clock_of(twin)
    if clock is not None:
        model = install.shadow(model)
        install.set_clock(model, clock)

    def compare(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], expected: Tensor) -> None:
            difference = twin.get_submodule(name)(inputs[0]) - expected
            squares.setdefault(name, []).append(
                torch.stack([difference.square().sum(), expected.square().sum()])
            )

        return hook

    handles = [
        layer.register_forward_hook(compare(name)) for name, layer in packed.quantizable(model).items()
    ]
    with removed(handles):
        output(model, data)
    errors = {
        name: float((found[0] / found[1]).sqrt())
        for name, pairs in squares.items()
        for found in [torch.stack(pairs).sum(0)]
    }
    assert len(errors) == 27 and max(errors.values()) < 0.05


def test_searched_encodings_beat_plain_rounding_of_the_same_granularity() -> None:
    model, data = prepared("unet")
    searched = error(model, plan_with("unet", "lbfp", rounding="nearest"), data)
    plain = error(model, plan_with("unet", "rtn", scale="minmax"), data)
    assert searched < plain


def test_skip_concatenations_are_split_where_the_unet_has_them() -> None:
    model, _ = prepared("unet")
    plan = plan_with("unet", "rtn", "w4a16")
    split = {name for name, layer in plan.layers.items() if len(layer.parts) == 2}
    expected = {
        f"up_blocks.{u}.resnets.{r}.{layer}"
        for u in range(2)
        for r in range(2)
        for layer in ("conv1", "conv_shortcut")
    }
    assert split == expected
    assert all(
        len(layer.parts) == 1 for layer in plan_with("unet", "rtn", "w4a16", split=False).layers.values()
    )


def test_first_and_last_layer_keep_eight_bits_unless_told_otherwise() -> None:
    def kept(**options: object) -> set[str]:
        plan = plan_with("unet", "lbfp", "w4a16", rounding="nearest", **options)
        return {name for name, layer in plan.layers.items() if layer.parts[0].weight.format.bits == 8}

    assert kept() == {"conv_in", "conv_out"}
    assert kept(keep_8bit=()) == set()
    assert kept(keep_8bit=("last", "time_embedding.linear_1")) == {"conv_out", "time_embedding.linear_1"}


def test_fp4dit_takes_the_formats_of_the_paper() -> None:
    model, data = prepared("pixart")
    plan = plan_with("pixart", "fp4dit", "w4a6", group_size=16)
    inside = packed.inside_blocks(model)
    assert set(plan.layers) == set(inside) and all(name.startswith("transformer_blocks") for name in inside)
    for name, layer in plan.layers.items():
        (part,) = layer.parts
        assert part.weight.format.name == ("e3m0" if name.endswith("ff.net.0.proj") else "e2m1")
        assert (part.weight.granularity, part.weight.group_size) == ("group", 16)
        assert part.activation.format.name == "e2m3" and part.activation.granularity == "token"
    assert {entry.operand.name for entry in plan.attention.values()} == {"e2m3"} and len(plan.attention) == 4
    sigma = Task(model, data, Bits.parse("w4a8"), progress=False, pipeline="PixArtSigmaPipeline")
    other = recipes.plan(sigma, "fp4dit", "w4a8", {"rounding": "nearest", "group_size": 0, "softmax": "8"})
    formats = {name: layer.parts[0].weight.format.name for name, layer in other.layers.items()}
    assert set(formats.values()) == {"e1m2", "e3m0"}
    assert all(layer.parts[0].weight.granularity == "channel" for layer in other.layers.values())
    assert {(e.operand.name, e.softmax.name) for e in other.attention.values()} == {("e3m4", "ue4m4")}


def test_fp4dit_ablations_differ_where_they_should() -> None:
    base = plan_with("pixart", "fp4dit", "w4a6", group_size=16)
    for options in (
        {"scale_aware": False},
        {"inputs": "full"},
        {"before_gelu": "same"},
        {"precision": "bfloat16"},
    ):
        other = plan_with("pixart", "fp4dit", "w4a6", group_size=16, **options)
        assert any(
            not torch.equal(layer.tensors["weight"], base.layers[name].tensors["weight"])
            for name, layer in other.layers.items()
        ), options
    static = plan_with("pixart", "fp4dit", "w4a6", activation="static", attention=False, outside="8bit")
    assert not static.attention and len(static.layers) == 27
    assert all("input_scale" in layer.tensors for layer in static.layers.values())
    assert static.layers["proj_out"].parts[0].weight.format.name == "e3m4"
    wide = {
        bits: plan_with("pixart", "fp4dit", bits, rounding="nearest", activation_format="wide")
        for bits in ("w4a6", "w4a8")
    }
    inputs = {
        bits: {layer.parts[0].activation.format.name for layer in made.layers.values()}
        for bits, made in wide.items()
    }
    assert inputs == {"w4a6": {"e3m2"}, "w4a8": {"e4m3"}}
    assert {entry.operand.name for entry in wide["w4a6"].attention.values()} == {"e3m2"}


def test_viditq_has_a_weight_for_every_stretch_of_the_trajectory() -> None:
    plan = plan_with("pixart", "viditq", "w4a8", stretches=3)
    model, data = prepared("pixart")
    assert plan.timesteps == tuple(sorted(set(data.timesteps))) and len(plan.timesteps) == 3
    assert all(layer.schedule == (0, 1, 2) and layer.smoothed for layer in plan.layers.values())
    single = plan_with("pixart", "viditq", "w4a8", stretches=1)
    assert all(layer.schedule == () and layer.smoothed for layer in single.layers.values())
    assert single.timesteps == () and error(model, single, data) < 0.5
    assert not any(layer.smoothed for layer in plan_with("pixart", "viditq", stretches=0).layers.values())


def test_learned_rounding_never_worsens_a_block_and_stays_between_neighbours() -> None:
    plan = plan_with("pixart", "lbfp", "w4a16", iterations=12, weight_granularity="channel")
    blocks = plan.measured["blocks"].values()
    assert all(block["learned"] <= block["nearest"] for block in blocks)
    assert sum(block["learned"] for block in blocks) < sum(block["nearest"] for block in blocks)


def test_activations_of_16_bits_stay_as_they_are() -> None:
    plan = plan_with("pixart", "lbfp", "w4a16", rounding="nearest")
    assert all(part.activation is None for layer in plan.layers.values() for part in layer.parts)
    assert not any("input_scale" in layer.tensors for layer in plan.layers.values())


def test_a_killed_run_goes_on_after_the_last_finished_block(tmp_path, monkeypatch) -> None:
    model, data = prepared("pixart")
    from difloat.methods import blockwise

    task = Task(model, data, Bits.parse("w4a8"), progress=False, work_dir=tmp_path)
    fast = {"iterations": 4, "rounding_rows": 8}
    whole = recipes.plan(copy.copy(task), "lbfp", "w4a8", fast)
    files = sorted(tmp_path.rglob("*.safetensors"))
    assert len(files) == len(whole.measured["blocks"])
    files[-1].unlink()
    learned = []
    real = blockwise.learn_rounding
    monkeypatch.setattr(blockwise, "learn_rounding", lambda *a, **k: learned.append(1) or real(*a, **k))
    again = recipes.plan(task, "lbfp", "w4a8", fast)
    assert len(learned) == 1
    for name, layer in whole.layers.items():
        assert torch.equal(layer.tensors["weight"], again.layers[name].tensors["weight"])


def test_bad_weights_and_models_are_named() -> None:
    model, data = prepared("pixart")
    broken = copy.deepcopy(model)
    broken.proj_out.weight.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match="proj_out"):
        recipes.plan(Task(broken, data, Bits.parse("w4a8"), progress=False), "rtn", "w4a8", {})
    with pytest.raises(ValueError, match="linear or convolution"):
        recipes.plan(Task(nn.Identity(), data, Bits.parse("w4a8"), progress=False), "rtn", "w4a8", {})


@pytest.mark.parametrize("bits", ["w4", "4/8", "w9a8", "w4a1", "w4a12", "", "w\uff14a\uff18"])
def test_bad_bits_are_refused(bits: str) -> None:
    with pytest.raises(ValueError, match="bits must"):
        Bits.parse(bits)


def test_bad_recipes_and_options_are_refused() -> None:
    with pytest.raises(ValueError, match="recipe must be one of lbfp"):
        recipes.lookup("nope")
    row = recipes.lookup("lbfp")
    with pytest.raises(ValueError, match="options must be among"):
        recipes.make_options(row, {"nope": 1}, "w4a8")
    with pytest.raises(ValueError, match="rounding must be one of"):
        recipes.make_options(row, {"rounding": "up"}, "w4a8")
    with pytest.raises(ValueError, match="iterations must be a whole number"):
        recipes.make_options(row, {"iterations": "many"}, "w4a8")
    assert recipes.make_options(row, {"keep_8bit": "first, proj", "split": "no"}, "w4a8").keep_8bit == (
        "first",
        "proj",
    )
