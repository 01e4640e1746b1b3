"""Looking into models: order, concatenations, block inputs and outputs."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from diffusers.models.attention import FeedForward
from torch import Tensor, nn

from difloat.layers.packed import blocks, quantizable
from difloat.methods import trace
from difloat.methods.paused_forwards import Passes
from tiny import tiny_pixart, tiny_unet


class LongSkip(nn.Module):
    """A transformer-like net whose last block reads a concatenation along its last axis, in an unusual order."""

    def __init__(self) -> None:
        super().__init__()
        self.tail = nn.Linear(10, 4)
        self.unused = nn.Linear(4, 4)
        self.time = nn.Linear(4, 6)
        self.head = nn.Linear(4, 6)
        self.middle = nn.Linear(6, 4)
        self.norm = nn.LayerNorm(10)

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        emb = torch.cat(
            [timestep[:, None].cos(), timestep[:, None].sin()] * 2, dim=-1
        )  # no skip concatenation
        h = self.head(x) + self.time(emb)[:, None]
        both = torch.cat([h, self.middle(h)], dim=-1)
        return self.tail(nn.functional.silu(self.norm(both)) * 1.5)


def call(rows: int = 2) -> trace.Call:
    return (torch.randn(rows, 3, 4), torch.arange(rows).float()), {}


def test_trace_finds_order_edges_and_concatenations_through_norms() -> None:
    seen = trace.trace(LongSkip(), call())
    assert seen.order == ["head", "time", "middle", "tail"]
    assert seen.splits == {"tail": (6, 4)}
    assert seen.first == ["head"] and seen.last == "tail"


class Edges(nn.Module):
    """A denoiser whose edges are not the first and the last layer that it calls."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        for name in ("gate", "time", "embed", "middle", "head", "extra"):
            setattr(self, name, nn.Linear(4, 4))

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        waves = torch.stack([timestep.cos(), timestep.sin(), timestep, timestep], dim=-1).to(x)
        time = self.time(waves)[:, None]
        if self.how == "concatenated":
            x = torch.cat([x, time.expand_as(x)], dim=-1)[..., 2:6]
        elif self.how == "residual":
            x = x + self.middle(x)
        h = self.embed((x + time) * 2 if self.how == "added" else x)
        h = self.middle(nn.functional.silu(h) + x)
        out = self.head(h)
        other = self.extra(h)  # called after the head, and no part of the prediction
        if self.how == "gated":
            return out * self.gate(waves)[:, None]
        if self.how == "in place":
            canvas = torch.zeros_like(x)
            canvas[..., :4] = out
            return canvas
        return out, other


@pytest.mark.parametrize(
    "how, first",
    [
        ("added", ["embed"]),
        ("concatenated", ["embed"]),
        ("residual", ["middle"]),
        ("gated", ["embed"]),
        ("in place", ["embed"]),
    ],
)
def test_first_and_last_are_where_the_sample_comes_in_and_the_prediction_goes_out(
    how: str, first: list[str]
) -> None:
    seen = trace.trace(Edges(how), call())
    assert seen.first == first and seen.last == "head"
    assert seen.order[-1] != "head"


def test_the_last_layer_may_be_one_that_was_called_before() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shared, self.between = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
            return self.shared(self.between(self.shared(x)))

    seen = trace.trace(Twice(), call())
    assert (seen.order, seen.first, seen.last) == (["shared", "between"], ["shared"], "shared")


def test_a_concatenation_added_to_another_result_is_none() -> None:
    class Summed(LongSkip):
        def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
            h = self.head(x)
            both = torch.cat([h, self.middle(h)], dim=-1)
            return self.tail(both * 2 if self.apart else both + self.full(x))

    model = Summed()
    model.full, model.apart = nn.Linear(4, 10), False
    assert trace.trace(model, call()).splits == {}
    model.apart = True
    assert trace.trace(model, call()).splits == {"tail": (6, 4)}


def test_trace_of_real_models() -> None:
    unet = tiny_unet().unet
    sample = torch.randn(2, unet.config.in_channels, 8, 8)
    text = torch.randn(2, 5, unet.config.cross_attention_dim)
    seen = trace.trace(unet, ((sample, torch.tensor([3, 7]), text), {}))
    assert set(seen.order) == set(quantizable(unet))
    assert seen.first == ["conv_in"] and seen.last == "conv_out"
    assert all(name.startswith("up_blocks") for name in seen.splits) and len(seen.splits) == 8
    for name, pieces in seen.splits.items():
        assert sum(pieces) == unet.get_submodule(name).in_channels
    gated = [
        name for name in seen.order if name.endswith("ff.net.0.proj")
    ]  # GEGLU: half of the output is the gate
    assert gated and seen.before_gelu == gated
    assert set(seen.attention) == {n for n, _ in unet.named_modules() if n.endswith(("attn1", "attn2"))}


def test_trace_of_a_transformer_finds_gelu_and_attention() -> None:
    model = tiny_pixart().transformer.eval()
    size = model.config.sample_size
    call = (
        (torch.randn(2, model.config.in_channels, size, size),),
        {
            "encoder_hidden_states": torch.randn(2, 4, model.config.caption_channels),
            "timestep": torch.tensor([1, 2]),
            "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
        },
    )
    seen = trace.trace(model, call)
    blocks_of_model = [f"transformer_blocks.{number}" for number in range(model.config.num_layers)]
    assert set(seen.before_gelu) == {"caption_projection.linear_1"} | {
        f"{block}.ff.net.0.proj" for block in blocks_of_model
    }
    assert seen.attention == [f"{block}.attn{number}" for block in blocks_of_model for number in (1, 2)]
    tokens, wide = (size // model.config.patch_size) ** 2, model.get_submodule(seen.before_gelu[-1])
    assert seen.row_bytes == tokens * (wide.in_features + wide.out_features) * 4


def tanh_gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0))))


def gated(x: Tensor) -> Tensor:
    h, gate = x.chunk(2, dim=-1)
    return torch.cat([h * (gate * torch.sigmoid(1.702 * gate)), h], -1)


GELUS = {
    "torch": nn.functional.gelu,
    "torch, tanh": nn.GELU(approximate="tanh"),
    "sigmoid": lambda x: x * torch.sigmoid(1.702 * x),
    "sigmoid, the other way round": lambda x: torch.sigmoid(x * 1.702) * x,
    "tanh": tanh_gelu,
    "error function": lambda x: x * 0.5 * (1.0 + torch.erf(x / math.sqrt(2.0))),
    "of a gate": gated,
}
OTHERS = {
    "silu": nn.functional.silu,
    "silu written out": lambda x: x * torch.sigmoid(x),
    "square": lambda x: x * x,
    "half": lambda x: x * 0.5,
    "gate of another kind": lambda x: x * torch.tanh(x),
    "relu": nn.functional.relu,
}


class Feeding(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.one, self.two, self.function = nn.Linear(8, 16), nn.Linear(16, 8), function

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        return self.two(self.function(self.one(x)))


@pytest.mark.parametrize("size", [0.01, 1.0, 30.0])
@pytest.mark.parametrize("name", [*GELUS, *OTHERS])
def test_a_gelu_is_known_by_what_it_computes(name: str, size: float) -> None:
    torch.manual_seed(0)
    model = Feeding({**GELUS, **OTHERS}[name])
    seen = trace.trace(model, ((size * torch.randn(2, 5, 8), torch.tensor([1, 2])), {}))
    assert seen.before_gelu == (["one"] if name in GELUS else [])


@pytest.mark.parametrize(
    "kind", ["gelu", "gelu-approximate", "geglu", "geglu-approximate", "swiglu", "linear-silu"]
)
def test_feed_forward_layers_of_diffusers(kind: str) -> None:
    torch.manual_seed(0)
    model = Feeding(nn.Identity())
    model.one, model.two = FeedForward(8, activation_fn=kind), nn.Identity()
    seen = trace.trace(model, ((torch.randn(2, 5, 8), torch.tensor([1, 2])), {}))
    assert seen.before_gelu == (["one.net.0.proj"] if "gelu" in kind or "geglu" in kind else [])


def test_inputs_and_outputs_of_a_block_reproduce_it() -> None:
    model = tiny_pixart().transformer.eval()
    block = next(name for name in blocks(model) if name.startswith("transformer_blocks"))
    size = model.config.sample_size
    calls = []
    for seed in range(2):
        g = torch.Generator().manual_seed(seed)
        x = torch.randn(3, model.config.in_channels, size, size, generator=g)
        text = torch.randn(3, 4, model.config.caption_channels, generator=g)
        conditions = {"resolution": None, "aspect_ratio": None}
        calls.append(
            (
                (x,),
                {
                    "encoder_hidden_states": text,
                    "timestep": torch.tensor([1, 2, 3]),
                    "added_cond_kwargs": conditions,
                },
            )
        )
    with Passes(model, calls) as passes:
        args, kwargs = passes.enter(block)
        target = passes.leave(block)
    with torch.no_grad():
        output = trace.tensors_of(model.get_submodule(block)(*args, **kwargs))
    assert output[0].shape[0] == 6
    assert torch.allclose(output[0], target[0], atol=1e-5)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_select_takes_rows_of_batched_arguments_only() -> None:
    shared = torch.arange(5.0)
    args, kwargs = trace.select(
        ((torch.arange(6.0).reshape(3, 2),), {"x": shared, "n": None}), 3, torch.tensor([2])
    )
    assert args[0].tolist() == [[4.0, 5.0]] and kwargs["x"] is shared and kwargs["n"] is None


def test_token_ranges_are_quantiles_over_tokens_by_timestep() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.conv = nn.Linear(3, 3), nn.Conv2d(3, 3, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.conv(self.linear(x).transpose(1, 2)[..., None] * 0 + x.transpose(1, 2)[..., None])

    calls = {float(t): ((t * torch.tensor([[[1.0, -2, 0], [0, 0, 4], [-8, 1, 1]]]),), {}) for t in (1, 10)}
    found = trace.token_ranges(Two(), ["linear", "conv"], calls)
    for name in ("linear", "conv"):
        assert found[name][1.0] == pytest.approx([2.0, 2.4, 4.0, 7.2, 8.0])
        assert found[name][10.0] == pytest.approx([20.0, 24.0, 40.0, 72.0, 80.0])
    assert trace.channel_maxima(Two(), ["linear", "conv"], list(calls.values()))["conv"].tolist() == [
        80,
        20,
        40,
    ]


def test_a_position_table_as_long_as_the_batch_is_shared() -> None:
    def call(start: float) -> trace.Call:
        rows = torch.arange(start, start + 3)[:, None]
        return (), {"hidden_states": rows, "image_rotary_emb": (torch.arange(3.0), torch.ones(3, 2))}

    merged = trace.merge([call(0.0), call(3.0)], [3, 3])
    assert merged[1]["hidden_states"].flatten().tolist() == [0, 1, 2, 3, 4, 5]
    assert merged[1]["image_rotary_emb"][0].tolist() == [0, 1, 2]
    _, picked = trace.select(call(0.0), 3, torch.tensor([2, 0]))
    assert picked["hidden_states"].flatten().tolist() == [2, 0]
    assert picked["image_rotary_emb"][0].tolist() == [0, 1, 2]
