"""What is wrong with a file is said: every kind of damage is named, sound files are not blamed."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from difloat import interchange
from difloat.interchange.layers import encode
from difloat.interchange.schemes import COMFY, FP8_ROWS, MXFP4, NVFP4, Scheme, swap_nibbles, to_tiles
from difloat.plan.plan import LayerPlan
from difloat.plan.rules import Rule, draft_layer

SHAPE = (256, 256)  # 256 rows of 16 groups: whole tiles, so that no shape gives an arrangement away

PLAIN = [scheme for scheme in COMFY if not scheme.rotated]  # the others are in test_comfy_tables.py


def trained_like(shape: tuple[int, int] = SHAPE) -> Tensor:
    """Rows of different size, as trained weights have."""
    generator = torch.Generator().manual_seed(0)
    return (
        torch.randn(shape, generator=generator) * torch.randn(shape[0], 1, generator=generator).exp() * 0.02
    )


def layer(scheme: Scheme, weight: Tensor | None = None) -> LayerPlan:
    granularity = "tensor" if scheme.group_size is None else "group" if scheme.group_size else "channel"
    rule = Rule((scheme.element,), granularity, scheme.group_size or None, scales=scheme.scales)
    weight = trained_like() if weight is None else weight
    return draft_layer(weight, [weight.shape[1]], rule).plan()


def write(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> Path:
    named = {f"net.{name}": tensor.contiguous() for name, tensor in tensors.items()}
    save_file(named, path, metadata=metadata)
    return path


def levels(path: Path, reference: dict[str, Tensor] | None = None) -> dict[str, str]:
    remarks = interchange.validate(path, reference)
    return {remark.level: remark.message for remark in reversed(remarks)}


@pytest.mark.parametrize("scheme", [NVFP4, FP8_ROWS, MXFP4, *PLAIN], ids=lambda scheme: scheme.name)
@pytest.mark.parametrize("weight", [trained_like(), torch.randn(96, 64)], ids=["trained", "random"])
def test_sound_files_are_not_blamed(scheme: Scheme, weight: Tensor, tmp_path: Path) -> None:
    tensors = encode(layer(scheme, weight), scheme)
    if scheme.comfy_format:
        mark = json.dumps({"format": scheme.comfy_format}).encode()
        tensors["comfy_quant"] = torch.tensor(list(mark), dtype=torch.uint8)
    path = write(tmp_path / "a.safetensors", tensors)
    for reference in (None, {"net.weight": weight}):
        remarks = interchange.validate(path, reference)
        assert [(r.level, r.message) for r in remarks] == [
            ("ok", f"1 quantized layers as {scheme.name} stores them")
        ]


def edited(**changes: Callable[[Tensor], Tensor] | None) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    """Tensors with some replaced, or left out."""

    def edit(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        kept = {name: tensor for name, tensor in tensors.items() if changes.get(name, True) is not None}
        return {name: changes.get(name, lambda t: t)(tensor) for name, tensor in kept.items()}

    return edit


def with_byte(value: int) -> Callable[[Tensor], Tensor]:
    """One byte replaced."""

    def change(tensor: Tensor) -> Tensor:
        changed = tensor.clone().view(torch.uint8)
        changed[3, 1] = value
        return changed.view(tensor.dtype)

    return change


@pytest.mark.parametrize(
    ("scheme", "edit", "words"),
    [
        (NVFP4, edited(weight_scale=None), "one float32|weight_scale must be beside"),
        (NVFP4, edited(weight_scale_2=None), "weight_scale_2 must be beside the weight, but is missing"),
        (NVFP4, edited(input_scale=None), "input_scale must be beside .* bfl backend refuses"),
        (NVFP4, edited(weight=None), "weight must be in the file, since its scales name"),
        (NVFP4, edited(weight_scale=lambda t: t.T), "got .*: it is transposed"),
        (NVFP4, edited(weight_scale=lambda t: to_tiles(t).reshape(-1)), "it is in cuBLAS' tiles"),
        (NVFP4, edited(weight_scale=lambda t: t[:, ::2]), "one scale per 32 input channels"),
        (NVFP4, edited(weight_scale=lambda t: t.float()), "weight_scale must be torch.float8_e4m3fn .* got torch.float32"),
        (NVFP4, edited(weight_scale=with_byte(0x7F)), "weight_scale must be finite, got 1 NaN"),
        (NVFP4, edited(weight_scale=with_byte(0x85)), "weight_scale must not be negative"),
        (NVFP4, edited(weight_scale_2=lambda t: t * torch.nan), "weight_scale_2 must be finite and positive, got nan"),
        (NVFP4, edited(weight_scale_2=lambda t: t * 0), "weight_scale_2 must be finite and positive, got 0"),
        (NVFP4, edited(weight_scale_2=lambda t: t.half()), "weight_scale_2 must be one float32 number, got torch.float16"),
        (NVFP4, edited(weight=lambda t: t.view(torch.int8)), "known layout, got dtype torch.int8"),
        (FP8_ROWS, edited(weight=with_byte(0xFF)), "weight must be finite"),
        (FP8_ROWS, edited(weight_scale=lambda t: t[:1].reshape(())), "one scale per tensor, as ComfyUI stores them"),
        (FP8_ROWS, edited(weight_scale=lambda t: t[:, None]), r"must have the shape \[256\]"),
        (FP8_ROWS, edited(weight_scale=lambda t: t * torch.inf), "256 NaN or infinite scales"),
        (MXFP4, edited(weight_scale=with_byte(255)), "e8m0 byte 255"),
        (MXFP4, edited(weight_scale=None), "weight_scale must be beside a quantized weight"),
    ],
)  # fmt: skip
def test_damage_is_an_error(scheme: Scheme, edit: Callable, words: str, tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", edit(encode(layer(scheme), scheme)))
    remarks = interchange.validate(path)
    errors = "; ".join(remark.message for remark in remarks if remark.level == "error")
    assert re.search(words, errors), (errors, remarks)
    assert not [remark for remark in remarks if remark.level == "ok"]


def test_fp8_without_a_scale_is_a_suspicion(tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", {"weight": torch.randn(8, 8).to(torch.float8_e4m3fn)})
    assert "plain cast" in levels(path)["suspicion"]


SWAPPED = edited(weight=swap_nibbles)
TILED = edited(weight_scale=to_tiles)
INVERTED = edited(weight_scale_2=lambda t: 1 / t)


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (SWAPPED, "^the nibbles are swapped"),
        (TILED, "^weight_scale is in cuBLAS' tiles: "),
        (lambda t: TILED(SWAPPED(t)), "cuBLAS' tiles and the nibbles are swapped"),
        (INVERTED, "^weight_scale_2 is inverted"),
    ],
)
def test_wrong_arrangements_are_errors_beside_the_float_model(
    edit: Callable, words: str, tmp_path: Path
) -> None:
    path = write(tmp_path / "a.safetensors", edit(encode(layer(NVFP4), NVFP4)))
    assert re.search(words, levels(path, {"net.weight": trained_like()})["error"])


def test_the_weight_of_another_model_is_an_error_beside_the_float_model(tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", encode(layer(NVFP4), NVFP4))
    other = trained_like().flip(0)
    assert "in every arrangement" in levels(path, {"net.weight": other})["error"]
    assert "of the float layer's shape" in levels(path, {"net.weight": torch.zeros(8, 8)})["error"]


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (TILED, "weight_scale may be in cuBLAS' tiles"),
        (INVERTED, "weight_scale_2 is .* may be the inverse"),
        (edited(weight=lambda t: t.roll(4, 1).div(2, rounding_mode="floor") & 0x33), "groups and scales may not belong"),
    ],
)  # fmt: skip
def test_wrong_arrangements_are_suspected_without_it(edit: Callable, words: str, tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", edit(encode(layer(NVFP4), NVFP4)))
    found = levels(path)
    assert "error" not in found and re.search(words, found["suspicion"])


def test_transposed_square_scales_are_suspected(tmp_path: Path) -> None:
    wide = trained_like((64, 1024))
    path = write(
        tmp_path / "a.safetensors", edited(weight_scale=lambda t: t.T)(encode(layer(NVFP4, wide), NVFP4))
    )
    assert "transposed" in levels(path)["suspicion"]
    assert "transposed" in levels(path, {"net.weight": wide})["error"]


def test_marks_are_checked(tmp_path: Path) -> None:
    tensors = encode(layer(COMFY[0]), COMFY[0])
    marks = {
        "_quantization_metadata": json.dumps(
            {"layers": {"net": {"format": "nvfp4"}, "gone": {"format": "nvfp4"}}}
        )
    }
    found = interchange.validate(write(tmp_path / "a.safetensors", tensors, marks))
    assert [(r.level, r.place) for r in found] == [("error", "gone")]
    strange = {"_quantization_metadata": json.dumps({"layers": {"net": {"format": "nf4"}}})}
    assert "format 'nf4'" in levels(write(tmp_path / "b.safetensors", tensors, strange))["error"]
    for broken in ("{", "[]", '{"layers": {"net": 3}}'):
        path = write(tmp_path / "c.safetensors", tensors, {"_quantization_metadata": broken})
        assert list(levels(path)) == ["error"]


def test_files_that_are_none(tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", {"weight": torch.zeros(2, 2)})
    assert "no tensor looks like one" in levels(path)["error"]
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(ValueError, match="whole safetensors file"):
        interchange.validate(path)
    with pytest.raises(FileNotFoundError, match="which does not exist"):
        interchange.validate(tmp_path / "nowhere")
