"""How difloat lives inside diffusers: the quantizer behind plain `from_pretrained` and `save_pretrained`.

Importing this module imports diffusers; `difloat.checkpoint.register` does so only once diffusers is in use.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers.configuration_utils import FrozenDict
from diffusers.quantizers import auto
from diffusers.quantizers.base import DiffusersQuantizer
from torch import Tensor, nn

from difloat.checkpoint import data_free, empty_layers, integrity
from difloat.checkpoint.casting import teach_casts
from difloat.checkpoint.config import DifloatConfig
from difloat.checkpoint.layout import (
    INPUT_BUNDLE,
    QUANT_METHOD,
    CheckpointError,
    bundle,
    bundled_names,
    plan_tensors,
    unbundle,
)
from difloat.checkpoint.packed_models import guard, unguard
from difloat.checkpoint.plan_config import quantization_config
from difloat.layers import install
from difloat.lora.flux_loader import teach_shapes
from difloat.plan.plan import LayerPlan

_BITS = {torch.float64: torch.int64, torch.float32: torch.int32, torch.float16: torch.int16}
_BITS[torch.bfloat16] = torch.int16


class DifloatQuantizer(DiffusersQuantizer):
    """Loads and saves models whose layers are packed already, or packs the layers of a float model while it loads. Final.

    The loader casts every floating tensor to the dtype it was asked for, before any hook could object. Vectors of quantized
    layers are float32 whatever that dtype is: they go into their layers before the loader sees them, and stay in memory where
    weights go to the disk. Weights are searched as they are stored: they pass the cast as integers.
    """

    use_keep_in_fp32_modules = True

    def __init__(self, quantization_config: DifloatConfig, **kwargs: Any) -> None:
        """Make the quantizer of a checkpoint's config, or of what a user asks for."""
        super().__init__(quantization_config, **kwargs)
        plan = quantization_config.plan
        if plan is not None and not self.pre_quantized:
            raise ValueError(
                "quantization_config with a plan must come from a difloat checkpoint, got a float model; "
                "load the model without it and call difloat.apply"
            )
        self.pre_quantized = plan is not None  # single files say True without a look
        self.config = quantization_config
        self._own = {} if plan is None else plan_tensors(plan)
        self._loaded_names: set[str] | None = None
        self._decision: Any = None
        self._float_dtypes: dict[str, torch.dtype] = {}
        self._found: dict[str, LayerPlan] = {}
        self._device_map: dict[str, Any] = {}
        self._model: nn.Module | None = None

    @property
    def plan(self) -> Any:
        """The plan that is loaded. None until a float model is quantized."""
        return self.config.plan

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Take note of which tensors go to disk. ValueError if the weights of a float model would."""
        device_map = kwargs.get("device_map")
        if isinstance(device_map, dict):
            self._device_map = device_map
            if not self.pre_quantized and "disk" in device_map.values():
                raise ValueError(
                    "device_map must not hold 'disk' while a float model is quantized, got one that does; "
                    "quantize and save it first, then load it with disk offload"
                )

    def update_torch_dtype(self, torch_dtype: torch.dtype | None) -> torch.dtype:
        """Dtype of all that is not quantized, float32 unless asked for, as diffusers loads unquantized models."""
        return torch.float32 if torch_dtype is None else torch_dtype

    def adjust_target_dtype(self, torch_dtype: torch.dtype) -> torch.dtype:
        """What weights are counted as where devices are chosen automatically: packed bytes."""
        return torch.uint8

    @property
    def supports_parallel_loading(self) -> bool:
        """Shards may be loaded side by side, but for layers that are swapped meanwhile."""
        return self.pre_quantized

    def maybe_update_loaded_keys(self, loaded_keys: list[str], checkpoint_files: list[str]) -> list[str]:
        """Replace the name of the bundled input vectors by the names of the vectors."""
        if self.plan is None:
            return loaded_keys
        integrity.check_loading(checkpoint_files)
        if all(str(file).endswith(".safetensors") for file in checkpoint_files):
            integrity.stored_names(checkpoint_files)
        names = [name for name in loaded_keys if name != INPUT_BUNDLE]
        if len(names) < len(loaded_keys):
            names += bundled_names(self.plan)
        self._loaded_names = set(names)
        return names

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        self._model = model
        if self.plan is None:
            float32 = kwargs.get("keep_in_fp32_modules") or ()
            self._decision = data_free.decide(model, self.config.settings, float32)
            return
        empty_layers.allocate(model, self.plan)
        empty_layers.cast_in_float32(model, kwargs.get("keep_in_fp32_modules") or ())
        if self._loaded_names is not None:
            empty_layers.check_names(model, self._loaded_names, empty_layers.other_names(model, self.plan))

    def update_missing_keys(self, model: Any, missing_keys: list[str], prefix: str) -> list[str]:
        """Leave out the further names of layers that are registered twice, which were loaded under their first."""
        again = set() if self.plan is None else empty_layers.other_names(model, self.plan)
        return [name for name in missing_keys if name not in again]

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        if self.plan is None:
            missing = [name for name in self._decision.layers if name not in self._found]
            if missing:
                raise CheckpointError(
                    f"weight of every layer must pass the loader, but that of {missing[0]!r} did not; "
                    "download the model again, and load without offload_state_dict"
                )
            self.config = DifloatConfig.from_dict(quantization_config(self._decision.plan(self._found)))
            self.quantization_config, self.pre_quantized = self.config, True
            self._decision, self._found = (
                None,
                {},
            )  # functions made on the spot could not be pickled with the model
        install.leave_inference_mode(model)
        mark(model, self)
        self._model = None

    def maybe_update_state_dict(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Take the vectors out of the loader's hands, and send weights to be searched past its cast as integers."""
        if self.plan is None:
            return self._with_weights_as_integers(state_dict)
        stored = state_dict.get(INPUT_BUNDLE)
        if stored is not None and (stored.dtype, stored.numel()) != (
            torch.float32,
            sum(bundled_names(self.plan).values()),
        ):
            raise CheckpointError(
                f"tensor {INPUT_BUNDLE!r} must be the plan's float32 input vectors, got another shape; download it again"
            )
        state = unbundle(state_dict, self.plan)
        for name in self._own.keys() & state.keys():
            if state[name].dtype != self._own[name].dtype:
                raise CheckpointError(
                    f"tensor {name!r:.200} must be {self._own[name].dtype}, got {state[name].dtype}; download or save it again"
                )
            if self._model is not None and not name.endswith(".weight"):
                empty_layers.place(self._model, name, state.pop(name), self._device_of(name))
        return state

    def _with_weights_as_integers(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        if (
            self._decision is None
        ):  # a single file, whose tensors have other names yet: the loader casts them first
            return state_dict
        state = dict(state_dict)
        for name in self._decision.layers:
            tensor = state.get(f"{name}.weight")
            if tensor is not None and tensor.dtype in _BITS:
                self._float_dtypes[name] = tensor.dtype
                state[f"{name}.weight"] = tensor.contiguous().view(_BITS[tensor.dtype])
        return state

    def _device_of(self, name: str) -> Any:
        """Where a vector goes: to the disk never, since hooks take only parameters back from there."""
        while name and name not in self._device_map:
            name = name.rpartition(".")[0]
        device = self._device_map.get(name, "cpu")
        return "cpu" if device == "disk" else device

    def check_if_quantized_param(
        self,
        model: nn.Module,
        param_value: Tensor,
        param_name: str,
        state_dict: dict[str, Any],
        **kwargs: Any,
    ) -> bool:
        """Whether the tensor is one of the plan's, or the weight of a layer to be quantized."""
        if self.plan is None:
            return (
                param_name.endswith(".weight") and param_name.removesuffix(".weight") in self._decision.layers
            )
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
        """Put one stored tensor into its layer, or quantize the layer with its float weight."""
        if self.plan is None:
            self._quantize(model, param_name.removesuffix(".weight"), param_value, target_device)
            return
        empty_layers.place(model, param_name, param_value, target_device)

    def _quantize(self, model: nn.Module, name: str, value: Tensor, device: torch.device) -> None:
        dtype = self._float_dtypes.pop(name, value.dtype)
        layer_plan = self._decision.layers[name](value.view(dtype).to(device))
        install.install(model, name, layer_plan, device)
        # The plan of the model is made of shapes: its tensors are in the layers already.
        self._found[name] = empty_layers.without_values(layer_plan)

    def get_state_dict_and_metadata(
        self, state_dict: dict[str, Any], safe_serialization: bool = False
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """State dict as stored, without metadata, since the config says it all. CheckpointError if adapters are loaded."""
        if wrapped := [name for name in state_dict if ".base_layer." in name]:
            raise CheckpointError(
                f"model must have no adapters to be saved, but {wrapped[0]!r:.200} has one; "
                "call unload_lora_weights, before it fuse_lora if they shall stay"
            )
        return bundle(empty_layers.as_stored(self.plan, state_dict), self.plan), {}

    def _dequantize(self, model: Any) -> Any:
        dtype = model.dtype
        unmark(model)
        model.hf_quantizer = self  # the caller deletes it
        return install.restore(model, dtype)

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


def _register() -> None:
    """Enter difloat into the two dictionaries by which diffusers finds quantizers."""
    auto.AUTO_QUANTIZATION_CONFIG_MAPPING.setdefault(QUANT_METHOD, DifloatConfig)
    auto.AUTO_QUANTIZER_MAPPING.setdefault(QUANT_METHOD, DifloatQuantizer)


def quantizer(fields: Mapping[str, Any]) -> DifloatQuantizer:
    """The quantizer of a model that is quantized already, from the JSON object of its plan."""
    return DifloatQuantizer(DifloatConfig.from_dict(fields))


def built_again(model: Any) -> nn.Module:
    """A model built from the config of `model` as diffusers does it before loading: parameters on the meta device."""
    import accelerate
    from diffusers.models.modeling_utils import no_init_weights

    config = {name: value for name, value in model.config.items() if name != "quantization_config"}
    with torch.random.fork_rng(devices=[]), no_init_weights(), accelerate.init_empty_weights():
        built: nn.Module = type(model).from_config(config)
    return built


def mark(model: Any, quantizer: DifloatQuantizer) -> None:
    """Let diffusers see that `model` is quantized, so that `save_pretrained` stores it as such."""
    teach_casts()
    if hasattr(model, "load_lora_adapter"):
        teach_shapes()
    config = quantizer.config
    # The object, as diffusers itself does: PEFT asks it for a dict.
    _set_entries(model, {**model._internal_dict, "quantization_config": config})
    guard(model)
    model.hf_quantizer = quantizer
    model.is_quantized = True
    model.quantization_method = config.quant_method
    model.difloat_plan = config.origin()


def unmark(model: Any) -> None:
    """Take back what `mark` did to a model."""
    unguard(model)
    # A None in the config cannot be saved, so the entry goes altogether.
    _set_entries(model, {k: v for k, v in model._internal_dict.items() if k != "quantization_config"})
    model.is_quantized = False
    for name in ("hf_quantizer", "quantization_method", "difloat_plan"):
        if name in vars(model):
            delattr(model, name)


def _set_entries(model: Any, entries: Mapping[str, Any]) -> None:
    """Make the frozen config anew with other entries, while attributes that were set beside the entries stay.

    diffusers keeps there what is no argument of the model: loading an IP-Adapter sets `encoder_hid_dim_type` on the config,
    and the forward pass asks for the attribute.
    """
    old = model._internal_dict
    beside = {
        name: value
        for name, value in vars(old).items()
        if not name.startswith("_FrozenDict__") and (name not in old or value is not old[name])
    }
    model._internal_dict = FrozenDict(entries)
    for name, value in beside.items():
        setattr(model._internal_dict, name, value)


_register()
