"""Golden bytes of tables: short names and fitted levels, groups, rows of several widths, scales of either sign."""

from __future__ import annotations

import shutil
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from difloat import checkpoint
from difloat.interchange import gguf_blocks
from difloat.layers import install
from difloat.numbers import formats
from difloat.plan.encode import dequantize, join_rows, plan_layer
from difloat.plan.plan import LayerPlan, Plan
from difloat.plan.specs import Part, QuantSpec
from test_checkpoint import contents, read_by_the_document, same_state

GOLDEN = Path(__file__).parent / "golden" / "v1-tables"
LEVELS = "table(-127,-96,-75,-60,-47,-35,-24,-14,-4,6,16,28,42,58,81,127)"
ONLINE = QuantSpec(formats.parse("int8"), "token", online=True)
STATIC = QuantSpec(formats.parse("int8"))


class Tables(nn.Module):
    """A layer per case."""

    def __init__(self) -> None:
        super().__init__()
        self.four, self.groups = nn.Linear(33, 6), nn.Linear(64, 4)
        self.three, self.two = nn.Conv2d(5, 3, 3), nn.Linear(9, 4, bias=False)
        self.fitted, self.bands = nn.Linear(11, 5), nn.Linear(13, 12)


def filled(seed: int) -> Tables:
    """Weights that are multiples of 1/64, so that they are the same on every machine."""
    draw, model = torch.Generator().manual_seed(seed), Tables()
    for tensor in model.parameters():
        tensor.data = torch.randint(-64, 65, tensor.shape, generator=draw) / 64
    return model.eval()


def layer_of(weight: Tensor, name: str, size: int | None = None, activation: QuantSpec = ONLINE) -> LayerPlan:
    """Scales are powers of two, of either sign where the table is not symmetric."""
    format = formats.parse(name)
    spec = QuantSpec(format, "group" if size else "channel", size)
    count = spec.scale_count(weight.shape[0], weight.shape[1])
    scale = 2.0 ** -(6 + torch.arange(count) % 3)
    if not format.symmetric:
        scale[1::2] *= -1
    inputs = [None if activation.online else torch.tensor([0.5])]
    return plan_layer(
        weight.detach(), [Part(weight.shape[1], spec, activation)], [scale], input_scales=inputs
    )


def plan_of(model: Tables) -> Plan:
    """Every table alone, and all of them as bands of one layer."""
    bands = model.bands.weight
    order = torch.tensor([3, 0, 7, 10, 1, 5, 2, 11, 4, 9, 6, 8])
    runs = zip(order.split([2, 3, 3, 4]), (LEVELS, "iq4nl", "t3g", "t2g"), strict=True)
    layers = {
        "four": layer_of(model.four.weight, "iq4nl"),
        "groups": layer_of(model.groups.weight, "t4g", 32),
        "three": layer_of(model.three.weight, "t3g"),
        "two": layer_of(model.two.weight, "t2g", activation=STATIC),
        "fitted": layer_of(model.fitted.weight, LEVELS, 4),
        "bands": join_rows([layer_of(bands[rows.sort().values], name) for rows, name in runs], order),
    }
    return Plan("golden", "w4a8", layers, {}, {})


def quantized(seed: int = 0) -> Tables:
    model = filled(seed)
    plan = plan_of(model)
    install.apply(model, plan)
    checkpoint.mark_quantized(model, plan)
    return model


def test_tables_have_golden_bytes(tmp_path: Path) -> None:
    assert contents(checkpoint.save(quantized(), tmp_path / "saved")) == contents(GOLDEN)


def test_a_reader_after_the_document_decodes_tables() -> None:
    model, got = filled(0), read_by_the_document(GOLDEN)
    for name, layer in plan_of(model).layers.items():
        np.testing.assert_array_equal(got[name], dequantize(layer).numpy())


def test_golden_tables_load_verify_and_save_again(tmp_path: Path) -> None:
    loaded = checkpoint.load(GOLDEN, into=filled(1))
    assert same_state(loaded, quantized())
    assert all(finding.passed for finding in checkpoint.verify(GOLDEN))
    assert contents(checkpoint.save(loaded, tmp_path / "again")) == contents(GOLDEN)


@pytest.mark.parametrize("levels", ["table(1,2)", "table(-5,-5,3)", "table(-200,5)", "iq5nl"])
def test_a_file_with_levels_that_no_table_has_is_refused(tmp_path: Path, levels: str) -> None:
    copy = shutil.copytree(GOLDEN, tmp_path / "bad")
    text = (copy / "config.json").read_text()
    assert LEVELS in text
    (copy / "config.json").write_text(text.replace(LEVELS, levels))
    (copy / "difloat.json").unlink()  # the hashes would speak first
    with pytest.raises(checkpoint.CheckpointError, match="table must have|format must be|a table"):
        checkpoint.load(copy, into=filled(1))


def test_codes_of_iq4nl_mean_what_the_package_gguf_reads() -> None:
    """Codes and scales as our file stores them, put into blocks by hand, decoded by the foreign reader."""
    weight = torch.randn(6, 64, generator=torch.Generator().manual_seed(0))
    layer = layer_of(weight, "iq4nl", 32)
    codes = layer.codes()[0].numpy().reshape(6, 2, 32)
    scales = layer.tensors["weight_scale"].numpy().astype(np.float16).reshape(6, 2, 1)
    nibbles = codes[..., :16] | codes[..., 16:] << 4
    data = np.concatenate([scales.view(np.uint8), nibbles], -1).reshape(6, -1)
    found = gguf.dequantize(data, gguf.GGMLQuantizationType.IQ4_NL)
    assert np.array_equal(found, dequantize(layer).numpy())
    plain = plan_layer(weight, [Part(64, layer.parts[0].weight)], [layer.tensors["weight_scale"]])
    assert np.array_equal(gguf_blocks.encode(plain)[1].numpy(), data)
