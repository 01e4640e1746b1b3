"""Tables: levels as number formats."""

from __future__ import annotations

import pytest
import torch

from difloat.kernels import native_decode, native_int8, reference, torch_int8
from difloat.numbers import formats, tables
from difloat.numbers.packing import pack, unpack
from difloat.numbers.rounding import decode, encode, round_to
from difloat.numbers.search import search
from difloat.plan.specs import Part, QuantSpec
from difloat.plan.weight import Inputs, PackedWeight, Weight

NAMES = ("iq4nl", "t4g", "t3g", "t2g", "table(-90,-7,2,100,127)")


@pytest.mark.parametrize("name", NAMES)
def test_names_codes_and_nearest_values(name: str) -> None:
    table = formats.parse(name)
    assert table.name == name and not table.uniform and len(table.decode_table) == 2**table.bits
    assert formats.parse(f"table({','.join(map(str, table.levels))})") == table
    x = torch.randn(64, 37, generator=torch.Generator().manual_seed(0)) * 70
    levels = torch.tensor(table.values)
    nearest = levels[(x[..., None] - levels).abs().argmin(-1)]  # the first, that is the lower, of equals
    codes = encode(x, table)
    assert torch.equal(round_to(x, table), nearest) and torch.equal(decode(codes, table), nearest)
    assert torch.equal(unpack(pack(codes, table.bits), table.bits, 37), codes)


def test_ties_go_to_the_lower_level_and_nan_stays() -> None:
    table = formats.parse("t2g")
    middle = torch.tensor([0.0, -41.0, 41.0, 1e9, float("nan")])
    assert round_to(middle, table).tolist()[:4] == [-19, -63, 19, 63]
    assert round_to(middle, table)[4].isnan()


@pytest.mark.parametrize("name", ["table(1,2)", "table(-1)", "table(2,-1)", "table(-129,1)", "table(a)"])
def test_what_is_no_table_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="table must have 2 to 16 ascending levels"):
        formats.parse(name)


@pytest.mark.parametrize("count", [4, 8])
def test_lloyd_max_is_known(count: int) -> None:
    known = {4: (0.4528, 1.5104), 8: (0.2451, 0.7560, 1.3439, 2.1520)}[count]  # Max 1960, Table I
    assert tables.lloyd_max(count)[count // 2 :] == pytest.approx(known, abs=2e-4)


@pytest.mark.parametrize("name", NAMES)
def test_search_finds_the_best_of_all_scales_of_both_signs(name: str) -> None:
    table = formats.parse(name)
    rows = torch.randn(8, 5, generator=torch.Generator().manual_seed(1))
    clips = [c / 10 for c in range(2, 13)]
    found = search(rows, [table], clips=clips, refine=0)
    scales = rows.abs().amax(1, keepdim=True) * torch.tensor([*clips]) / table.max
    turned = rows.abs().amax(1, keepdim=True) * torch.tensor([*clips]) / -table.min
    every = torch.cat([scales, -turned], 1)[..., None]
    error = (round_to(rows[:, None] / every, table) * every - rows[:, None]).double().square().sum(-1)
    assert torch.allclose(found.error, error.amin(1), rtol=1e-5)
    assert bool((found.scale < 0).any()) == (not table.symmetric)


@pytest.mark.parametrize("backend", [native_decode, native_int8, torch_int8])
@pytest.mark.parametrize("name", NAMES)
def test_backends_give_the_reference_with_scales_of_both_signs(name: str, backend) -> None:
    table, g = formats.parse(name), torch.Generator().manual_seed(3)
    for o, i, t in ((5, 37, 3), (19, 130, 7)):
        part = Part(i, QuantSpec(table, "channel"), QuantSpec(formats.parse("int8"), "token", online=True))
        x = torch.randn(t, i, generator=g)
        if not backend.supports(part, (o, i), x):
            pytest.skip("this machine lacks the instructions")
        codes = torch.randint(0, len(table.levels), (o, i), generator=g).to(torch.uint8)
        piece = PackedWeight(pack(codes, table.bits), torch.randn(o, generator=g), None, part)
        layer = (x, Weight(((piece,),)), Inputs(), None)
        torch.testing.assert_close(backend.linear(*layer), reference.linear(*layer), rtol=1e-5, atol=1e-3)
