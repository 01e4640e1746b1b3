"""Random layers, inputs and masks on the native library: shapes ragged and empty, any stride, width and granularity.

Slow, and meant to run once under AddressSanitizer as well (docs/kernels.md says how): torch's allocations are watched too, so a
byte read beside a tensor is found.
"""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from difloat.kernels import attention, dispatch, native_int8, native_library, reference
from difloat.kernels.geometry import Geometry
from difloat.numbers.formats import parse
from difloat.plan.encode import plan_layer
from difloat.plan.specs import Part, QuantSpec
from test_backends import stored

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(native_library.unit() is None, reason="no unit of the native library here"),
]
WEIGHTS = [
    "e2m1",
    "e3m0",
    "e1m2",
    "e2m3",
    "e1m6",
    "uint1",
    "uint4",
    "uint8",
    *(f"int{n}" for n in range(2, 9)),
]
INPUTS = ["e2m1", "e3m0", "e2m3", "int8", "int4", "e1m2"]
STATIC = [*INPUTS, "uint8", "ue2m2", "ue3m1"]
ROUNDS = 400


def random_part(rng: random.Random, channels: int) -> Part:
    group = rng.choice([None, None, rng.choice([16, 32, 64, 128])])
    granularity = "group" if group else rng.choice(["tensor", "channel"])
    weight = QuantSpec(parse(rng.choice(WEIGHTS)), granularity, group, zero_point=rng.random() < 0.3)
    if rng.random() < 0.3:
        unsigned = rng.random() < 0.5
        format = parse(rng.choice(["uint4", "uint3", "ue2m2"] if unsigned else ["int4", "e2m1", "int8"]))
        own = rng.choice([None, 16, 32, group or 64])
        zero = unsigned or own is None or rng.random() < 0.5
        activation = QuantSpec(format, "group" if own else "token", own, online=True, zero_point=zero)
    elif rng.random() < 0.6:
        activation = QuantSpec(parse(rng.choice(INPUTS)), rng.choice(["token", "tensor"]), online=True)
    else:
        activation = QuantSpec(parse(rng.choice(STATIC)), zero_point=rng.random() < 0.5)
    return Part(channels, weight, activation)


def random_layer(rng: random.Random, shape: tuple[int, ...], part: Part) -> list[Tensor | None]:
    spec, activation = part.weight, part.activation
    count = spec.scale_count(*shape[:2])
    layer = plan_layer(
        torch.randn(shape),
        [part],
        [torch.rand(count) + 0.1],
        weight_zero_points=[torch.randn(count)] if spec.zero_point else None,
        input_scales=[] if activation.online else [torch.tensor([rng.uniform(0.01, 0.3)])],
        input_zero_points=[torch.tensor([rng.uniform(-1, 0.5)])]
        if activation.zero_point and not activation.online
        else [],
    )
    names = ("weight", "weight_scale", "weight_zero_point", "input_scale", "input_zero_point")
    bias = torch.randn(shape[0]).to(rng.choice([torch.float32, torch.bfloat16]))
    return [*(layer.tensors.get(name) for name in names), bias if rng.random() < 0.5 else None]


def random_strides(rng: random.Random, x: Tensor) -> Tensor:
    way = rng.randrange(4)
    if way == 0:
        return torch.cat([x, x], -1)[..., : x.shape[-1]]
    if way == 1:
        return x.transpose(0, -1).contiguous().transpose(0, -1)
    if way == 2:
        return torch.cat([x.reshape(-1)[:1], x.reshape(-1)])[1:].reshape(x.shape) if x.numel() else x
    return x


def close(result: Tensor, expected: Tensor) -> bool:
    if not expected.numel():
        return result.shape == expected.shape
    size = float(expected.abs().max()) + 1
    return bool(
        (result.float() - expected.float()).abs().max()
        <= 3 * torch.finfo(result.dtype).eps * size + 1e-4 * size
    )


@pytest.mark.parametrize("seed", range(ROUNDS // 100))
def test_layers(seed: int) -> None:
    rng = random.Random(seed)
    torch.manual_seed(seed)
    for _ in range(100):
        picture = rng.random() < 0.4
        channels, out = (
            rng.choice([1, 2, 3, 5, 16, 31, 64, 100, 130, 257]),
            rng.choice([1, 2, 15, 17, 64, 65, 130]),
        )
        part = random_part(rng, channels)
        dtype = rng.choice([torch.float32, torch.bfloat16, torch.float16])
        torch.set_num_threads(rng.choice([1, 2, 3]))
        if picture:
            kernel = (rng.choice([1, 2, 3]), rng.choice([1, 3]))
            size = (rng.choice([3, 7, 12]), rng.choice([3, 5, 9]))
            x = torch.randn(rng.choice([0, 1, 2]), channels, *size).to(dtype)
            tensors = random_layer(rng, (out, channels, *kernel), part)
            if rng.random() < 0.5:
                tensors[0] = tensors[0].to(memory_format=torch.channels_last)
            geometry = ((rng.choice([1, 2]), 1), (rng.choice([0, 1, 2]), rng.choice([0, 1])), (1, 1), 1)
            operator, shape = "conv2d", (out, channels, *kernel)
        else:
            x = torch.randn(rng.choice([0, 1, 2, 4, 5, 7, 13, 40]), channels).to(dtype)
            tensors, geometry = random_layer(rng, (out, channels), part), ()
            operator, shape = "linear", (out, channels)
        x = random_strides(rng, x)
        if not native_int8.supports(part, shape, x):
            continue
        weight, inputs = stored(tensors, part)
        rest = (weight, inputs, tensors[5], *([Geometry(*geometry)] if geometry else ()))
        result = getattr(native_int8, operator)(x, *rest)
        expected = getattr(reference, operator)(x.float(), *rest)
        assert close(result, expected), (part, shape, x.shape, x.stride(), geometry)


@pytest.mark.skipif(not native_library.unit(), reason="no unit of the native library here")
def test_attention() -> None:
    rng = random.Random(0)
    for _ in range(100):
        batch, heads, width = rng.choice([1, 2]), rng.choice([1, 3]), rng.choice([1, 2, 7, 16, 33, 72, 160])
        queries, keys = rng.choice([1, 5, 6, 13, 64]), rng.choice([1, 2, 63, 64, 65, 130])
        q, k, v = (
            torch.randn(batch, n, heads, width).bfloat16().transpose(1, 2) for n in (queries, keys, keys)
        )
        mask = rng.choice([None, torch.randn(queries, keys), torch.rand(batch, 1, 1, keys) > 0.2])
        torch.set_num_threads(rng.choice([1, 2, 3]))
        with dispatch.use_backend("cpu"):
            result = attention.attend(random_strides(rng, q), k, v, mask, 0.2)
        bias = attention._bias(mask, (batch, heads, queries, keys))
        scores = q.float() @ k.float().transpose(2, 3) * 0.2 + (0 if bias is None else bias.clamp_min(-1e30))
        assert torch.allclose(result.float(), scores.softmax(-1) @ v.float(), atol=4e-2, rtol=2e-2)


@pytest.fixture(autouse=True)
def threads():
    """Leave torch's threads as they were."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
