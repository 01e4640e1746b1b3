"""Rotated inputs: the matrix, the same bits everywhere, layers, files, LoRA, training, recipes."""

from __future__ import annotations

import copy
import json
import pickle
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import difloat
import tiny
from difloat import api, recipes
from difloat.kernels import native_library, rotation
from difloat.layers import install
from difloat.layers.packed import QuantLinear
from difloat.methods.moments import rounded_input
from difloat.methods.training.twin_layer import Adaptive
from difloat.numbers import formats, hadamard
from difloat.plan.add_delta import add_to_weight
from difloat.plan.encode import dequantize, stored_values
from difloat.plan.plan import LayerPlan, LayerSpec, Plan
from difloat.plan.rules import Rule, block_rotation, draft_layer, online_integers
from difloat.plan.specs import Part, QuantSpec, Rotation, Side
from difloat.plan.validation import plain, read

KINDS = {
    "signs": Rotation(16),
    "another seed": Rotation(32, seed=5),
    "permuted": Rotation(8, seed=1, permuted=True),
    "pairs": Rotation(2),
    "regular": Rotation(16, regular=True),
    "regular of four": Rotation(4, regular=True),
}
kinds = pytest.mark.parametrize("kind", KINDS.values(), ids=list(KINDS))
INPUTS = {"token": online_integers(8, 0), "groups": online_integers(4, 32), "none": None}


def matrix_of(turn: Rotation, channels: int) -> Tensor:
    """The rotation as a matrix in float64, from its definition: Kronecker powers, signs, a permutation."""
    basis = [[1, 1], [1, -1]]
    if turn.regular:
        basis = [[1, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]]
    small = torch.tensor(basis, dtype=torch.float64)
    hadamard_matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(hadamard_matrix) < turn.block:
        hadamard_matrix = torch.kron(hadamard_matrix, small)
    blocks = torch.block_diag(*[hadamard_matrix] * (channels // turn.block)) / turn.block**0.5
    if turn.regular:
        return blocks
    blocks = blocks * hadamard.signs(channels, turn.seed).double()
    order = hadamard.order(channels, turn.seed) if turn.permuted else torch.arange(channels)
    return blocks @ torch.eye(channels, dtype=torch.float64)[order]


def layer_of(
    weight: Tensor, turn: Rotation | None = KINDS["signs"], bits: int = 4, inputs: str = "token"
) -> LayerPlan:
    """A linear layer with a rotated input, its weight rounded to nearest in that basis."""
    rule = INPUTS[inputs]
    turned = weight.detach() if turn is None else turn.forward(weight.detach())
    made = draft_layer(turned, [weight.shape[1]], Rule((formats.parse(f"int{bits}"),), "channel")).plan()
    activation = None if rule is None else rule.spec(rule.formats[0])
    return replace(made, parts=(replace(made.parts[0], activation=activation),), rotation=turn)


def plan_of(layers: dict[str, LayerPlan]) -> Plan:
    return Plan("rtn", "w4a8", layers)


@pytest.fixture
def model(generator: torch.Generator) -> nn.Sequential:
    made = nn.Sequential(nn.Linear(64, 48), nn.SiLU(), nn.Linear(48, 64, bias=False))
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return made


@pytest.fixture
def rotated(model: nn.Sequential) -> nn.Sequential:
    layers = {"0": layer_of(model[0].weight), "2": layer_of(model[2].weight, Rotation(16, 2, permuted=True))}
    return difloat.apply(copy.deepcopy(model), plan_of(layers))


@kinds
def test_rotation_is_its_matrix_and_the_inverse_undoes_it(kind: Rotation, generator: torch.Generator) -> None:
    x = torch.randn(7, 3, 96, generator=generator)
    matrix = matrix_of(kind, 96)
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(96, dtype=torch.float64))
    torch.testing.assert_close(kind.forward(x).double(), x.double() @ matrix.T, rtol=0, atol=1e-5)
    torch.testing.assert_close(kind.backward(kind.forward(x)), x, rtol=0, atol=1e-5)


@kinds
def test_no_direction_of_the_rotated_input_is_the_mean(kind: Rotation) -> None:
    """A row of equal entries would gather the mean of a block in one number."""
    if kind.block > 4:
        rows = matrix_of(kind, 96).sum(1).abs() / kind.block**0.5
        assert rows.max() < 0.9, rows.max()


@pytest.mark.skipif(native_library.unit() is None, reason="no native library was built")
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@kinds
def test_the_native_rotation_has_the_bits_of_the_reference(
    kind: Rotation, dtype: torch.dtype, threads: int, generator: torch.Generator
) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for shape in ((1, 32), (5, 2, 96), (3000, 96), (0, 32)):
            x = torch.randn(shape, generator=generator).to(dtype)
            assert torch.equal(rotation.run(x, kind), kind.forward(x).to(dtype))
            assert torch.equal(rotation.run(x.mT.contiguous().mT, kind), kind.forward(x).to(dtype))
    finally:
        torch.set_num_threads(before)


def test_signs_and_permutations_are_those_of_the_file_format() -> None:
    """`docs/format.md` states the hash; other readers depend on it."""
    assert hadamard.signs(16, 0).tolist() == [1 - 2 * (fmix(j + 1) & 1) for j in range(16)]
    shifted = [fmix((j + 1 + 7 * 0x9E3779B9) % 2**32) for j in range(40)]
    assert hadamard.signs(40, 7).tolist() == [1 - 2 * (h & 1) for h in shifted]
    assert hadamard.order(40, 7).tolist() == sorted(range(40), key=lambda j: (shifted[j] >> 1, j))
    assert hadamard.signs(6, 0).tolist() == [-1, 1, -1, -1, -1, 1]


def fmix(h: int) -> int:
    h ^= h >> 16
    h = h * 0x85EBCA6B % 2**32
    h ^= h >> 13
    h = h * 0xC2B2AE35 % 2**32
    return h ^ h >> 16


@kinds
def test_the_operator_passes_opcheck_and_gradients_are_turned_back(
    kind: Rotation, generator: torch.Generator
) -> None:
    x = torch.randn(3, 32, generator=generator, requires_grad=True)
    fields = (kind.block, kind.seed, kind.permuted, kind.regular)
    torch.library.opcheck(torch.ops.difloat.rotate, (x, *fields, False))
    upstream = torch.randn(3, 32, generator=generator)
    (gradient,) = torch.autograd.grad(rotation.rotate(x, kind), x, upstream)
    torch.testing.assert_close(gradient, kind.backward(upstream), rtol=0, atol=0)


@pytest.mark.parametrize("inputs", INPUTS)
@kinds
def test_a_layer_multiplies_the_rounded_rotated_input(
    kind: Rotation, inputs: str, generator: torch.Generator
) -> None:
    weight = torch.randn(24, 96, generator=generator)
    layer = layer_of(weight, kind, inputs=inputs)
    model = install.apply(nn.Sequential(nn.Linear(96, 24, bias=False)), plan_of({"0": layer}))
    x = torch.randn(2, 9, 96, generator=generator)
    expected = rounded_input(x, layer) @ stored_values(layer).T
    with torch.no_grad():
        torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-4)
    with_gradient = model(x.requires_grad_())  # through the operators
    torch.testing.assert_close(with_gradient, expected, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(dequantize(layer), weight, rtol=0, atol=float(weight.abs().max()) / 5)
    assert (dequantize(layer) - weight).square().mean() < 0.05


def test_prepared_and_general_calls_agree_bit_for_bit(
    rotated: nn.Sequential, generator: torch.Generator
) -> None:
    x = torch.randn(5, 64, generator=generator)
    with torch.no_grad():
        prepared = rotated(x)
        for layer in (rotated[0], rotated[2]):
            layer._prepared = None
        assert torch.equal(rotated(x), prepared)
        with pytest.raises(ValueError, match="must have 64"):
            rotated[0](x[:, :48])


def test_rotated_layers_compile_copy_and_move(rotated: nn.Sequential, generator: torch.Generator) -> None:
    x = torch.randn(5, 64, generator=generator)
    with torch.no_grad():
        expected = rotated(x)
        assert torch.equal(copy.deepcopy(rotated)(x), expected)
        assert torch.equal(pickle.loads(pickle.dumps(rotated))(x), expected)
        compiled = torch.compile(rotated, backend="eager", fullgraph=True)
        assert torch.equal(compiled(x), expected)
        half = copy.deepcopy(rotated).to(torch.bfloat16)
        torch.testing.assert_close(half(x.bfloat16()).float(), expected, rtol=0.1, atol=2.0)


def test_an_outlier_channel_costs_a_rotated_layer_less(generator: torch.Generator) -> None:
    weight, x = torch.randn(24, 64, generator=generator), torch.randn(50, 64, generator=generator)
    x[:, 3] *= 100
    errors = []
    for turn in (None, Rotation(64)):
        layer = layer_of(weight, turn, bits=8)
        part = replace(layer.parts[0], activation=QuantSpec(formats.parse("int4"), "token", online=True))
        layer = replace(layer, parts=(part,))
        error = rounded_input(x, layer) @ stored_values(layer).T - x @ weight.T
        errors.append(float(error.square().sum()))
    assert errors[1] < errors[0] / 2, errors


def test_saved_and_loaded_bit_for_bit_with_a_version_that_old_readers_refuse(
    rotated: nn.Sequential, model: nn.Sequential, tmp_path: Path, generator: torch.Generator
) -> None:
    x = torch.randn(5, 64, generator=generator)
    difloat.save(rotated, tmp_path / "a")
    config = json.loads((tmp_path / "a" / "config.json").read_text())["quantization_config"]
    assert config["version"] == 2
    assert config["layers"]["2"]["rotation"] == {"block": 16, "permuted": True, "seed": 2}
    assert all(finding.passed for finding in difloat.verify(tmp_path / "a"))
    loaded = difloat.load(tmp_path / "a", into=copy.deepcopy(model))
    with torch.no_grad():
        assert torch.equal(loaded(x), rotated(x))
    plain_model = copy.deepcopy(model)
    difloat.quantize(plain_model, "rtn", "w4a8", progress=False)
    difloat.save(plain_model, tmp_path / "b")
    assert json.loads((tmp_path / "b" / "config.json").read_text())["quantization_config"]["version"] == 1


def test_a_rotated_layer_in_a_file_of_version_1_is_refused(rotated: nn.Sequential, tmp_path: Path) -> None:
    difloat.save(rotated, tmp_path / "a")
    path = tmp_path / "a" / "config.json"
    path.write_text(path.read_text().replace('"version":2', '"version":1'))
    (tmp_path / "a" / "difloat.json").unlink()
    with pytest.raises(
        difloat.CheckpointError, match="a file of version 1 cannot have what came with version 2"
    ):
        difloat.load(tmp_path / "a", into=nn.Sequential(nn.Linear(64, 48), nn.SiLU(), nn.Linear(48, 64)))


def test_restored_layers_have_the_weight_turned_back(
    rotated: nn.Sequential, model: nn.Sequential, generator: torch.Generator
) -> None:
    layers = {
        name: module.plan() for name, module in rotated.named_modules() if isinstance(module, QuantLinear)
    }
    restored = difloat.restore(rotated)
    for name, layer in layers.items():
        assert torch.equal(restored.get_submodule(name).weight, dequantize(layer))
    x = torch.randn(5, 64, generator=generator)
    torch.testing.assert_close(restored(x), model(x), rtol=0.5, atol=60)


def test_a_change_of_the_weight_arrives_in_the_rotated_basis(generator: torch.Generator) -> None:
    weight = torch.randn(16, 32, generator=generator)
    layer = layer_of(weight, KINDS["permuted"], bits=8)
    change = torch.randn(16, 1, generator=generator) @ torch.randn(1, 32, generator=generator)
    found = add_to_weight(layer, change)
    assert found.layer.rotation == layer.rotation and found.share > 0.99
    torch.testing.assert_close(dequantize(found.layer), dequantize(layer) + change, rtol=0, atol=0.2)
    assert torch.equal(
        add_to_weight(layer, torch.zeros(16, 32)).layer.tensors["weight"], layer.tensors["weight"]
    )


def test_a_branch_reads_the_input_as_it_comes(generator: torch.Generator) -> None:
    weight = torch.randn(16, 32, generator=generator)
    bare = layer_of(weight)
    pair = {
        "side_down": torch.randn(3, 32, generator=generator).half(),
        "side_up": torch.randn(16, 3, generator=generator).half(),
    }
    layer = replace(bare, side=Side(3), tensors={**bare.tensors, **pair})
    x = torch.randn(4, 32, generator=generator)
    outs = []
    for one in (bare, layer):
        model = install.apply(nn.Sequential(nn.Linear(32, 16, bias=False)), plan_of({"0": one}))
        with torch.no_grad():
            outs.append(model(x))
    product = x @ pair["side_down"].float().T @ pair["side_up"].float().T
    torch.testing.assert_close(outs[1] - outs[0], product, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("rank", [0, 2])
def test_training_computes_and_packs_what_the_packed_layer_does(
    rank: int, generator: torch.Generator
) -> None:
    module = nn.Linear(64, 16)
    layer = layer_of(module.weight)
    twin = Adaptive(module, layer, adapters=1, rank=rank, entries=1, generator=generator)
    again = twin.packed([0])
    assert again.rotation == layer.rotation
    if not rank:
        assert torch.equal(again.tensors["weight"], layer.tensors["weight"])
    model = install.apply(nn.Sequential(copy.deepcopy(module)), plan_of({"0": again}))
    x = torch.randn(6, 64, generator=generator)
    with torch.no_grad():
        torch.testing.assert_close(twin(x), model(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"rotation": Rotation(64)}, "must divide the 96 input channels, got 64"),
        ({"smoothed": True}, "must be linear, of one part and not smoothed"),
        ({"rotation": None, "kind": "linear"}, ""),
    ],
)
def test_impossible_rotated_layers_are_refused(changes: dict, words: str) -> None:
    data = plain(LayerSpec("linear", (8, 96), (Part(96, QuantSpec(formats.parse("int4"))),)))
    data |= {"rotation": {"block": 32}}
    assert read(LayerSpec, data).rotation == Rotation(32)
    changed = {**data, **{k: plain(v) if isinstance(v, Rotation) else v for k, v in changes.items()}}
    with pytest.raises(ValueError, match=words or "must be left out"):
        read(LayerSpec, changed)


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"block": 12}, "must be a power of two, got 12"),
        ({"block": 8, "regular": True}, "must be a power of four where it is regular, got 8"),
        ({"block": 16, "regular": True, "seed": 1}, "must have neither seed nor permutation"),
        ({"block": 1}, "block of a rotation"),
        ({"block": 16, "seed": -1}, "seed of a rotation"),
    ],
)
def test_impossible_rotations_are_refused(fields: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        read(Rotation, fields)


def test_blocks_are_the_largest_power_of_two_that_divides_the_channels() -> None:
    assert block_rotation((8, 4608)) == Rotation(256)
    assert block_rotation((8, 1152)) == Rotation(128)
    assert block_rotation((8, 96), most=16) == Rotation(16)
    assert block_rotation((8, 72)) is None and block_rotation((8, 64, 1, 1)) is None


@pytest.mark.parametrize(
    "recipe, options", [("auto", {"rotate": "all", "widths": "same"}), ("orbitquant", {})]
)
def test_recipes_rotate_every_linear_layer_and_keep_the_output(recipe: str, options: dict) -> None:
    pipeline = tiny.tiny_pixart()
    task = replace(
        api.task_of(pipeline, tiny_calibration(pipeline), recipes.Bits.parse("w4a8")), progress=False
    )
    plan = recipes.plan(task, recipe, "w4a8", {**options, "keep_8bit": ()})
    linear = [layer for layer in plan.layers.values() if layer.kind == "linear"]
    assert linear and all(
        (layer.rotation is None) == (block_rotation(layer.shape) is None) for layer in linear
    )
    assert any(layer.rotation is not None for layer in linear)
    for name, layer in plan.layers.items():
        weight = task.model.get_submodule(name).weight.detach()
        assert (dequantize(layer) - weight).square().sum() < 0.3 * weight.square().sum(), name


def test_auto_rotates_only_where_the_layer_gets_better() -> None:
    pipeline = tiny.tiny_pixart()
    data = tiny_calibration(pipeline)
    task = replace(api.task_of(pipeline, data, recipes.Bits.parse("w4a4")), progress=False)
    plan = recipes.plan(task, "auto", "w4a4", {"rotate": "chosen", "widths": "same"})
    shares = plan.measured["rotations"]
    assert shares
    for name, share in shares.items():
        assert (plan.layers[name].rotation is not None) == (share < 1), name


def tiny_calibration(pipeline):
    return api.calibrate(
        pipeline, prompts=tiny.PROMPTS[:4], samples=8, steps=3, guidance_scale=3.0, progress=False
    )
