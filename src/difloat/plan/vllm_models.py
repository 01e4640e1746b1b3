"""What vLLM-Omni's own models do with our layers: which they hold quantized, and which of ours are one layer there.

Read off its models and their `load_weights` (version 0.30). A loader that reads query, key and value of SVDQuant as one tensor
takes them no longer apart, since one of the layer's numbers has no place for three.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

_QKV = ("to_qkv", ("to_q", "to_k", "to_v"))
_ADDED = ("add_kv_proj", ("add_q_proj", "add_k_proj", "add_v_proj"))
Join = tuple[str, tuple[str, ...]]


@dataclass(frozen=True)
class Reader:
    """One model of vLLM-Omni.

    Attributes:
        held: Patterns of the names of layers that it holds quantized.
        joining: Patterns of the names of modules some of whose layers are one there, with these layers.
    """

    held: tuple[str, ...]
    joining: Mapping[str, tuple[Join, ...]]


_BLOCKS = "transformer_blocks.*"
_DOUBLE = (f"{_BLOCKS}.attn.*", f"{_BLOCKS}.ff.*", f"{_BLOCKS}.ff_context.*")
_READERS: dict[str, Reader] = {
    "FluxTransformer2DModel": Reader(
        (
            f"{_BLOCKS}.attn.to_out.0",
            f"{_BLOCKS}.attn.to_add_out",
            *_DOUBLE[1:],
            "single_transformer_blocks.*.proj_mlp",
            "single_transformer_blocks.*.proj_out",
        ),
        {},
    ),
    "Flux2Transformer2DModel": Reader(
        (*_DOUBLE, "single_transformer_blocks.*.attn.*"), {f"{_BLOCKS}.attn": (_QKV, _ADDED)}
    ),
    "HunyuanVideo15Transformer3DModel": Reader(_DOUBLE, {f"{_BLOCKS}.attn": (_QKV, _ADDED)}),
    "LTX2VideoTransformer3DModel": Reader(
        (f"{_BLOCKS}attn*.to_[qkv]", f"{_BLOCKS}attn*.to_out.0", f"{_BLOCKS}.ff.*", f"{_BLOCKS}.audio_ff.*"),
        {f"{_BLOCKS}.attn1": (_QKV,), f"{_BLOCKS}.audio_attn1": (_QKV,)},
    ),
    "QwenImageTransformer2DModel": Reader(
        (f"{_BLOCKS}.attn.*", f"{_BLOCKS}.img_mlp.*", f"{_BLOCKS}.txt_mlp.*"),
        {f"{_BLOCKS}.attn": (_QKV, _ADDED)},
    ),
    "WanTransformer3DModel": Reader(
        ("blocks.*.attn1.*", "blocks.*.attn2.*", "blocks.*.ffn.*"), {"blocks.*.attn1": (_QKV,)}
    ),
    "ZImageTransformer2DModel": Reader(("*.attention.*", "*.feed_forward.w2"), {"*.attention": (_QKV,)}),
}
_APART = (  # models whose loaders take query, key and value of SVDQuant neither apart nor as one
    "GlmImageTransformer2DModel",
    "HeliosTransformer3DModel",
    "HiDreamImageTransformer2DModel",
    "LongCatImageTransformer2DModel",
    "OmniGen2Transformer2DModel",
    "OvisImageTransformer2DModel",
    "SD3Transformer2DModel",
)


def left_float(model: str, name: str) -> str:
    """Why vLLM-Omni's model of a class holds a layer in float, or "" if it does not, or its model is not known.

    >>> left_float("QwenImageTransformer2DModel", "proj_out")
    'vLLM-Omni holds it in float'
    >>> left_float("QwenImageTransformer2DModel", "transformer_blocks.0.attn.to_q")
    ''
    """
    reader, shared = _READERS.get(model), name.rpartition(".")[2] in (*_QKV[1], *_ADDED[1])
    if shared and (model in _APART or (reader is not None and not reader.joining)):
        return "vLLM-Omni's loader of this model takes query, key and value in float only"
    if reader is None or any(fnmatchcase(name, pattern) for pattern in reader.held):
        return ""
    return "vLLM-Omni holds it in float"


def joined(model: str, names: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """The layers that are one in vLLM-Omni's model of a class, by the name of that one.

    >>> joined("WanTransformer3DModel", ["blocks.0.attn1.to_q", "blocks.0.attn2.to_q"])
    {'blocks.0.attn1.to_qkv': ('blocks.0.attn1.to_q', 'blocks.0.attn1.to_k', 'blocks.0.attn1.to_v')}

    Args:
        model: The name of the class in diffusers.
        names: Layers, of which each brings all those it is joined with.
    """
    found: dict[str, tuple[str, ...]] = {}
    reader = _READERS.get(model)
    if reader is None:
        return found
    for name in names:
        parent, _, last = name.rpartition(".")
        for pattern, joins in reader.joining.items():
            for whole, parts in joins:
                if last in parts and fnmatchcase(parent, pattern):
                    found[f"{parent}.{whole}"] = tuple(f"{parent}.{part}" for part in parts)
    return found
