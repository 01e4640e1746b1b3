"""What every family's tiny pipeline is expected to show: blocks, edges, concatenations, guidance. The tests run over it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import families
from tiny import PROMPTS, tiny_pixart


@dataclass(frozen=True)
class Family:
    """One family.

    Attributes:
        build: Makes the float pipeline.
        blocks: Names of the units with several layers.
        outside: Layers that are units of their own.
        first: The layer that reads the sample.
        last: The layer called last.
        splits: Layers that read a concatenation of features, and the channels of its pieces.
        uncalled: Which of `outside` have their weight read without being called.
        conditions: Prompts or classes of the pictures; None for an unconditional pipeline.
        call: Arguments of the pipeline's call that its tiny size needs.
        unit: What the denoiser is given for one timestep of the scheduler.
        guidance: Guidance scale where the pipeline's default is none.
        unconditional: Which part of the calibration rows has no condition; None without classifier-free guidance.
        bfloat16: Whether the stock pipeline itself samples in it.
    """

    build: Callable[[], Any]
    blocks: frozenset[str]
    outside: frozenset[str]
    first: str
    last: str
    splits: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    uncalled: frozenset[str] = frozenset()
    conditions: list[Any] | None = field(default_factory=lambda: PROMPTS[:4])
    call: Mapping[str, Any] = field(default_factory=dict)
    guidance: float | None = None
    unit: float = 1.0
    unconditional: int | None = 0
    bfloat16: bool = True


RESNETS = [
    "down_blocks.0.resnets.0",
    "down_blocks.1.resnets.0",
    "mid_block.resnets.0",
    "mid_block.resnets.1",
] + [f"up_blocks.{up}.resnets.{number}" for up in range(2) for number in range(2)]
ATTENTIONS = [
    "down_blocks.1.attentions.0",
    "up_blocks.0.attentions.0",
    "up_blocks.0.attentions.1",
    "mid_block.attentions.0",
]
UNET_ENDS = ["conv_in", "time_embedding.linear_1", "time_embedding.linear_2", "conv_out"]
RESAMPLERS = ["down_blocks.0.downsamplers.0", "up_blocks.0.upsamplers.0"]
PROJECTIONS = [f"{attention}.proj_{end}" for attention in ATTENTIONS for end in ("in", "out")]
SKIPS = {
    f"{resnet}.{layer}": pieces
    for resnet, pieces in zip(RESNETS[4:], [(32, 32), (32, 16), (32, 16), (16, 16)], strict=True)
    for layer in ("conv1", "conv_shortcut")
}
SHORT = {"max_sequence_length": 8}


def names(*groups: list[str], numbered: int = 0) -> frozenset[str]:
    """All names of the groups; with `numbered` those of the last group stand for that many entries each."""
    *others, last = groups
    last = [f"{name}.{number}" for name in last for number in range(numbered)] if numbered else last
    return frozenset(sum(others, []) + last)


def pairs(*embedders: str) -> list[str]:
    """The two linear layers of every embedder."""
    return [f"{embedder}.linear_{number}" for embedder in embedders for number in (1, 2)]


def unet(build: Callable[[], Any], depth: int, *more: str, **fields: Any) -> Family:
    """A U-Net with `depth` transformer blocks in every attention, 0 for plain attention, and `more` layers outside."""
    inner = [f"{name}.transformer_blocks.{number}" for name in ATTENTIONS for number in range(depth)]
    convolutions = [f"{name}.conv" for name in RESAMPLERS]
    return Family(
        build,
        names(RESNETS, inner or ATTENTIONS),
        names(UNET_ENDS, convolutions, PROJECTIONS if depth else [], list(more)),
        "conv_in",
        "conv_out",
        SKIPS,
        **fields,
    )


def pixart(build: Callable[[], Any]) -> Family:
    """Either PixArt."""
    embedders = pairs("adaln_single.emb.timestep_embedder", "caption_projection")
    return Family(
        build,
        names(["transformer_blocks"], numbered=2),
        names(["pos_embed.proj", "adaln_single.linear", "proj_out"], embedders),
        "pos_embed.proj",
        "proj_out",
        call=SHORT,
    )


CONSISTENCY = unet(families.consistency, 0)
POOLER = [f"time_extra_emb.pooler.{name}_proj" for name in "kqvc"]
FAMILIES = {
    "sd15": unet(families.sd15, 1),
    "sdxl": unet(families.sdxl, 2, *pairs("add_embedding")),
    "sd3": Family(
        families.sd3,
        names(["transformer_blocks"], numbered=2),
        names(
            ["pos_embed.proj", "context_embedder", "norm_out.linear", "proj_out"],
            pairs("time_text_embed.timestep_embedder", "time_text_embed.text_embedder"),
        ),
        "pos_embed.proj",
        "proj_out",
        call=SHORT,
    ),
    "flux": Family(
        families.flux,
        names(["transformer_blocks.0"], ["single_transformer_blocks"], numbered=2),
        names(
            ["x_embedder", "context_embedder", "norm_out.linear", "proj_out"],
            pairs(*(f"time_text_embed.{name}_embedder" for name in ("timestep", "guidance", "text"))),
        ),
        "x_embedder",
        "proj_out",
        # Not skips, but joined along channels too: attention's result and the feed-forward part's.
        {f"single_transformer_blocks.{number}.proj_out": (16, 64) for number in range(2)},
        call={"height": 16, "width": 16, **SHORT},
        unit=1 / 1000,
        unconditional=None,
    ),
    "pixart-alpha": pixart(tiny_pixart),
    "pixart-sigma": pixart(families.pixart_sigma),
    "hunyuandit": Family(
        families.hunyuandit,
        names(["blocks"], numbered=4),
        names(
            ["pos_embed.proj", "norm_out.linear", "proj_out", *POOLER],
            pairs("text_embedder", "time_extra_emb.timestep_embedder", "time_extra_emb.extra_embedder"),
        ),
        "pos_embed.proj",
        "proj_out",
        {"blocks.3.skip_linear": (16, 16)},
        frozenset(POOLER),
    ),
    "dit": Family(
        families.dit,
        names(["transformer_blocks"], numbered=2),
        names(["pos_embed.proj", "proj_out_1", "proj_out_2"]),
        "pos_embed.proj",
        "proj_out_2",
        conditions=[3, 999, 0, 500],
        unconditional=1,
    ),
    "sana": Family(
        families.sana,
        names(["transformer_blocks"], numbered=2),
        names(
            ["patch_embed.proj", "time_embed.linear", "proj_out"],
            pairs("time_embed.emb.timestep_embedder", "caption_projection"),
        ),
        "patch_embed.proj",
        "proj_out",
        call={
            "height": 32,
            "width": 32,
            "use_resolution_binning": False,
            "complex_human_instruction": None,
            **SHORT,
        },
    ),
    "ldm": unet(families.ldm, 0, conditions=None, unconditional=None, bfloat16=False),
    "ldm-text": unet(families.ldm_text, 1, guidance=3.0, bfloat16=False),
    "consistency": replace(
        CONSISTENCY,
        blocks=CONSISTENCY.blocks | names(RESAMPLERS),
        outside=names(UNET_ENDS),
        conditions=[3, 9, 0, 5],
        unconditional=None,
        bfloat16=False,
    ),
}
