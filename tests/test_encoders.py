"""torch's encoders and attention around quantized layers: their fused kernels take weights without asking the layers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import difloat


class Denoiser(nn.Module):
    """Tokens through torch's own transformer modules."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 32)
        layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.attention = nn.MultiheadAttention(32, 4, batch_first=True)
        self.last = nn.Linear(32, 8)

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        h = self.encoder(self.first(x) + timestep[:, None, None] / 1000)
        return self.last(h + self.attention(h, h, h)[0])


@pytest.fixture
def model() -> Denoiser:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Denoiser().eval()


def loop(module: nn.Module) -> None:
    generator = torch.Generator().manual_seed(1)
    for timestep in (900.0, 500.0, 100.0):
        module(torch.randn(2, 5, 8, generator=generator), torch.full((2,), timestep))


@pytest.mark.parametrize("gradients", [False, True])
def test_what_fused_kernels_read_stays_float_and_says_so(gradients: bool, model: Denoiser) -> None:
    x, timestep = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(2)), torch.full((2,), 500.0)
    before = model(x, timestep)
    plan = difloat.quantize(model, "rtn", "w8a8", forward_loop=loop, samples=6, progress=False)
    assert plan.layers.keys() == {"first", "last"}
    linears = {f"encoder.layers.{block}.linear{n}" for block in (0, 1) for n in (1, 2)}
    assert {"attention", "attention.out_proj", "encoder.layers.0.self_attn", *linears} <= plan.skipped.keys()
    assert all("without calling" in plan.skipped[name] for name in linears)
    with torch.set_grad_enabled(gradients):
        after = model(x, timestep)
    assert 0 < (after - before).norm() < 0.05 * before.norm()
