"""The plan of a model as the `quantization_config` of its `config.json`."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from typing import Annotated, Any

import torch
from pydantic import Field

from difloat.checkpoint.layout import QUANT_METHOD, CheckpointError
from difloat.plan.plan import PLAN_VERSION, ROTATED_VERSION, LayerPlan, LayerSpec, Plan
from difloat.plan.specs import AttentionPlan
from difloat.plan.validation import LISTED, OPTIONAL, Rule, plain, read, record, shown

_Timestep = Annotated[float, Field(ge=-1e300, le=1e300, title="timestep"), Rule("be a finite number")]
# Fields and plans of `parsed_once`.
_parsed: ContextVar[list[tuple[dict[str, Any], Plan]] | None] = ContextVar("parsed", default=None)


@record("quantization_config")
class _Stored:
    """The JSON object of a plan. Its layers are read one by one, so that an error can name one."""

    version: int
    recipe: str
    bits: str
    options: Mapping[str, Any]
    layers: Mapping[str, Any]
    skipped: Mapping[str, Annotated[str, Field(title="reason of a skipped layer")]]
    attention: Annotated[Mapping[str, AttentionPlan], OPTIONAL] = dataclasses.field(default_factory=dict)
    timesteps: Annotated[tuple[_Timestep, ...], LISTED, OPTIONAL] = ()

    def __post_init__(self) -> None:
        if list(self.timesteps) != sorted(self.timesteps):
            raise ValueError(f"timesteps must be ascending, got {shown(self.timesteps)}")


def quantization_config(plan: Plan) -> dict[str, Any]:
    """The `quantization_config` of `config.json`. It is a ValueError if the plan's options are no JSON."""
    layers = {name: plain(layer) for name, layer in plan.layers.items()}
    stored = _Stored(
        max((layer.version for layer in plan.layers.values()), default=PLAN_VERSION),
        plan.recipe,
        plan.bits,
        plan.options,
        layers,
        plan.skipped,
        plan.attention,
        plan.timesteps,
    )
    try:
        return {"quant_method": QUANT_METHOD, **plain(stored)}
    except ValueError as error:
        raise ValueError(
            f"options of a plan must be numbers, strings, lists and dicts, but {error}"
        ) from error


@contextlib.contextmanager
def parsed_once() -> Iterator[None]:
    """Inside, equal configs give one plan: difloat reads a config before a library loads the model and reads it again."""
    token = _parsed.set([])
    try:
        yield
    finally:
        _parsed.reset(token)


def parse_config(config: object) -> Plan:
    """Make a plan from its `quantization_config`, with tensors on the meta device that say dtype and shape only.

    Raises:
        CheckpointError: if it is damaged, of another method or of another version.
    """
    if not isinstance(config, Mapping) or "quant_method" not in config:
        raise CheckpointError(
            "config.json must hold a quantization_config of difloat, got none; save with difloat.save"
        )
    fields = {key: value for key, value in config.items() if key != "quant_method"}
    method = getattr(config["quant_method"], "value", config["quant_method"])
    if method != QUANT_METHOD:
        raise CheckpointError(
            f"quant_method must be {QUANT_METHOD!r}, got {shown(method)}; load it with its own library"
        )
    version = fields.get("version")
    if type(version) is not int or version not in (PLAN_VERSION, ROTATED_VERSION):
        raise CheckpointError(
            f"checkpoint must be of version {PLAN_VERSION} or {ROTATED_VERSION}, got {shown(version)}; "
            "load it with the difloat that wrote it, or update"
        )
    known = _parsed.get()
    for before, plan in known or ():
        if before == fields:
            return plan
    plan = _plan_of(fields)
    if known is not None:
        known.append((fields, plan))
    return plan


def _plan_of(fields: Mapping[str, Any]) -> Plan:
    try:
        stored = read(_Stored, fields)
        layers = {name: _parse_layer(name, data, stored.version) for name, data in stored.layers.items()}
        return Plan(
            stored.recipe,
            stored.bits,
            layers,
            stored.skipped,
            stored.options,
            attention=stored.attention,
            timesteps=stored.timesteps,
        )
    except CheckpointError:
        raise
    except ValueError as error:
        raise CheckpointError(
            f"quantization_config must be a whole plan, but {error!s:.300}; the file is damaged, download or save it again"
        ) from error


def _parse_layer(name: str, data: Any, version: int) -> LayerPlan:
    try:
        layer = read(LayerSpec, data)
        if layer.version > version:
            raise ValueError(
                f"a file of version {version} cannot have what came with version {layer.version}"
            )
        if any(spec.online for band in layer.bands for spec in band.weights):
            raise ValueError("a weight cannot have online scales")
        return layer.with_tensors(
            {
                key: torch.empty(size, dtype=LayerPlan.dtype_of(key), device="meta")
                for key, size in layer.tensor_shapes().items()
            }
        )
    except ValueError as error:
        raise CheckpointError(
            f"plan of layer {name!r:.200} must be valid, but {error!s:.300}; the file is damaged"
        ) from error
