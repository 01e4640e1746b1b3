"""How a format is laid over a tensor: what shares a scale, where the scale comes from. Plain data, no tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from difloat import formats
from difloat.formats import Format

Granularity = Literal["tensor", "channel", "group", "token"]


@dataclass(frozen=True)
class QuantSpec:
    """How one tensor is quantized.

    Attributes:
        format: The grid.
        granularity: What shares a scale: the tensor, an output channel (weights), a token (activations: one row along the
            channel axis), or `group_size` input channels of one output channel or one token.
        group_size: Input channels per group; only with granularity "group".
        online: The scale comes from the data at run time, nothing is stored: the largest magnitude becomes the largest value
            of the grid; with a zero point the smallest value becomes the smallest of the grid as well.
        zero_point: A real offset is added after the grid (``value * scale + zero_point``).
    """

    format: Format
    granularity: Granularity = "tensor"
    group_size: int | None = None
    online: bool = False
    zero_point: bool = False

    def __post_init__(self) -> None:
        if self.granularity not in get_args(Granularity):
            raise ValueError(f"granularity must be one of {get_args(Granularity)}, got {self.granularity!r}")
        if (self.granularity == "group") != (self.group_size is not None):
            raise ValueError(
                f"group_size must be given exactly with granularity 'group', got {self.group_size!r}"
            )
        if self.group_size is not None and self.group_size < 1:
            raise ValueError(f"group_size must be at least 1, got {self.group_size}")
        if self.granularity == "token" and not self.online:
            raise ValueError("granularity 'token' must be online, since tokens are not known beforehand")

    def to_json(self) -> dict[str, Any]:
        """The fields that differ from their defaults, with the format by name."""
        data: dict[str, Any] = {"format": self.format.name, "granularity": self.granularity}
        if self.group_size is not None:
            data["group_size"] = self.group_size
        if self.online:
            data["online"] = True
        if self.zero_point:
            data["zero_point"] = True
        return data

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> QuantSpec:
        """Inverse of `to_json`; ValueError on an unknown field, format or value."""
        unknown = set(data) - {"format", "granularity", "group_size", "online", "zero_point"}
        if unknown or "format" not in data:
            raise ValueError(
                f"quantization spec must have 'format' and known fields only, got {sorted(data)}"
            )
        return QuantSpec(**{**data, "format": formats.parse(data["format"])})

    def scale_count(self, out_channels: int, in_channels: int) -> int:
        """How many scales a weight of this shape stores."""
        if self.granularity == "tensor":
            return 1
        return out_channels * (-(-in_channels // self.group_size) if self.group_size else 1)


def _check_activation(spec: QuantSpec) -> None:
    if spec.granularity == "channel":
        raise ValueError("activation granularity must be 'tensor', 'token' or 'group', got 'channel'")
    if spec.granularity == "group" and not spec.online:
        raise ValueError(
            "activation granularity 'group' must be online, since tokens are not known beforehand"
        )


@dataclass(frozen=True)
class Part:
    """A run of input channels of one layer with its own formats; `activation` None leaves the input as it is."""

    channels: int
    weight: QuantSpec
    activation: QuantSpec | None = None

    def __post_init__(self) -> None:
        if self.channels < 1:
            raise ValueError(f"channels of a part must be at least 1, got {self.channels}")
        if self.weight.online or self.weight.granularity == "token":
            raise ValueError(f"weight scales must be stored, got an online spec {self.weight.to_json()}")
        if self.activation is not None:
            _check_activation(self.activation)

    def to_json(self) -> dict[str, Any]:
        """Plain data that `from_json` reads."""
        data = {"channels": self.channels, "weight": self.weight.to_json()}
        return data if self.activation is None else {**data, "activation": self.activation.to_json()}

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Part:
        """Inverse of `to_json`; ValueError on missing or unknown fields."""
        if not {"channels", "weight"} <= set(data) <= {"channels", "weight", "activation"}:
            raise ValueError(
                f"a part must have 'channels', 'weight' and perhaps 'activation', got {sorted(data)}"
            )
        activation = data.get("activation")
        return Part(
            int(data["channels"]),
            QuantSpec.from_json(data["weight"]),
            None if activation is None else QuantSpec.from_json(activation),
        )


@dataclass(frozen=True)
class AttentionPlan:
    """What is rounded inside one attention; nothing is stored for it, all scales come from the data or the grid.

    Attributes:
        operand: Grid of query, key and value after the heads are split, one online scale per token and head; None
            leaves them.
        softmax: Unsigned grid of the attention map, whose largest value stands for 1; None leaves the map.
    """

    operand: Format | None = None
    softmax: Format | None = None

    def __post_init__(self) -> None:
        if self.operand is None and self.softmax is None:
            raise ValueError("an attention plan must quantize its operands or its map, got neither")
        if self.softmax is not None and self.softmax.min < 0:
            raise ValueError(f"grid of an attention map must be unsigned, got {self.softmax.name}")

    def to_json(self) -> dict[str, str]:
        """Names of the grids that are there."""
        grids = {"operand": self.operand, "softmax": self.softmax}
        return {name: grid.name for name, grid in grids.items() if grid is not None}

    @staticmethod
    def from_json(data: Mapping[str, str]) -> AttentionPlan:
        """Inverse of `to_json`; ValueError on an unknown field or format."""
        if unknown := set(data) - {"operand", "softmax"}:
            raise ValueError(
                f"an attention plan must have 'operand' and 'softmax' only, got {sorted(unknown)}"
            )
        return AttentionPlan(**{name: formats.parse(grid) for name, grid in data.items()})
