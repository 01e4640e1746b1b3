"""How difloat lives inside transformers: the quantizer behind plain `from_pretrained` and `save_pretrained` of text encoders.

Importing this module imports transformers; `difloat.checkpoint.register` does so only once transformers is in use.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps
from transformers.quantizers import auto
from transformers.quantizers.base import HfQuantizer

from difloat.checkpoint import data_free, empty_layers, integrity
from difloat.checkpoint.config import DifloatConfig
from difloat.checkpoint.layout import QUANT_METHOD, CheckpointError, bundled_names, check_stored, plan_tensors
from difloat.checkpoint.plan_config import quantization_config
from difloat.layers import install
from difloat.layers.packed import QuantizedLayer
from difloat.plan.plan import LayerPlan, Plan


class DifloatHfQuantizer(HfQuantizer):
    """Loads and saves models whose layers are packed already, or packs the layers of a float model while it loads. Final.

    Vectors need no disguise here: the loader gives a stored tensor the dtype of the empty one, which is float32.
    """

    def __init__(self, quantization_config: DifloatConfig, **kwargs: Any) -> None:
        """Make the quantizer of a checkpoint's config, or of what a user asks for."""
        super().__init__(quantization_config, **kwargs)
        plan = quantization_config.plan
        if plan is not None and not self.pre_quantized:
            raise ValueError(
                "quantization_config with a plan must come from a difloat checkpoint, got a float model; "
                "load the model without it and call difloat.apply"
            )
        self.config = quantization_config
        self._own = {} if plan is None else plan_tensors(plan)
        self._decision: Any = None
        self._found: dict[str, LayerPlan] = {}

    @property
    def plan(self) -> Any:
        """The plan that is loaded. None until a float model is quantized."""
        return self.config.plan

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Refuse versions with another loader, static input scales, and disk offload while quantizing."""
        if not hasattr(HfQuantizer, "get_quantize_ops"):
            raise ImportError(
                "quantized text encoders need transformers 5 or newer, got an older one; update transformers"
            )
        check_online(self.plan)
        device_map = kwargs.get("device_map")
        if self.plan is None and isinstance(device_map, dict) and "disk" in device_map.values():
            raise ValueError(
                "device_map must not hold 'disk' while a float model is quantized, got one that does; "
                "quantize and save it first, then load it with disk offload"
            )

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        if self.plan is None:
            self._decision = data_free.decide(model, self.config.settings)
            return
        empty_layers.allocate(model, self.plan)
        for name in self.plan.layers:
            _settle(model.get_submodule(name))
        files = kwargs.get("checkpoint_files")
        if files:
            integrity.check_loading(files)
        found = _names(files) if files else None
        if found is not None and (missing := sorted(self._own.keys() - found)):
            raise CheckpointError(
                f"checkpoint must hold the tensors of the plan, but {missing[0]!r:.200} is missing; download or save it again"
            )

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> None:
        if self.plan is None:
            plan = self._decision.plan(self._found)
            self.config = DifloatConfig.from_dict(quantization_config(plan))
            self.quantization_config, self.pre_quantized = self.config, True
            self._own, self._found = plan_tensors(plan), {}
            self._decision = None  # functions made on the spot could not be pickled with the model
        _answer(model)
        for name, value in self._tensors(model):
            if not value.is_meta:
                check_stored(name, self.plan.layers[name.rpartition(".")[0]], value)
        install.leave_inference_mode(model)
        mark(model, self)

    def _tensors(self, model: nn.Module) -> list[tuple[str, Tensor]]:
        return [(name, value) for name, value in model.named_buffers() if name in self._own]

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        """Whether the tensor is the weight of a layer to be quantized."""
        return (
            self.plan is None
            and param_name.endswith(".weight")
            and param_name.removesuffix(".weight") in self._decision.layers
        )

    def get_quantize_ops(self) -> ConversionOps:
        """What the loader does with such a weight."""
        return _Quantize(self)

    def quantize(self, model: nn.Module, name: str, weight: Tensor) -> None:
        """Swap one layer of a model that is being loaded."""
        layer_plan = self._decision.layers[name](weight)
        install.install(model, name, layer_plan, weight.device)
        _settle(model.get_submodule(name))
        self._found[name] = empty_layers.without_values(layer_plan)

    def get_state_dict_and_metadata(self, model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
        """State dict as stored: packed weights are uint8."""
        return empty_layers.as_stored(self.plan, model.state_dict()), {}

    def _dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        return install.restore(model, model.dtype if dtype is None else dtype)

    def remove_quantization_config(self, model: Any) -> None:
        """Take back what `mark` did to a model."""
        unmark(model)

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


class _Quantize(ConversionOps):
    """One weight on its way from the file into the model."""

    def __init__(self, quantizer: DifloatHfQuantizer) -> None:
        self.quantizer = quantizer

    def convert(
        self,
        input_dict: dict[str, Any],
        source_patterns: list[str],
        target_patterns: list[str],
        **kwargs: Any,
    ) -> dict[str, list[Tensor]]:
        """Quantize the layer, which leaves nothing for the loader to do."""
        model, missing = kwargs["model"], kwargs["missing_keys"]
        for name, value in input_dict.items():
            weight = value[0] if isinstance(value, list) else value
            self.quantizer.quantize(model, name.removesuffix(".weight"), weight)
            missing.discard(name)
        return {}


def _register() -> None:
    """Enter difloat where transformers finds quantizers."""
    if QUANT_METHOD not in auto.AUTO_QUANTIZATION_CONFIG_MAPPING:
        auto.register_quantization_config(QUANT_METHOD)(DifloatConfig)
        auto.register_quantizer(QUANT_METHOD)(DifloatHfQuantizer)


def quantizer(fields: Mapping[str, Any]) -> DifloatHfQuantizer:
    """The quantizer of a model that is quantized already, from the JSON object of its plan."""
    return DifloatHfQuantizer(DifloatConfig.from_dict(fields))


def built_again(model: Any) -> nn.Module:
    """A model built from the config of `model`, on the meta device as transformers does it before loading."""
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        built: nn.Module = type(model)(copy.deepcopy(model.config))
    return built


def mark(model: Any, quantizer: DifloatHfQuantizer) -> None:
    """Let transformers see that `model` is quantized, so that `save_pretrained` stores it as such.

    Raises:
        ValueError: if a layer has static input scales.
    """
    config = quantizer.config
    check_online(config.plan)
    model.config.quantization_config = config
    model.hf_quantizer = quantizer
    model.is_quantized = True
    model.quantization_method = config.quant_method
    model.difloat_plan = config.origin()


def unmark(model: Any) -> None:
    """Take back what `mark` did to a model."""
    for owner, name in (
        (model.config, "quantization_config"),
        (model, "hf_quantizer"),
        (model, "quantization_method"),
        (model, "difloat_plan"),
    ):
        if name in vars(owner):
            delattr(owner, name)
    model.is_quantized = False


def check_online(plan: Plan | None) -> None:
    """ValueError if a layer has stored input scales: the file keeps them in one tensor, which this loader cannot take apart."""
    if plan is not None and (names := bundled_names(plan)):
        raise ValueError(
            f"inputs of a text encoder must have online scales, but {min(names)!r:.200} is stored; "
            "quantize it with components= or DifloatConfig"
        )


def _names(files: Sequence[str]) -> set[str] | None:
    """Names in the safetensors files of a checkpoint. None for another kind of file."""
    if not all(str(file).endswith(".safetensors") for file in files):
        return None
    return integrity.stored_names(files)


def _settle(layer: nn.Module) -> None:
    """Keep transformers from drawing the tensors of a layer at random where it does not fill them itself."""
    own: list[Any] = [layer, *layer.parameters(recurse=False), *layer.buffers(recurse=False)]
    for loaded in own:
        loaded._is_hf_initialized = True


def _answer(model: Any) -> None:
    """Layers whose parent asks for their dtype: int8, with the cast that the float model of this dtype does."""
    kept = model._get_dtype_plan(model.config.dtype)
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLayer) and module.stored_dtype == torch.int8:
            module.hold(module.packed.detach())
            part = next((part for part in name.split(".") if part in kept), None)
            module.input_dtype = None if part is None else kept[part]


_register()
