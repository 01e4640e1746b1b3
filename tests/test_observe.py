"""Looking into models: order, concatenations, block inputs and outputs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from difloat.layers import blocks, quantizable
from difloat.methods import observe
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


def call(rows: int = 2) -> observe.Call:
    return (torch.randn(rows, 3, 4), torch.arange(rows).float()), {}


def test_trace_finds_order_edges_and_concatenations_through_norms() -> None:
    seen = observe.trace(LongSkip(), call())
    assert seen.order == ["head", "time", "middle", "tail"]
    assert seen.splits == {"tail": (6, 4)}
    assert seen.first == ["head"] and seen.last == "tail"


def test_a_concatenation_added_to_another_result_is_none() -> None:
    class Summed(LongSkip):
        def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
            h = self.head(x)
            both = torch.cat([h, self.middle(h)], dim=-1)
            return self.tail(both * 2 if self.apart else both + self.full(x))

    model = Summed()
    model.full, model.apart = nn.Linear(4, 10), False
    assert observe.trace(model, call()).splits == {}
    model.apart = True
    assert observe.trace(model, call()).splits == {"tail": (6, 4)}


def test_trace_of_real_models() -> None:
    unet = tiny_unet().unet
    sample = torch.randn(2, unet.config.in_channels, 8, 8)
    text = torch.randn(2, 5, unet.config.cross_attention_dim)
    seen = observe.trace(unet, ((sample, torch.tensor([3, 7]), text), {}))
    assert set(seen.order) == set(quantizable(unet))
    assert seen.first == ["conv_in"] and seen.last == "conv_out"
    assert all(name.startswith("up_blocks") for name in seen.splits) and len(seen.splits) == 8
    for name, pieces in seen.splits.items():
        assert sum(pieces) == unet.get_submodule(name).in_channels


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
    args, kwargs = observe.inputs_of(model, block, calls)
    target = observe.outputs_of(model, [block], calls)[block]
    with torch.no_grad():
        output = observe.tensors_of(model.get_submodule(block)(*args, **kwargs))
    assert output[0].shape[0] == 6
    assert torch.allclose(output[0], target[0], atol=1e-5)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_select_takes_rows_of_batched_arguments_only() -> None:
    shared = torch.arange(5.0)
    args, kwargs = observe.select(
        ((torch.arange(6.0).reshape(3, 2),), {"x": shared, "n": None}), 3, torch.tensor([2])
    )
    assert args[0].tolist() == [[4.0, 5.0]] and kwargs["x"] is shared and kwargs["n"] is None


def test_a_position_table_as_long_as_the_batch_is_shared() -> None:
    def call(start: float) -> observe.Call:
        rows = torch.arange(start, start + 3)[:, None]
        return (), {"hidden_states": rows, "image_rotary_emb": (torch.arange(3.0), torch.ones(3, 2))}

    merged = observe.merge([call(0.0), call(3.0)], [3, 3])
    assert merged[1]["hidden_states"].flatten().tolist() == [0, 1, 2, 3, 4, 5]
    assert merged[1]["image_rotary_emb"][0].tolist() == [0, 1, 2]
    _, picked = observe.select(call(0.0), 3, torch.tensor([2, 0]))
    assert picked["hidden_states"].flatten().tolist() == [2, 0]
    assert picked["image_rotary_emb"][0].tolist() == [0, 1, 2]


def test_a_block_that_is_not_reached_is_named() -> None:
    with pytest.raises(ValueError, match="'unused'"):
        observe.inputs_of(LongSkip(), "unused", [call()])
