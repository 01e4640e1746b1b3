"""Low-rank pairs beside a packed weight: the same product everywhere, stored exactly, counted, refused when damaged."""

from __future__ import annotations

import json
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import difloat
import tiny
from difloat import api
from difloat.kernels import operators
from difloat.layers import install
from difloat.layers import packed as layers
from difloat.layers.low_rank_branch import low_rank, product
from difloat.methods.training.twin_layer import Adaptive, stored_bytes
from difloat.numbers.formats import parse
from difloat.plan.add_delta import add_to_weight
from difloat.plan.encode import dequantize, plan_layer
from difloat.plan.plan import SIDE, LayerPlan, LayerSpec, Plan
from difloat.plan.specs import Part, QuantSpec, Side
from difloat.plan.validation import plain, read
from difloat.plan.weight import Branch, Weight
from difloat.report import build
from test_finetune import Denoiser

GRID = (100.0, 500.0, 900.0)
PLACES = [0, 1, 0]
RANK = 3


def factors_of(layer: nn.Module, rank: int = RANK) -> tuple[torch.Tensor, torch.Tensor]:
    out_channels, *inner = layer.weight.shape
    return torch.randn(rank, *inner), torch.randn(out_channels, rank)


def plan_of_layer(layer: nn.Linear | nn.Conv2d) -> LayerPlan:
    """Rounded to nearest; inputs rounded with one static scale."""
    part = Part(layer.weight.shape[1], QuantSpec(parse("e2m1"), "channel"), QuantSpec(parse("e4m3")))
    scale = layer.weight.detach().abs().amax(dim=tuple(range(1, layer.weight.dim()))) / 6
    return plan_layer(layer.weight.detach(), [part], [scale], input_scales=[torch.tensor(0.01)])


def twins_of(model: nn.Module, adapters: int = 2, **changes: object) -> dict[str, Adaptive]:
    generator = torch.Generator().manual_seed(2)
    arguments = {"adapters": adapters, "rank": RANK, "entries": 1, "carry": "side", **changes}
    return {
        name: Adaptive(layer, plan_of_layer(layer), generator=generator, **arguments)
        for name, layer in layers.quantizable(model).items()
    }


@pytest.fixture
def model() -> Denoiser:
    torch.manual_seed(0)
    return Denoiser()


def planned(model: nn.Module, places: list[int] = PLACES) -> Plan:
    """Every layer with two pairs, or one where all places are the same."""
    packed = {name: twin.packed(places) for name, twin in twins_of(model).items()}
    by_time = any(layer.schedules for layer in packed.values())
    return Plan("msfp", "w4a8", packed, timesteps=GRID if by_time else ())


def at(model: nn.Module, timestep: float) -> AbstractContextManager[None]:
    """Layers of `model` compute as in a call with this timestep."""
    return install.as_in_call(model, (None, torch.tensor([timestep])), {})


@pytest.mark.parametrize(
    "layer",
    [
        nn.Linear(6, 4),
        nn.Conv2d(4, 6, 3),
        nn.Conv2d(4, 6, 3, stride=2, padding=1, dilation=2),
        nn.Conv2d(4, 6, (3, 5), padding="same"),
        nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"),
        nn.Conv2d(4, 6, 3, padding=1, groups=2),
        nn.Conv2d(4, 4, 3, padding=1, groups=4),
    ],
)
def test_the_branch_is_the_layer_with_the_product_as_its_weight(layer: nn.Linear | nn.Conv2d) -> None:
    torch.manual_seed(1)
    layer = layer.double()
    down, up = factors_of(layer)
    x = torch.randn(2, 5, 6) if isinstance(layer, nn.Linear) else torch.randn(2, 4, 7, 8)
    with torch.no_grad():
        layer.weight.copy_(product(down, up))
        layer.bias.zero_()
        # The product is taken in float32, some forty terms each.
        torch.testing.assert_close(
            low_rank(layer, x.double(), down, up), layer(x.double()), rtol=1e-5, atol=1e-5
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_packed_layer_adds_the_pair_of_the_timestep(model: Denoiser, dtype: torch.dtype) -> None:
    plan = planned(model)
    assert all(layer.side == Side(RANK, (0, 1, 0)) and layer.variants == 1 for layer in plan.layers.values())
    bare = replace(
        plan,
        layers={
            name: replace(layer, side=None, tensors={n: t for n, t in layer.tensors.items() if n not in SIDE})
            for name, layer in plan.layers.items()
        },
        timesteps=(),
    )
    quantized = install.apply(install.shadow(model), plan).to(dtype)
    without = install.apply(install.shadow(model), bare).to(dtype)
    x = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(5)).to(dtype)
    with torch.no_grad():
        for timestep, pair in zip(GRID, PLACES, strict=True):
            stored = plan.layers["conv_in"].tensors
            down, up = (stored[name].chunk(2)[pair] for name in SIDE)
            branch = low_rank(model.conv_in, x, down, up)
            with at(quantized, timestep + 1):
                assert torch.equal(quantized.conv_in(x), without.conv_in(x) + branch)
    assert all(getattr(quantized.conv_in, name).dtype == torch.float16 for name in SIDE)


def test_the_twin_computes_what_its_plan_does_for_every_choice(model: Denoiser) -> None:
    twin = twins_of(model)["conv_in"]
    with torch.no_grad():
        twin.up.mul_(50)  # far above the rounding of the sums
    plan = Plan("msfp", "w4a8", {"conv_in": twin.packed(PLACES)}, timesteps=GRID)
    quantized = install.apply(install.shadow(model), plan)
    x = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        seen = []
        for timestep, pair in zip(GRID, PLACES, strict=True):
            twin.choice = torch.eye(2)[pair]
            with at(quantized, timestep):
                torch.testing.assert_close(quantized.conv_in(x), twin(x), rtol=1e-5, atol=1e-6)
            seen.append(twin(x))
    assert torch.equal(seen[0], seen[2]) and not torch.allclose(seen[0], seen[1], atol=1e-3)


def test_gradients_too_small_for_float16_reach_the_adapters(model: Denoiser) -> None:
    twin = twins_of(model)["conv_in"]
    twin.choice = torch.eye(2)[1]
    (twin(torch.ones(1, 3, 6, 6)).sum() * 1e-12).backward()
    assert float(twin.down.grad[1].abs().max()) > 0 and float(twin.up.grad[1].abs().max()) > 0
    assert float(twin.down.grad[0].abs().max()) == 0


def test_factors_without_a_float16_are_refused(model: Denoiser) -> None:
    twin = twins_of(model)["time"]
    with torch.no_grad():
        twin.up[1, 0, 0] = 1e6
    assert twin.packed([0, 0, 0]).side == Side(RANK)  # the pair is not used
    with pytest.raises(ValueError, match="finite in float16"):
        twin.packed(PLACES)


def test_bytes_are_counted_and_told(model: Denoiser) -> None:
    plan = planned(model)
    layer = plan.layers["conv_in"]  # [8, 3, 3, 3]
    beside_bytes = 2 * 2 * RANK * (3 * 9 + 8)
    assert layer.nbytes == 8 * 2 * 9 + 8 * 4 + 4 + beside_bytes
    row = build.layer_row("conv_in", layer, model.conv_in.weight)
    assert row.bytes == layer.nbytes and row.effective_bits == 8 * layer.nbytes / (8 * 27)
    assert row.note == f"2 x rank {RANK} beside, {beside_bytes} bytes in float16"
    for carry in ("merged", "side"):
        for name, twin in twins_of(model, carry=carry).items():
            added = twin.packed(PLACES).nbytes - twin.plan.nbytes
            assert added == stored_bytes(twin.plan, 2, RANK, carry), name
    merged = twins_of(model, carry="merged")["conv_in"].packed(PLACES)
    assert build.layer_row("conv_in", merged, model.conv_in.weight).note.startswith("2 packed weights")


def test_a_plan_survives_json_and_its_file(model: Denoiser, tmp_path: Path) -> None:
    for places in (PLACES, [1, 1, 1]):
        plan = planned(model, places)
        layer = plan.layers["conv_out"]
        again = read(LayerSpec, json.loads(json.dumps(plain(layer)))).with_tensors(layer.tensors)
        assert (again.side, again.schedules) == (layer.side, layer.schedules)
        quantized = api.apply(install.shadow(model), plan)
        out = difloat.save(quantized, tmp_path / f"{places[0]}")
        assert all(finding.passed for finding in difloat.verify(out))
        torch.manual_seed(9)
        loaded = difloat.load(out, into=Denoiser())
        x, timestep = torch.randn(2, 3, 6, 6), torch.full((2,), 500)
        with torch.no_grad():
            assert torch.equal(loaded(x, timestep), quantized(x, timestep))


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_diffusers_loads_the_factors_bit_for_bit(tmp_path: Path, dtype: torch.dtype | None) -> None:
    pipeline = tiny.tiny_ddim()
    api.apply(pipeline, planned(pipeline.unet))
    out = difloat.save(pipeline, tmp_path / "saved")
    loaded = difloat.load(out, dtype=dtype)
    state, again = pipeline.unet.state_dict(), loaded.unet.state_dict()
    names = [name for name in state if name.endswith(SIDE)]
    assert len(names) == 2 * len(layers.quantizable(tiny.tiny_ddim().unet))
    for name in names:
        assert again[name].dtype == torch.float16 and torch.equal(again[name], state[name]), name
    loaded.unet(torch.randn(1, 3, 8, 8, dtype=dtype), 500)


def test_restoring_adds_a_single_pair_and_refuses_several(model: Denoiser) -> None:
    plan = planned(model, [1, 1, 1])
    restored = install.restore(install.apply(install.shadow(model), plan))
    stored = plan.layers["conv_in"]
    down, up = (stored.tensors[name] for name in SIDE)
    assert torch.equal(restored.conv_in.weight, dequantize(stored) + product(down, up))
    assert type(restored.conv_in) is nn.Conv2d
    with pytest.raises(ValueError, match="one weight each"):
        install.restore(install.apply(install.shadow(model), planned(model)))


def test_merging_a_change_into_the_weight_leaves_the_pairs_beside_it(model: Denoiser) -> None:
    layer = planned(model).layers["conv_in"]
    changed = add_to_weight(layer, torch.ones(layer.shape)).layer
    assert changed.side == layer.side and changed.tensor_shapes() == layer.tensor_shapes()
    assert all(torch.equal(changed.tensors[name], layer.tensors[name]) for name in SIDE)
    assert not torch.equal(changed.tensors["weight"], layer.tensors["weight"])


def test_repair_refuses_layers_with_something_beside(model: Denoiser) -> None:
    with pytest.raises(ValueError, match="nothing beside"):
        api.repair(model, planned(model, [0, 0, 0]), forward_loop=lambda module: None)


def _damage_config(out: Path, change: object) -> None:
    path = out / "config.json"
    config = json.loads(path.read_text())
    change(config["quantization_config"]["layers"]["conv_in"])
    path.write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("rank", 0),
        ("rank", "3"),
        ("rank", 2**50),
        ("rank", RANK + 1),
        ("schedule", [0, -1, 0]),
        ("schedule", [0, 2**40, 0]),
        ("schedule", [0, 1]),
        ("width", 3),
    ],
)
def test_damaged_branches_in_a_plan_are_refused(
    model: Denoiser, tmp_path: Path, field: str, value: object
) -> None:
    out = difloat.save(api.apply(install.shadow(model), planned(model)), tmp_path / "saved")
    (out / "difloat.json").unlink()  # the manifest would speak first
    _damage_config(out, lambda layer: layer["side"].update({field: value}))
    with pytest.raises(difloat.CheckpointError):
        difloat.load(out, into=Denoiser())


@pytest.mark.parametrize("damage", ["nan", "dtype", "missing"])
def test_damaged_factors_are_refused(model: Denoiser, tmp_path: Path, damage: str) -> None:
    out = difloat.save(api.apply(install.shadow(model), planned(model)), tmp_path / "saved")
    (out / "difloat.json").unlink()
    state = load_file(out / "model.safetensors")
    name = "time.side_up"
    if damage == "nan":
        state[name][0, 0] = torch.nan
    elif damage == "dtype":
        state[name] = state[name].float()
    else:
        del state[name]
    save_file(state, out / "model.safetensors")
    with pytest.raises(difloat.CheckpointError, match=name):
        difloat.load(out, into=Denoiser())


def test_the_operator_with_a_branch_is_legal_and_gives_gradients() -> None:
    layer = nn.Linear(6, 4)
    plan, bias, (down, up) = plan_of_layer(layer), layer.bias.detach(), factors_of(layer)
    weight, inputs = plan.weight(), plan.layout.stored_inputs(plan.tensors)
    both = Weight(weight.columns, branch=Branch(down, up))
    lists = operators._lists(weight, inputs[0])
    arguments = (torch.randn(2, 3, 6), *lists, None, bias, [down, up], weight.text)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(torch.ops.difloat.linear.default, arguments, test_utils=tests)
    x, other, third = (torch.full((5, 6), 0.02).requires_grad_() for _ in range(3))
    operators.linear(x, both, inputs, bias).sum().backward()
    (operators.linear(other, weight, inputs, bias) + other @ down.T @ up.T).sum().backward()
    torch.testing.assert_close(x.grad, other.grad)
    pair = [down.clone().requires_grad_(), up.clone().requires_grad_()]
    torch.ops.difloat.linear(third, *lists, None, bias, pair, weight.text).sum().backward()
    torch.testing.assert_close(third.grad, other.grad)
    twins = [factor.detach().clone().requires_grad_() for factor in pair]
    (other.detach() @ twins[0].to(other.dtype).T @ twins[1].to(other.dtype).T).sum().backward()
    torch.testing.assert_close([one.grad for one in pair], [one.grad for one in twins])
    with torch.no_grad():
        torch.testing.assert_close(
            operators.linear(x, both, inputs, bias),
            operators.linear(x, weight, inputs, bias) + x @ down.T @ up.T,
        )


@pytest.mark.parametrize("places", [PLACES, [1, 1, 1]])
def test_layers_with_a_branch_compile_without_breaks(model: Denoiser, places: list[int]) -> None:
    quantized = install.apply(install.shadow(model), planned(model, places))
    compiled = torch.compile(quantized, fullgraph=True, backend="eager")
    x = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        for timestep in (100, 500):
            arguments = (x, torch.full((2,), timestep))
            assert torch.equal(compiled(*arguments), quantized(*arguments))
