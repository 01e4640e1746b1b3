"""What models do with weights besides calling their layers: each way is found in the code, and found again without it.

Every class here must compute what its decoded weights compute once it is quantized, whatever had to stay float for that.
"""

from __future__ import annotations

import copy
import textwrap
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import difloat
from difloat.layers import dtype_readers, install, packed
from difloat.layers.code_readers import Use
from difloat.methods import readers, structure, trace
from difloat.plan.encode import dequantize


class Reader(nn.Module):
    """Two layers that are called, and something done with their weights that `READERS` says."""

    def __init__(self) -> None:
        super().__init__()
        self.embedder = nn.Sequential(nn.Linear(8, 8), nn.SiLU(), nn.Linear(8, 8))
        self.out = nn.Linear(8, 8)


READERS: dict[str, tuple[str, dict[str, Use]]] = {
    "first parameter": (
        """
        def forward(self, x):
            return self.out(self.embedder(x.to(next(iter(self.embedder.parameters())).dtype)))
        """,
        {"embedder.0": "dtype"},
    ),
    "first parameter unless int8": (
        """
        def forward(self, x):
            dtype = next(self.embedder.parameters()).dtype
            if x.dtype != dtype and dtype != torch.int8:
                x = x.to(dtype)
            return self.out(self.embedder(x))
        """,
        {"embedder.0": "dtype unless int8"},
    ),
    "a dtype that is asked for int8, and used again": (
        """
        def forward(self, x):
            dtype = next(self.embedder.parameters()).dtype
            if x.dtype != dtype and dtype != torch.int8:
                x = x.to(dtype)
            gate = torch.full((1,), 0.25).to(dtype)
            return self.out(self.embedder(x)) * gate
        """,
        {"embedder.0": "dtype"},
    ),
    "entry of a container": (
        """
        def forward(self, x):
            weight = self.embedder[2].weight
            return self.out(self.embedder(x)).to(weight.dtype)
        """,
        {"embedder.2": "dtype"},
    ),
    "asked whether it is floating point": (
        """
        def forward(self, x):
            dtype = self.embedder[0].weight.dtype
            if dtype.is_floating_point:
                x = x.to(dtype)
            return self.out(self.embedder(x))
        """,
        {},
    ),
    "cast to the weight": (
        """
        def forward(self, x):
            return self.out(self.embedder(x.to(self.embedder[0].weight)))
        """,
        {"embedder.0": "values"},
    ),
    "used in a product": (
        """
        def forward(self, x):
            return F.linear(self.embedder(x), self.out.weight.float(), self.out.bias)
        """,
        {"out": "values"},
    ),
    "joined": (
        """
        def forward(self, x):
            joined = torch.cat([layer.weight for layer in (self.out, self.embedder[2])])
            return F.linear(self.embedder[0](x), joined)
        """,
        {"out": "values", "embedder.2": "values"},
    ),
    "in a method": (
        """
        @property
        def kind(self):
            return self.out.weight.dtype

        def embed(self, x):
            return self.embedder(x.to(self.kind))

        def forward(self, x):
            return self.out(self.embed(x))
        """,
        {"out": "dtype"},
    ),
    "in a function": (
        """
        def forward(self, x):
            return self.out(self.embedder(x.to(kind_of(self.out))))
        """,
        {"out": "dtype"},
    ),
    "in a loop": (
        """
        def forward(self, x):
            for number, layer in enumerate(self.embedder):
                if number != 1:
                    x = x.to(layer.weight.dtype)
                x = layer(x)
            return self.out(x)
        """,
        {"embedder.0": "dtype", "embedder.2": "dtype"},
    ),
    "not at all": (
        """
        def fuse(self):
            return torch.cat([self.out.weight.data, self.embedder[0].weight.data])

        def forward(self, x):
            return self.out(self.embedder(x.to(self.out.weight.device)))
        """,
        {},
    ),
}
PRELUDE = """
import torch
import torch.nn.functional as F
def kind_of(layer):
    return layer.weight.dtype
"""


def reader(code: str, path: Any = None) -> Reader:
    """A model whose class has this code, in a file where there is a path."""
    source = PRELUDE + "class Made(Base):\n" + textwrap.indent(textwrap.dedent(code), "    ")
    names: dict[str, Any] = {"Base": Reader, "__name__": "made_by_a_test"}
    if path is not None:
        path.write_text(source, encoding="utf-8")
    exec(compile(source, str(path or "<typed>"), "exec"), names)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return names["Made"]()


def loop(model: nn.Module) -> None:
    for _ in range(3):
        model(torch.randn(2, 8))


def agrees(model: nn.Module, plan: difloat.Plan) -> bool:
    """Whether the quantized model computes what its codes stand for."""
    twin, x = copy.deepcopy(model), torch.randn(2, 8)
    with torch.no_grad():
        for name, layer in plan.layers.items():
            packed.weight_of(twin, name).copy_(dequantize(layer))
        install.apply(model, plan)
        return bool(torch.allclose(model(x), twin(x), rtol=1e-4, atol=1e-5))


@pytest.mark.parametrize("name", READERS)
def test_what_code_does_with_weights_is_found_in_it(name: str, tmp_path) -> None:
    code, expected = READERS[name]
    model = reader(code, tmp_path / "made.py")
    names = [*packed.quantizable(model), *dtype_readers.kept(model)]
    assert {name: use for name in names if (use := dtype_readers.use_of(model, name))} == expected
    stay = {
        name: dtype_readers.REASONS[use] for name, use in expected.items() if use in dtype_readers.REASONS
    }
    assert dtype_readers.kept(model) == stay and not stay.keys() & packed.quantizable(model).keys()
    plan = difloat.plan(model, "rtn", "w8a16", forward_loop=loop, samples=4, progress=False)
    assert plan.skipped == stay
    assert agrees(model, plan)


@pytest.mark.parametrize("name", READERS)
def test_a_class_without_source_is_seen_through_by_running_it(name: str) -> None:
    code, expected = READERS[name]
    model = reader(code)
    assert not dtype_readers.kept(model)  # there is no code to look at
    plan = difloat.plan(model, "lbfp", "w8a16", forward_loop=loop, samples=4, progress=False)
    assert plan.skipped.keys() <= expected.keys()
    assert {name for name, use in expected.items() if use == "values"} <= plan.skipped.keys()
    assert agrees(model, plan)


def test_a_class_without_source_is_left_alone_where_nothing_is_run() -> None:
    model = nn.Sequential(reader(READERS["in a loop"][0]), nn.Linear(8, 8))
    plan = difloat.plan(model, "rtn", "w8a8", progress=False)
    assert plan.layers.keys() == {"1"}
    assert {reason for name, reason in plan.skipped.items() if name.startswith("0.")} == {structure.UNREAD}


def test_a_processor_that_is_handed_its_module_is_looked_into() -> None:
    from diffusers.models.attention_processor import Attention, CustomDiffusionAttnProcessor

    model = nn.Sequential(Attention(8, heads=2, dim_head=4))
    assert not dtype_readers.kept(model)
    model[0].set_processor(CustomDiffusionAttnProcessor(False, True, 8, 8))
    assert dtype_readers.kept(model).keys() == {"0.to_q"}


def test_layers_of_torch_that_read_weights_stay_float() -> None:
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    assert dtype_readers.kept(model).keys() >= {"linear1", "linear2"} and not packed.quantizable(model)


def test_a_call_is_watched_without_a_trace_of_it(monkeypatch) -> None:
    model = reader(READERS["joined"][0])
    seen = trace.trace(model, ((torch.randn(2, 8),), {}))
    assert seen.uses == {"out": "values", "embedder.2": "values"} and seen.order == ["embedder.0"]
    assert all(not module._forward_pre_hooks and not module._forward_hooks for module in model.modules())
    calls: list[int] = []
    run: Callable[[], Tensor] = lambda: calls.append(1) or model(torch.ones(2, 8))  # noqa: E731
    assert readers.kept(model, run, {}) == {} and not calls
    readers.kept(model, run, {"out": "dtype"})
    assert len(calls) == 2  # as it is, and as it would be


class Named(nn.Module):
    """Calls its layer by the name of the argument, as motion modules of AnimateDiff do."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.out = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(input=self.inner(input=x).relu())


@pytest.mark.parametrize(
    "recipe", [{"recipe": "rtn"}, {"recipe": "lbfp", "iterations": 4, "rounding_rows": 4}]
)
def test_layers_may_be_given_their_input_by_its_name(recipe: dict[str, Any]) -> None:
    model = Named()
    plan = difloat.quantize(model, bits="w4a8", forward_loop=loop, samples=4, progress=False, **recipe)
    assert plan.layers.keys() == {"inner", "out"} and model(torch.ones(2, 8)).isfinite().all()
