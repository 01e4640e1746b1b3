"""What `quality.py` measures: the rows of every table in docs/papers, and the models they are measured on."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from difloat.reference_models import NAMES


@dataclass(frozen=True)
class Row:
    """One configuration of a table; `timesteps` as in the calibration settings, `seed` of calibration and recipe.

    With `allocated`, layers have the weight bits that recipe auto with these options gives them. Rows come from as many
    `trajectories`, or where that is None from as many as the recipe asks for. With `blocks_only`, layers outside of the model's
    lists of blocks are left as they are, as FP4DiT leaves them.
    """

    label: str
    recipe: str
    bits: str
    options: dict[str, Any] = field(default_factory=dict)
    timesteps: str = "sampler"
    seed: int = 0
    allocated: dict[str, Any] | None = None
    blocks_only: bool = False
    trajectories: int | None = None


def seeds(
    label: str,
    recipe: str,
    bits: str,
    options: dict[str, Any] | None = None,
    count: int = 3,
    *,
    blocks_only: bool = False,
) -> list[Row]:
    """The same configuration with several seeds, which vary calibration, rounding and training."""
    return [
        Row(
            label if seed == 0 else f"{label}, seed {seed}",
            recipe,
            bits,
            options or {},
            seed=seed,
            blocks_only=blocks_only,
        )
        for seed in range(count)
    ]


BASE: dict[str, Any] = {"mixup_sign": False, "adapters": 1, "dfa": False}
GROUPS: dict[str, Any] = {"weight_granularity": "group", "group_size": 128}
EPOCHS: dict[str, Any] = {"epochs": 20}  # half the default, the same for all rows of MPQ-DM's long table
SHORT: dict[str, Any] = {"epochs": 10}  # of the table that has all settings and both models
KEPT: dict[str, Any] = {"factor_power": 2.0, "guidance_weight": 9.0}  # our loss, in place of the papers'
OMQ: dict[str, Any] = {**EPOCHS, "relation": "off"}


def against(bits: str, count: int = 1, budget: dict[str, Any] = EPOCHS) -> list[Row]:
    """MPQ-DM and what it is compared with at one setting; all train the same number of steps and have one weight per layer."""
    return [
        *seeds(f"{bits.upper()} MPQ-DM", "mpqdm", bits, budget, count),
        *seeds(f"{bits.upper()} EfficientDM", "efficientdm", bits, budget, count),
        *seeds(f"{bits.upper()} MSFP, one adapter", "msfp", bits, {**budget, "adapters": 1}, count),
        Row(f"{bits.upper()} nearest", "rtn", bits, {"grid": "int", "activation": "static"}),
    ]


PAPERS: dict[str, list[Row]] = {
    "lbfp": [
        Row("FP8/FP8 (LBFP)", "lbfp", "w8a8"),
        Row("INT8/INT8 (Q-Diffusion)", "qdiffusion", "w8a8"),
        Row("FP4/FP8 nearest (LBFP)", "lbfp", "w4a8", {"rounding": "nearest"}),
        Row("FP4/FP8 learned rounding (LBFP)", "lbfp", "w4a8"),
        Row("INT4/INT8 nearest (Q-Diffusion)", "qdiffusion", "w4a8", {"rounding": "nearest"}),
        Row("INT4/INT8 AdaRound (Q-Diffusion)", "qdiffusion", "w4a8"),
        Row("FP4/FP8 learned, per channel", "lbfp", "w4a8", {"weight_granularity": "channel"}),
        Row("INT4/INT8 AdaRound, per tensor", "qdiffusion", "w4a8", {"weight_granularity": "tensor"}),
    ],
    "fp4dit": [
        Row("W4A8 FP4DiT", "fp4dit", "w4a8"),
        Row("W4A6 FP4DiT", "fp4dit", "w4a6"),
        Row("W4A8 Q-Diffusion", "qdiffusion", "w4a8", GROUPS),
        Row("W4A6 Q-Diffusion", "qdiffusion", "w4a6", GROUPS),
        Row("W4A8 ViDiT-Q", "viditq", "w4a8"),
        Row("W4A6 ViDiT-Q", "viditq", "w4a6"),
        Row("W4A8 Q-DiT", "qdit", "w4a8"),
        Row("W4A6 Q-DiT", "qdit", "w4a6"),
        Row("W4A6 FP4DiT, nearest", "fp4dit", "w4a6", {"rounding": "nearest"}),
        Row("W4A6 FP4DiT, E2M1 before GELU", "fp4dit", "w4a6", {"before_gelu": "same"}),
        Row("W4A6 FP4DiT, plain AdaRound", "fp4dit", "w4a6", {"scale_aware": False}),
        Row("W4A6 FP4DiT, static activations", "fp4dit", "w4a6", {"activation": "static"}),
        Row("W4A6 FP4DiT, groups of 64", "fp4dit", "w4a6", {"group_size": 64}),
        Row("W4A6 FP4DiT, per channel", "fp4dit", "w4a6", {"group_size": 0}),
        Row("W4A6 FP4DiT, calibrated on clean latents", "fp4dit", "w4a6", timesteps="clean"),
        Row("W4A6 FP4DiT, inputs of full precision", "fp4dit", "w4a6", {"inputs": "full"}),
        Row("W4A6 FP4DiT, attention in high precision", "fp4dit", "w4a6", {"attention": False}),
        Row("W4A6 FP4DiT, formats and clips searched", "fp4dit", "w4a6", {"weight_format": "search"}),
        Row(
            "W4A6 integer twin: INT4 groups, INT6 tokens",
            "qdiffusion",
            "w4a6",
            {**GROUPS, "activation": "online"},
        ),
        Row("W4A6 ViDiT-Q, one weight per layer", "viditq", "w4a6", {"stretches": 1}),
        Row(
            "W4A6 FP4DiT, all that helped: E2M1 before GELU, searched, inputs of full precision",
            "fp4dit",
            "w4a6",
            {"before_gelu": "same", "weight_format": "search", "inputs": "full"},
        ),
    ],
    "msfp": [
        Row("W6A6 MSFP", "msfp", "w6a6"),
        *seeds("W4A4 base", "msfp", "w4a4", BASE),
        *seeds("W4A4 + mixup-sign", "msfp", "w4a4", {**BASE, "mixup_sign": True}),
        *seeds("W4A4 + TALoRA", "msfp", "w4a4", {"dfa": False}),
        *seeds("W4A4 + DFA (MSFP)", "msfp", "w4a4", {}),
        Row("W4A4 integer twin", "msfp", "w4a4", {"grid": "int"}),
        Row("W4A4 MSFP, narrow search", "msfp", "w4a4", {"search": "narrow"}),
        Row("W4A4 EfficientDM", "efficientdm", "w4a4"),
        Row("W4A4 LBFP", "lbfp", "w4a4"),
        Row("W4A4 Q-Diffusion", "qdiffusion", "w4a4"),
        Row("W4A4 MSFP, not fine-tuned", "msfp", "w4a4", {"adapters": 0}),
        Row(
            "W4A4 MSFP, learned rounding, not fine-tuned",
            "msfp",
            "w4a4",
            {"adapters": 0, "rounding": "learned"},
        ),
        Row("W4A4 MSFP, one adapter, guidance kept", "msfp", "w4a4", {"adapters": 1, **KEPT}),
        Row(
            "W4A4 MSFP, learned rounding, one adapter, guidance kept",
            "msfp",
            "w4a4",
            {"adapters": 1, "rounding": "learned", **KEPT},
        ),
        Row(
            "W4A4 MSFP, one adapter, guidance kept, 10 epochs",
            "msfp",
            "w4a4",
            {"adapters": 1, "epochs": 10, **KEPT},
        ),
        Row(
            "W4A4 MSFP, learned rounding, one adapter, guidance kept, 10 epochs",
            "msfp",
            "w4a4",
            {"adapters": 1, "epochs": 10, "rounding": "learned", **KEPT},
        ),
        Row("W4A4 MSFP, one adapter, 10 epochs", "msfp", "w4a4", {"adapters": 1, "epochs": 10}),
        Row("W4A4 MSFP, one adapter", "msfp", "w4a4", {"adapters": 1}),
        Row(
            "W4A4 MSFP, one adapter, 10 epochs, guidance weighted",
            "msfp",
            "w4a4",
            {"adapters": 1, "epochs": 10, "guidance_weight": 9.0},
        ),
        Row(
            "W4A4 MSFP, one adapter, 10 epochs, squared factors",
            "msfp",
            "w4a4",
            {"adapters": 1, "epochs": 10, "factor_power": 2.0},
        ),
    ],
    "mpqdm": [
        *against("w2a4", 3),
        *against("w3a6", 3),
        *against("w4a4"),
        *against("w3a4"),
        *against("w2a6"),
        *seeds("W2A4 base", "mpqdm", "w2a4", {**OMQ, "mixed": False}),
        *seeds("W2A4 + OMQ", "mpqdm", "w2a4", OMQ),
        Row("W2A4 MPQ-DM, rows by error", "mpqdm", "w2a4", {**EPOCHS, "criterion": "error"}),
        Row("W2A4 MPQ-DM, rows by magnitude", "mpqdm", "w2a4", {**EPOCHS, "criterion": "magnitude"}),
        Row("W2A4 MPQ-DM, rows at random", "mpqdm", "w2a4", {**EPOCHS, "criterion": "random"}),
        Row("W2A4 MPQ-DM, n of 0 and k as released", "mpqdm", "w2a4", {**EPOCHS, "candidates": "release"}),
        Row("W2A4 MPQ-DM+", "mpqdm", "w2a4", {**EPOCHS, "plus": True}),
        Row(
            "W2A4 MPQ-DM, relations detached as released", "mpqdm", "w2a4", {**EPOCHS, "relation": "detached"}
        ),
        Row(
            "W2A4 MPQ-DM, features instead of relations", "mpqdm", "w2a4", {**EPOCHS, "relation": "features"}
        ),
        Row("W2A4 MPQ-DM, adapters from the error", "mpqdm", "w2a4", {**EPOCHS, "adapter_init": "error"}),
        Row("W2A4 MPQ-DM, FP grids", "mpqdm", "w2a4", {**EPOCHS, "grid": "fp"}),
        Row("W3A6 MPQ-DM, FP grids", "mpqdm", "w3a6", {**EPOCHS, "grid": "fp"}),
        Row("W4A4 MPQ-DM, FP grids", "mpqdm", "w4a4", {**EPOCHS, "grid": "fp"}),
        Row("W2A4 + OMQ, inputs not scaled", "mpqdm", "w2a4", {**OMQ, "scale_inputs": False}),
        Row(
            "W2A4 + OMQ, inputs not scaled, rows by error",
            "mpqdm",
            "w2a4",
            {**OMQ, "scale_inputs": False, "criterion": "error"},
        ),
        Row(
            "W2A4 + TRD, inputs not scaled, rows by error",
            "mpqdm",
            "w2a4",
            {**EPOCHS, "scale_inputs": False, "criterion": "error"},
        ),
        Row("W2A4 EfficientDM, guidance kept", "efficientdm", "w2a4", {**EPOCHS, **KEPT}),
        Row(
            "W2A4 EfficientDM, learned rounding, guidance kept",
            "efficientdm",
            "w2a4",
            {**EPOCHS, "rounding": "learned", **KEPT},
        ),
        Row("W3A6 EfficientDM, guidance kept", "efficientdm", "w3a6", {**EPOCHS, **KEPT}),
        Row(
            "W4A4 EfficientDM, compared after guidance", "efficientdm", "w4a4", {**EPOCHS, "compare_at": 3.0}
        ),
        Row(
            "W2A4 EfficientDM, compared after guidance", "efficientdm", "w2a4", {**EPOCHS, "compare_at": 3.0}
        ),
    ],
    "mpqdm-short": [  # with --samples 400
        *(row for bits in ("w4a4", "w3a6", "w3a4", "w2a6", "w2a4") for row in against(bits, budget=SHORT)),
        Row("W2A4 MPQ-DM, rows by error", "mpqdm", "w2a4", {**SHORT, "criterion": "error"}),
        Row("W2A4 MPQ-DM, rows by magnitude", "mpqdm", "w2a4", {**SHORT, "criterion": "magnitude"}),
        Row("W2A4 MPQ-DM, rows at random", "mpqdm", "w2a4", {**SHORT, "criterion": "random"}),
        Row("W2A4 + OMQ, no relations", "mpqdm", "w2a4", {**SHORT, "relation": "off"}),
        Row("W2A4 MPQ-DM, features", "mpqdm", "w2a4", {**SHORT, "relation": "features"}),
        Row(
            "W2A4 MPQ-DM, features, a tenth of the weight",
            "mpqdm",
            "w2a4",
            {**SHORT, "relation": "features", "feature_weight": 0.1},
        ),
        Row("W2A4 MPQ-DM, relations in every step", "mpqdm", "w2a4", {**SHORT, "relation_every": 1}),
    ],
    "guided": [
        Row("W4A4 guided", "guided", "w4a4"),
        Row("W4A4 guided, ranges by timestep", "guided", "w4a4", {"ranges_by_timestep": True}),
        Row("W3A4 guided", "guided", "w3a4"),
        Row("W3A6 guided", "guided", "w3a6"),
        Row("W2A4 guided", "guided", "w2a4"),
        Row("W2A4 guided, ranges by timestep", "guided", "w2a4", {"ranges_by_timestep": True}),
        Row("W2A4 guided, 20 epochs", "guided", "w2a4", EPOCHS),
        Row("W4A8 guided", "guided", "w4a8"),
        Row("W4A4 guided, all timesteps alike", "guided", "w4a4", {"factor_power": 0.0}),
        Row("W4A4 guided, not fine-tuned", "guided", "w4a4", {"epochs": 0}),
    ],
}
INTEGER_LAYERS: dict[str, Any] = {"widths": "layers", "grid": "integer"}
PAPERS["auto"] = [
    Row("W4A8 auto", "auto", "w4a8"),
    Row("W3A8 auto", "auto", "w3a8"),
    Row("W2A8 auto", "auto", "w2a8"),
    Row("W8A8 auto", "auto", "w8a8"),
    Row("W4A4 auto", "auto", "w4a4"),
    Row("W2A4 auto", "auto", "w2a4"),
    Row("W4A8 auto, bits by layer", "auto", "w4a8", {"widths": "layers"}),
    Row("W4A8 auto, bits by layer, integers", "auto", "w4a8", INTEGER_LAYERS),
    Row("W4A8 auto, same bits", "auto", "w4a8", {"widths": "same"}),
    Row("W4A8 auto, same bits, integers", "auto", "w4a8", {"widths": "same", "grid": "integer"}),
    Row("W4A8 GPTQ", "gptq", "w4a8"),
    Row("W4A8 OrbitQuant", "orbitquant", "w4a8"),
    Row("W4A4 OrbitQuant", "orbitquant", "w4a4"),
    Row("W4A4 SVDQuant", "svdquant", "w4a4"),
    Row("W4A8 H-SVD", "hsvd", "w4a8"),
    Row("W4A4 H-SVD", "hsvd", "w4a4"),
    Row("W4A8 Q-Diffusion, bits by layer", "qdiffusion", "w4a8", allocated=INTEGER_LAYERS),
    Row(
        "W4A8 Q-Diffusion nearest, bits by layer",
        "qdiffusion",
        "w4a8",
        {"rounding": "nearest"},
        allocated=INTEGER_LAYERS,
    ),
    Row("W4A8 auto, seed 1", "auto", "w4a8", seed=1),
    Row("W4A8 auto, seed 2", "auto", "w4a8", seed=2),
    Row("W4A4 auto, inputs per token", "auto", "w4a4", {"input_group": 0}),
    Row("W4A8 GPTQ, 64 trajectories", "gptq", "w4a8", trajectories=64),
    Row(
        "W4A8 Q-Diffusion, bits by layer, 64 trajectories",
        "qdiffusion",
        "w4a8",
        allocated=INTEGER_LAYERS,
        trajectories=64,
    ),
    Row("W4A8 Q-Diffusion, 64 trajectories", "qdiffusion", "w4a8", trajectories=64),
    *(row for bits in ("w3a8", "w4a4", "w2a4") for row in seeds(f"{bits.upper()} auto", "auto", bits)[1:]),
    Row("W4A8 auto, polished", "auto", "w4a8", {"polish": 200}),
    Row("W2A4 auto, polished", "auto", "w2a4", {"polish": 200}),
    Row("W4A8 auto, bits by layer, integers, polished", "auto", "w4a8", {**INTEGER_LAYERS, "polish": 200}),
]
TWIN: dict[str, Any] = {**GROUPS, "activation": "online"}  # INT4 in groups and integers per token
BRIEF: dict[str, Any] = {"iterations": 100}  # a quarter of the default, in all tables over seeds
NEAREST: dict[str, Any] = {"rounding": "nearest"}


def fp4dit_over_seeds(bits: str) -> list[Row]:
    """FP4DiT's choices one at a time, and integers with the same layers left out. Nearest rounding draws nothing at random."""
    name = bits.upper()
    same: dict[str, Any] = {"before_gelu": "same"}
    return [
        *seeds(f"{name} FP4DiT", "fp4dit", bits, BRIEF),
        *seeds(f"{name} FP4DiT, E2M1 before GELU", "fp4dit", bits, {**BRIEF, **same}),
        *seeds(f"{name} FP4DiT, plain AdaRound", "fp4dit", bits, {**BRIEF, "scale_aware": False}),
        *seeds(f"{name} integer twin, blocks only", "qdiffusion", bits, {**TWIN, **BRIEF}, blocks_only=True),
        *seeds(f"{name} Q-Diffusion, blocks only", "qdiffusion", bits, {**GROUPS, **BRIEF}, blocks_only=True),
        *seeds(
            f"{name} FP4DiT, one exponent bit more", "fp4dit", bits, {**BRIEF, "activation_format": "wide"}
        ),
        Row(f"{name} nearest FP4DiT", "fp4dit", bits, NEAREST),
        Row(f"{name} nearest FP4DiT, E2M1 before GELU", "fp4dit", bits, {**NEAREST, **same}),
        Row(
            f"{name} nearest FP4DiT, one exponent bit more",
            "fp4dit",
            bits,
            {**NEAREST, "activation_format": "wide"},
        ),
        Row(
            f"{name} nearest integer twin, blocks only",
            "qdiffusion",
            bits,
            {**NEAREST, **TWIN},
            blocks_only=True,
        ),
        Row(
            f"{name} nearest Q-Diffusion, blocks only",
            "qdiffusion",
            bits,
            {**NEAREST, **GROUPS},
            blocks_only=True,
        ),
    ]


# Both with --samples 128. Seeds vary all that is random in quantization, and pictures are the same ones.
PAPERS["fp4dit-seeds"] = [*fp4dit_over_seeds("w4a6"), *fp4dit_over_seeds("w4a8")]
PAPERS["lbfp-seeds"] = [
    Row("FP4/FP8 nearest (LBFP)", "lbfp", "w4a8", NEAREST),
    *seeds("FP4/FP8 learned rounding (LBFP)", "lbfp", "w4a8", BRIEF),
    *seeds("INT4/INT8 AdaRound (Q-Diffusion)", "qdiffusion", "w4a8", BRIEF),
    *seeds("FP4/FP8 learned, per channel", "lbfp", "w4a8", {**BRIEF, "weight_granularity": "channel"}),
    *seeds("INT4/INT8 AdaRound, per tensor", "qdiffusion", "w4a8", {**BRIEF, "weight_granularity": "tensor"}),
    Row("FP4/FP8 learned rounding, 2,000 steps", "lbfp", "w4a8", {"iterations": 2000}),
    Row("INT4/INT8 AdaRound, 2,000 steps", "qdiffusion", "w4a8", {"iterations": 2000}),
]


def fresh(
    name: str, options: dict[str, Any], updates: int, rate: float, bits: str = "w4a4", recipe: str = "msfp"
) -> list[Row]:
    """A rung trained on fresh rows: updates of 4 rows, with the adapters' rate."""
    budget: dict[str, Any] = {"fresh_rows": 1, "rows": 4, "updates": updates, "adapter_rate": rate}
    return seeds(f"{name}, {updates:,} fresh updates, rate {rate:g}", recipe, bits, {**options, **budget})


TALORA: dict[str, Any] = {"dfa": False}
ONE: dict[str, Any] = {**TALORA, "adapters": 1}


def ladder(updates: int, rate: float = 0.01) -> list[Row]:
    """MSFP's rungs, and what TALoRA has to beat: other tables, as many updates per adapter, and one adapter with its bytes."""
    return [
        *fresh("base", BASE, updates, rate),
        *fresh("+ mixup-sign", {**BASE, "mixup_sign": True}, updates, rate),
        *fresh("+ TALoRA", TALORA, updates, rate),
        *fresh("+ DFA, power 1", {}, updates, rate),
        *fresh("+ DFA, power 2", {"factor_power": 2.0}, updates, rate),
        *fresh("TALoRA by fixed halves", {**TALORA, "allocation": "halves"}, updates, rate),
        *fresh("TALoRA at random", {**TALORA, "allocation": "random"}, updates, rate),
        *fresh("TALoRA, as many per adapter", TALORA, 2 * updates, rate),
        *fresh("one adapter of rank 64", {**ONE, "rank": 64}, updates, rate),
        *fresh("one adapter, 8 bits", ONE, updates, rate, "w8a4"),
    ]


def mpqdm_ladder(updates: int, rate: float = 0.01) -> list[Row]:
    """MPQ-DM's rungs at W2A4."""
    omq: dict[str, Any] = {"relation": "off"}
    rungs: dict[str, dict[str, Any]] = {
        "MPQ-DM base": {**omq, "mixed": False},
        "OMQ, inputs not scaled": {**omq, "scale_inputs": False},
        "OMQ": omq,
        "OMQ and TRD in every step": {"relation_every": 1},
    }
    return [row for name, own in rungs.items() for row in fresh(name, own, updates, rate, "w2a4", "mpqdm")]


# With --samples 128. Training is kept under --work, so that a row that was cut off goes on where it was.
PAPERS["msfp-fresh"] = [
    Row("base, not fine-tuned", "msfp", "w4a4", {**BASE, "adapters": 0}),
    Row("+ mixup-sign, not fine-tuned", "msfp", "w4a4", {"adapters": 0}),
    *seeds("base, 800 updates on 256 rows", "msfp", "w4a4", BASE),
    *seeds("base, 160 updates of 16 on 256 rows", "msfp", "w4a4", {**BASE, "epochs": 8}),
    *seeds("base, 160 updates of 16 on fresh rows", "msfp", "w4a4", {**BASE, "epochs": 8, "fresh_rows": 1}),
    *fresh("base", BASE, 2000, 0.03),
    *fresh("base", BASE, 2000, 0.003),
    *ladder(2000),
    *ladder(16000),
    *mpqdm_ladder(16000),
]
MODELS = {
    "auto": NAMES,
    "lbfp": NAMES,
    "lbfp-seeds": NAMES,
    "fp4dit": ("emoji-pixart",),
    "fp4dit-seeds": ("emoji-pixart",),
    "msfp": NAMES,
    "msfp-fresh": ("emoji-unet",),
    "mpqdm": NAMES,
    "mpqdm-short": NAMES,
    "guided": NAMES,
}
