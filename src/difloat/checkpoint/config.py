"""`DifloatConfig`, the quantization config for `from_pretrained` of diffusers and transformers, which this module imports."""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from typing import Any

from diffusers.quantizers.quantization_config import QuantizationConfigMixin as DiffusersConfig
from transformers.utils.quantization_config import QuantizationConfigMixin as TransformersConfig

from difloat.checkpoint import data_free
from difloat.checkpoint.layout import QUANT_METHOD
from difloat.checkpoint.plan_config import parse_config
from difloat.checkpoint.register import register
from difloat.plan.plan import Plan


class DifloatMethod(str, Enum):
    """The name under which the libraries know difloat. diffusers reads `.value`, so a plain string would not do."""

    DIFLOAT = QUANT_METHOD


class DifloatConfig(DiffusersConfig, TransformersConfig):
    """A config that quantizes a model while it loads, without data, or the `quantization_config` of a difloat checkpoint.

    >>> import difloat
    >>> from diffusers import PixArtTransformer2DModel
    >>> from difloat.reference_models import ASSETS
    >>> config = difloat.DifloatConfig(weights="e2m1", bits="w4a8")
    >>> model = PixArtTransformer2DModel.from_pretrained(
    ...     ASSETS / "emoji-pixart" / "transformer", quantization_config=config
    ... )
    >>> model.transformer_blocks[0].attn1.to_k.weight.dtype
    torch.uint8

    Weights are searched one by one, and inputs get their scales at run time. Calibration, from which recipes learn, is missing.

    Args:
        weights: The name of a format, or "search" for the best one of the width per layer, which is the default.
        bits: Weight and activation bits like "w4a8", where a16 leaves inputs alone. The default is 4 bits, or the width of
            the format of `weights`, and 8-bit inputs.
        activations: The format of the inputs. The default is the one that GPUs compute best.
        group_size: Input channels per weight scale, or 0 for one scale per output channel. The default is 128.
        exclude: Layers that stay as they are, as names, parts of names between dots, or patterns with ``*``.
        outside: "keep" or "8bit" for layers outside of all lists of blocks, such as embedders and final projections.
        target: "cpu" for formats that CPUs compute in integers, or "any".
        rotate: Whether inputs of linear layers are rotated. The default is no.
        **plan: The fields of the JSON object of a checkpoint, as `plan_config.quantization_config` writes it.

    Raises:
        ValueError: if a name is unknown or a value is not allowed.
        CheckpointError: if the fields are no whole plan.
    """

    def __init__(
        self,
        weights: str | None = None,
        bits: str | None = None,
        activations: str | None = None,
        group_size: int | None = None,
        exclude: list[str] | tuple[str, ...] | None = None,
        outside: str | None = None,
        target: str | None = None,
        rotate: bool | None = None,
        **plan: Any,
    ) -> None:
        """Take the wishes of a user, or the fields of a plan."""
        self.quant_method: Any = DifloatMethod.DIFLOAT
        self.plan: Plan | None = None
        wishes = {
            "weights": weights,
            "bits": bits,
            "activations": activations,
            "group_size": group_size,
            "exclude": exclude,
            "outside": outside,
            "target": target,
            "rotate": rotate,
        }
        given = {name: value for name, value in wishes.items() if value is not None}
        plan.pop("quant_method", None)
        if "layers" in plan:
            self.fields = {"quant_method": QUANT_METHOD, **given, **plan}
            self.plan = parse_config(self.fields)
        else:
            self.settings: Any = data_free.settings({**given, **plan})
            self.fields = {"quant_method": QUANT_METHOD, **given}

    @classmethod
    def from_dict(
        cls, config_dict: Mapping[str, Any], return_unused_kwargs: bool = False, **kwargs: Any
    ) -> Any:
        """The config of a checkpoint from its JSON object.

        Raises:
            CheckpointError: if the object is no whole plan.
        """
        if "layers" not in config_dict:
            parse_config(config_dict)  # says what is missing; wishes of a user are no config of a checkpoint
        config = cls(**config_dict)
        return (config, kwargs) if return_unused_kwargs else config

    def to_dict(self) -> dict[str, Any]:
        """The JSON object."""
        return dict(self.fields)

    def origin(self) -> dict[str, Any]:
        """The fields that a marked model keeps of its plan. The rest is read off its layers."""
        return {key: self.fields[key] for key in ("recipe", "bits", "options", "skipped")}

    def to_diff_dict(self) -> dict[str, Any]:
        """The JSON object, for the representation of the base class."""
        return self.to_dict()

    def __iter__(self) -> Any:
        return iter(self.fields.items())

    def get(self, name: str, default: Any = None) -> Any:
        """A field of the JSON object, as transformers asks for it where a model's config is used again."""
        return self.fields.get(name, default)


register()
