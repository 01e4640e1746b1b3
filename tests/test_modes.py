"""The caller's modes of torch do not matter: the plan is that of a plain call, and what was made can be trained."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, contextmanager

import pytest
import torch
from torch import Tensor, nn

import difloat
from difloat import api, torch_modes
from difloat.layers import install, packed
from difloat.numbers import formats
from difloat.plan.add_delta import add_to_weight
from difloat.plan.encode import plan_layer
from difloat.plan.plan import Plan
from difloat.plan.specs import Part, QuantSpec
from tiny import tiny_pixart

RECIPES: dict[str, tuple[str, dict[str, object]]] = {
    "rtn": ("w4a8", {}),
    "lbfp": ("w4a8", {"iterations": 3, "rounding_rows": 4}),
    "guided": (
        "w3a6",
        {"iterations": 2, "rounding_rows": 4, "epochs": 1, "rank": 2, "rows": 2, "factor_power": 0},
    ),
}
# Few layers, so that a plan takes a second: one block's attention and the last layer.
LEFT_OUT = ["transformer_blocks.1", "*.ff.*", "*.attn2.*", "pos_embed", "adaln_single", "caption_projection"]


@contextmanager
def deterministic():
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def all_at_once() -> AbstractContextManager[object]:
    stack = ExitStack()
    stack.enter_context(torch.inference_mode())
    stack.enter_context(torch.autocast("cpu", torch.bfloat16))
    return stack


MODES: dict[str, Callable[[], AbstractContextManager[object]]] = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "enable_grad": torch.enable_grad,
    "deterministic": deterministic,
    "all at once": all_at_once,
}


def denoiser() -> nn.Module:
    return tiny_pixart().transformer


def loop(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(3)
    sample = torch.randn(2, 4, 8, 8, generator=generator)
    text = torch.randn(2, 5, 16, generator=generator)
    for timestep in (900, 300):
        sample -= 0.1 * model(sample, text, torch.full((2,), timestep), return_dict=False)[0][:, :4]


def planned(model: nn.Module, recipe: str) -> Plan:
    bits, options = RECIPES[recipe]
    return difloat.plan(
        model, recipe, bits, forward_loop=loop, samples=4, progress=False, exclude=LEFT_OUT, **options
    )


@functools.cache
def plain_plan(recipe: str) -> Plan:
    return planned(denoiser(), recipe)


def assert_same(plan: Plan, expected: Plan) -> None:
    assert list(plan.layers) == list(expected.layers) and plan.skipped == expected.skipped
    for name, layer in plan.layers.items():
        assert layer.parts == expected.layers[name].parts
        for key, tensor in layer.tensors.items():
            assert torch.equal(tensor, expected.layers[name].tensors[key]), (name, key)
            assert not tensor.is_inference()


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("mode", MODES)
def test_a_plan_is_that_of_a_plain_call(recipe: str, mode: str) -> None:
    model = denoiser()
    with MODES[mode]():
        plan = planned(model, recipe)
        assert torch.is_inference_mode_enabled() == (mode in ("inference_mode", "all at once"))
        assert torch.is_autocast_enabled("cpu") == (mode in ("autocast", "all at once"))
    assert_same(plan, plain_plan(recipe))


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_model_made_in_inference_mode_gives_the_same_plan_and_can_be_trained(recipe: str) -> None:
    with torch.inference_mode():
        model = denoiser()
        plan = planned(model, recipe)
        difloat.apply(model, plan)
    assert_same(plan, plain_plan(recipe))
    for module in model.modules():
        if isinstance(module, packed.QuantizedLayer):
            own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
            assert not any(tensor.is_inference() for tensor in own)


@pytest.mark.parametrize("make", ["apply", "quantize", "load"])
def test_weights_made_in_inference_mode_can_be_trained(make: str, tmp_path) -> None:
    model = denoiser()
    expected = install.apply(denoiser(), plain_plan("lbfp"))
    with torch.inference_mode():
        if make == "quantize":
            bits, options = RECIPES["lbfp"]
            difloat.quantize(
                model, "lbfp", bits, forward_loop=loop, samples=4, progress=False, exclude=LEFT_OUT, **options
            )
        else:
            difloat.apply(model, plain_plan("lbfp"))
        if make == "load":
            model = difloat.load(difloat.save(model, tmp_path / "saved"))
    gradients = []
    for each in (model, expected):
        sample = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1)).requires_grad_()
        text = torch.ones(2, 5, 16)
        each(sample, text, torch.full((2,), 300), return_dict=False)[0].sum().backward()
        gradients.append(sample.grad)
    assert torch.equal(*gradients)


def test_a_pipeline_in_inference_mode_and_autocast() -> None:
    plans = []
    for mode in (torch.enable_grad, all_at_once):
        pipeline = tiny_pixart()
        with mode():
            plan = difloat.plan(
                pipeline,
                "rtn",
                "w8a8",
                prompts=["a red cat"],
                samples=2,
                steps=2,
                prompts_per_batch=1,
                progress=False,
                exclude=LEFT_OUT,
                components=["transformer", "text_encoder"],
                call_kwargs={"use_resolution_binning": False},
            )
        plans.append(plan)
    assert_same(*plans)
    assert_same(*(plan.components["text_encoder"] for plan in plans))


def test_restoring_merging_and_components_under_autocast_are_exact() -> None:
    generator = torch.Generator().manual_seed(0)
    weight, change = (torch.randn(8, 16, generator=generator) for _ in range(2))
    part = Part(16, QuantSpec(formats.parse("e2m1"), "channel"), None)
    layer = plan_layer(weight, [part], [weight.abs().amax(1) / 6])
    model = nn.Sequential(nn.Linear(16, 8))
    results = []
    for mode in (torch.enable_grad, all_at_once):
        with mode():
            twin = install.apply(install.shadow(model), Plan("own", "w4a16", {"0": layer}))
            changed = add_to_weight(layer, change).layer
            results.append([install.restore(twin)[0].weight, *changed.tensors.values()])
    for expected, got in zip(*results, strict=True):
        assert torch.equal(expected, got) and not got.is_inference()


def test_a_forward_without_gradients_is_named() -> None:
    class Sealed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), Without()) for _ in range(2))

        def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
            for block in self.blocks:
                sample = block(sample)
            return sample

    class Without(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(8, 8)

        @torch.no_grad()
        def forward(self, sample: Tensor) -> Tensor:
            return self.inner(sample)

    def short(model: nn.Module) -> None:
        model(torch.randn(4, 8), torch.ones(4))

    for name, options in (("lbfp", {"iterations": 2}), ("efficientdm", {"epochs": 1, "rows": 2})):
        with pytest.raises(ValueError, match="forward must let gradients pass"):
            difloat.plan(Sealed(), name, "w4a8", forward_loop=short, samples=4, progress=False, **options)


@pytest.mark.parametrize(
    ("change", "back", "words"),
    [
        (
            lambda: torch.set_default_dtype(torch.float64),
            lambda: torch.set_default_dtype(torch.float32),
            r"got torch.float64 on cpu",
        ),
        (
            lambda: torch.set_default_device("meta"),
            lambda: torch.set_default_device(None),
            r"got torch.float32 on meta",
        ),
    ],
)
def test_other_defaults_are_refused_before_the_first_call(change, back, words) -> None:
    calls: list[int] = []
    model = denoiser()
    change()
    try:
        with pytest.raises(ValueError, match=words):
            difloat.plan(model, "rtn", "w8a8", forward_loop=lambda m: calls.append(1), progress=False)
    finally:
        back()
    assert not calls


def test_plain_is_plain_inside_and_undone_outside() -> None:
    with all_at_once():
        with torch_modes.plain():
            assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
            assert not torch.is_autocast_enabled("cpu")
        assert torch.is_inference_mode_enabled() and torch.is_autocast_enabled("cpu")
        made = torch.ones(2)
        assert made.is_inference() and not torch_modes.normal(made).is_inference()
    kept = torch.ones(2)
    assert torch_modes.normal(kept) is kept
    assert api.task_of(model := denoiser(), None, None).model is model  # no copy where none is needed
