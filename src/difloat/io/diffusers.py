"""How difloat lives inside diffusers: the config and the quantizer behind plain `from_pretrained` and `save_pretrained`.

Importing this module imports diffusers; `difloat.io.register_with_diffusers` does so only once diffusers is in use.
"""

from __future__ import annotations

from enum import Enum
from typing import Any

import torch
from diffusers.configuration_utils import FrozenDict
from diffusers.quantizers import auto
from diffusers.quantizers.base import DiffusersQuantizer
from diffusers.quantizers.quantization_config import QuantizationConfigMixin
from torch import Tensor, nn

from difloat import attention, layers
from difloat.io.layout import (
    INPUT_BUNDLE,
    QUANT_METHOD,
    CheckpointError,
    bundle,
    bundled_names,
    check_stored,
    parse_config,
    plan_tensors,
    unbundle,
)
from difloat.layers import QuantizedLayer
from difloat.quantizer import LayerPlan
from difloat.timesteps import Clock


class DifloatMethod(str, Enum):
    """The name under which diffusers knows difloat; it reads `.value`, so a plain string would not do."""

    DIFLOAT = QUANT_METHOD


class DifloatConfig(QuantizationConfigMixin):
    """The `quantization_config` of a difloat checkpoint, as `layout.quantization_config` writes it.

    Raises:
        CheckpointError: if the fields are no whole plan, in particular if there is none: difloat calibrates on the
            model's own sampling, so `from_pretrained(..., quantization_config=DifloatConfig())` cannot quantize.
    """

    def __init__(self, **fields: Any) -> None:
        """Take the fields of the JSON object."""
        if not set(fields) - {"quant_method"}:
            raise CheckpointError(
                "DifloatConfig must hold a plan, got none; quantize a loaded model with difloat.quantize"
            )
        self.quant_method: Any = DifloatMethod.DIFLOAT
        self.fields = {"quant_method": QUANT_METHOD, **fields}
        self.plan = parse_config(self.fields)

    def to_dict(self) -> dict[str, Any]:
        """The JSON object."""
        return dict(self.fields)

    def to_diff_dict(self) -> dict[str, Any]:
        """The JSON object; the representation of the base class asks for it."""
        return self.to_dict()


class DifloatQuantizer(DiffusersQuantizer):
    """Loads and saves models whose layers are packed already. Final.

    The loader casts every floating tensor to the dtype it was asked for, before any hook could object. Vectors of
    quantized layers are float32 whatever that dtype is, so they pass the cast as int32.
    """

    use_keep_in_fp32_modules = True

    def __init__(self, quantization_config: DifloatConfig, **kwargs: Any) -> None:
        """Refuse to quantize while loading."""
        super().__init__(quantization_config, **kwargs)
        if not self.pre_quantized:
            raise ValueError(
                "quantization_config of difloat must come from a difloat checkpoint, got a float model; "
                "load the model without it and call difloat.quantize"
            )
        self.config = quantization_config
        self.plan = quantization_config.plan
        self._own = plan_tensors(self.plan)
        self._loaded_names: set[str] | None = None

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Refuse offloading to disk while loading: it would store the vectors as the int32 they pass the loader as."""
        device_map = kwargs.get("device_map")
        if isinstance(device_map, dict) and "disk" in device_map.values():
            raise ValueError(
                "device_map of a difloat model must not hold 'disk', got one that does; allow more CPU memory"
            )

    def update_torch_dtype(self, torch_dtype: torch.dtype | None) -> torch.dtype:
        """Dtype of all that is not quantized; float32 unless asked for, as diffusers loads unquantized models."""
        return torch.float32 if torch_dtype is None else torch_dtype

    def maybe_update_loaded_keys(self, loaded_keys: list[str], checkpoint_files: list[str]) -> list[str]:
        """Replace the name of the bundled input vectors by the names of the vectors."""
        names = [name for name in loaded_keys if name != INPUT_BUNDLE]
        if len(names) < len(loaded_keys):
            names += bundled_names(self.plan)
        self._loaded_names = set(names)
        return names

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        modules = dict(model.named_modules())
        for name, layer_plan in self.plan.layers.items():
            old = modules.get(name)
            if not isinstance(old, nn.Linear | nn.Conv2d) or tuple(old.weight.shape) != layer_plan.shape:
                raise CheckpointError(
                    f"plan must fit {type(model).__name__}, but {name!r:.200} of shape {layer_plan.shape} is no layer of it; "
                    "config.json is of another model"
                )
            layer = layers.empty_like(old)
            layer.allocate(layer_plan, "meta")
            layers.replace(model, name, layer)
        attention.install(model, self.plan.attention)
        if self.plan.timesteps:
            layers.set_clock(model, Clock(model, self.plan.timesteps))
        self._check_names(model)

    def _check_names(self, model: nn.Module) -> None:
        """A tensor too few would stay empty and one too many be dropped, with no more than a warning by the loader."""
        if self._loaded_names is None:
            return
        expected = set(model.state_dict())
        for wrong, what in (
            (expected - self._loaded_names, "missing"),
            (self._loaded_names - expected, "one too many"),
        ):
            if wrong:
                raise CheckpointError(
                    f"checkpoint must hold the tensors of {type(model).__name__}, but {min(wrong)!r:.200} is {what}; "
                    "download or save it again"
                )

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        mark(model, self)
        for name, module in model.named_modules():
            if isinstance(module, QuantizedLayer) and module.weight_scale.dtype != torch.float32:
                raise CheckpointError(
                    f"scales of {name!r} must be loaded as float32, got {module.weight_scale.dtype}; "
                    "load without offload_state_dict"
                )

    def maybe_update_state_dict(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Take the bundle apart and send every vector as int32 past the loader's cast."""
        stored = state_dict.get(INPUT_BUNDLE)
        if stored is not None and (stored.dtype, stored.numel()) != (
            torch.float32,
            sum(bundled_names(self.plan).values()),
        ):
            raise CheckpointError(
                f"tensor {INPUT_BUNDLE!r} must be the plan's float32 input vectors, got another shape; download it again"
            )
        state = unbundle(state_dict, self.plan)
        for name, tensor in state.items():
            if name in self._own and tensor.dtype != self._own[name].dtype:
                raise CheckpointError(
                    f"tensor {name!r:.200} must be {self._own[name].dtype}, got {tensor.dtype}; download or save it again"
                )
            if name in self._own and tensor.dtype == torch.float32:
                state[name] = tensor.view(torch.int32)
        return state

    def check_if_quantized_param(
        self,
        model: nn.Module,
        param_value: Tensor,
        param_name: str,
        state_dict: dict[str, Any],
        **kwargs: Any,
    ) -> bool:
        """Whether the tensor is one of the plan's."""
        return param_name in self._own

    def check_quantized_param_shape(
        self, param_name: str, current_param: Tensor, loaded_param: Tensor
    ) -> bool:
        """Called if the shapes differ: they never may."""
        raise CheckpointError(
            f"tensor {param_name!r:.200} must have the shape {list(current_param.shape)}, got {list(loaded_param.shape)}; "
            "download or save it again"
        )

    def create_quantized_param(  # type: ignore[override]
        self,
        model: nn.Module,
        param_value: Tensor,
        param_name: str,
        target_device: torch.device,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        """Put one stored tensor into its layer."""
        layer_name, _, key = param_name.rpartition(".")
        layer = model.get_submodule(layer_name)
        if key == "weight":
            layer.weight = nn.Parameter(param_value.to(target_device), requires_grad=False)
        else:
            values = param_value.view(LayerPlan.dtype_of(key))
            check_stored(param_name, self.plan.layers[layer_name], values)
            setattr(layer, key, values.to(target_device))

    def get_state_dict_and_metadata(
        self, state_dict: dict[str, Any], safe_serialization: bool = False
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """State dict as stored; no metadata, since the config says it all."""
        return bundle(state_dict, self.plan), {}

    def _dequantize(self, model: Any) -> Any:
        dtype = model.dtype
        unmark(model)
        model.hf_quantizer = self  # the caller deletes it
        return layers.restore(model, dtype)

    @property
    def is_serializable(self) -> bool:
        """`save_pretrained` works."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Adapters can be trained on top: the input's gradient is defined."""
        return True

    @property
    def is_compileable(self) -> bool:
        """Layers are plain modules that call registered operators."""
        return True


def register() -> None:
    """Enter difloat into the two dictionaries by which diffusers finds quantizers; again does nothing."""
    auto.AUTO_QUANTIZATION_CONFIG_MAPPING.setdefault(QUANT_METHOD, DifloatConfig)
    auto.AUTO_QUANTIZER_MAPPING.setdefault(QUANT_METHOD, DifloatQuantizer)


def mark(model: Any, quantizer: DifloatQuantizer) -> None:
    """Let diffusers see that `model` is quantized, so that `save_pretrained` stores it as such."""
    config = quantizer.config
    model.register_to_config(quantization_config=config.to_dict())
    model.hf_quantizer = quantizer
    model.is_quantized = True
    model.quantization_method = config.quant_method
    model.difloat_plan = {key: config.fields[key] for key in ("recipe", "bits", "options", "skipped")}


def unmark(model: Any) -> None:
    """Undo `mark`."""
    # The config is frozen and a None in it cannot be saved, so it is made anew without the entry.
    model._internal_dict = FrozenDict(
        {k: v for k, v in model._internal_dict.items() if k != "quantization_config"}
    )
    model.is_quantized = False
    for name in ("hf_quantizer", "quantization_method", "difloat_plan"):
        if name in vars(model):
            delattr(model, name)
