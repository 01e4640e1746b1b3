"""The libraries that quantize the pipelines of `benchmarks/integration.py`, each told as its documentation says."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline
from pipelines import DTYPE, PIPELINES
from torch import nn


@dataclass(frozen=True)
class Library:
    """One column: how a library is told to quantize, by its own documentation."""

    package: str
    what: str  # for the reader
    config: Callable[[], Any]  # of diffusers
    text_config: Callable[[], Any]  # of transformers
    by_hand: Callable[[nn.Module], nn.Module] | None = None  # where diffusers' way needs a GPU
    float_convolutions: bool = True
    no_training: str = ""  # of models with quantized convolutions
    environment: tuple[tuple[str, str], ...] = ()


def _difloat() -> Any:
    from difloat import DifloatConfig

    return DifloatConfig(weights="e2m1")


def _sdnq(weights: str) -> Callable[[], Any]:
    def make() -> Any:
        from sdnq import SDNQConfig

        return SDNQConfig(weights_dtype=weights, quant_conv=True, minimum_allowed_numel=0)

    return make


def _quanto(bits: int, text: bool = False) -> Callable[[], Any]:
    def make() -> Any:
        if text:
            from transformers import QuantoConfig as TextConfig

            return TextConfig(weights=f"int{bits}")
        from diffusers import QuantoConfig

        return QuantoConfig(weights_dtype=f"int{bits}")

    return make


def _torchao(bits: int, text: bool = False) -> Callable[[], Any]:
    def make() -> Any:
        from diffusers import TorchAoConfig
        from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig
        from torchao.quantization import Int8WeightOnlyConfig
        from transformers import TorchAoConfig as TextConfig

        kind = PrototypeInt4WeightOnlyConfig(group_size=32) if bits == 4 else Int8WeightOnlyConfig()
        skipped = (
            ["proj_out"] if bits == 4 else None
        )  # 16 rows in the tiny FLUX, and int4 takes multiples of 32
        return (TextConfig if text else TorchAoConfig)(kind, modules_to_not_convert=skipped)

    return make


def _bitsandbytes(bits: int, text: bool = False) -> Callable[[], Any]:
    def make() -> Any:
        import diffusers
        import transformers

        kind = (transformers if text else diffusers).BitsAndBytesConfig
        if bits == 8:
            return kind(load_in_8bit=True)
        return kind(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=DTYPE)

    return make


def _bitsandbytes_by_hand(bits: int) -> Callable[[nn.Module], nn.Module]:
    """Every linear layer replaced by the library's, as its documentation shows for plain modules."""

    def replace(model: nn.Module) -> nn.Module:
        import bitsandbytes as library

        for name, layer in [item for item in model.named_modules() if type(item[1]) is nn.Linear]:
            shape, bias, weight = (
                (layer.in_features, layer.out_features),
                layer.bias is not None,
                layer.weight,
            )
            if bits == 4:
                new = library.nn.Linear4bit(*shape, bias=bias, compute_dtype=DTYPE, quant_type="nf4")
                new.weight = library.nn.Params4bit(weight.data, requires_grad=False, quant_type="nf4")
            else:
                new = library.nn.Linear8bitLt(*shape, bias=bias, has_fp16_weights=False)
                new.weight = library.nn.Int8Params(weight.data, requires_grad=False, has_fp16_weights=False)
            new.bias = layer.bias
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, new.requires_grad_(False).to("cpu"))
        setattr(model, f"is_loaded_in_{bits}bit", True)  # PEFT asks for it
        return model

    return replace


def _sdnq_library(weights: str) -> Library:
    return Library(
        "sdnq",
        f"{weights}, quant_conv=True, SDNQ_USE_TORCH_COMPILE=0",
        _sdnq(weights),
        _sdnq(weights),
        float_convolutions=False,
        no_training="quantized convolutions do not support training, says its documentation",
        environment=(("SDNQ_USE_TORCH_COMPILE", "0"),),
    )


def _bitsandbytes_library(bits: int) -> Library:
    what = {4: "nf4", 8: "int8"}[bits] + ", in memory: layers replaced by hand"
    by_hand = _bitsandbytes_by_hand(bits)
    return Library("bitsandbytes", what, _bitsandbytes(bits), _bitsandbytes(bits, True), by_hand)


LIBRARIES = {
    "difloat": Library("difloat", "FP4 (E2M1), 8-bit inputs", _difloat, _difloat, float_convolutions=False),
    "SDNQ uint4": _sdnq_library("uint4"),
    "SDNQ int8": _sdnq_library("int8"),
    "quanto int4": Library("optimum-quanto", "int4", _quanto(4), _quanto(4, True)),
    "quanto int8": Library("optimum-quanto", "int8", _quanto(8), _quanto(8, True)),
    "torchao int4": Library("torchao", "the CPU prototype of int4", _torchao(4), _torchao(4, True)),
    "torchao int8": Library("torchao", "Int8WeightOnlyConfig", _torchao(8), _torchao(8, True)),
    "bitsandbytes nf4": _bitsandbytes_library(4),
    "bitsandbytes int8": _bitsandbytes_library(8),
}


@dataclass(frozen=True)
class Case:
    """One library, one pipeline, and an empty folder for one step."""

    library: Library
    pipeline: str
    shelf: Path  # float pipelines and LoRAs, from `prepare`
    folder: Path
    source: str = ""  # a directory of the shelf, if another than the pipeline's own

    @property
    def component(self) -> str:
        """Name of the denoiser."""
        return PIPELINES[self.pipeline][0]

    @property
    def directory(self) -> Path:
        """Of the float pipeline."""
        return self.shelf / (self.source or self.pipeline)

    def class_of_model(self) -> Any:
        """Of the denoiser."""
        import diffusers

        names = {"U-Net": "UNet2DConditionModel", "PixArt": "PixArtTransformer2DModel"}
        return getattr(diffusers, names.get(self.pipeline, "FluxTransformer2DModel"))

    def load(self, directory: Path | None = None, **arguments: Any) -> nn.Module:
        """A denoiser from a directory, the float one if there is none, by plain from_pretrained."""
        if directory is None:
            directory = self.directory / self.component
        return self.class_of_model().from_pretrained(directory, **{"torch_dtype": DTYPE, **arguments}).eval()

    def on_the_fly(self) -> nn.Module:
        """Quantized while loading, by diffusers."""
        return self.load(quantization_config=self.library.config())

    def model(self) -> nn.Module:
        """Quantized, by hand where the library cannot do it in diffusers without a GPU."""
        return self.library.by_hand(self.load()) if self.library.by_hand else self.on_the_fly()

    def wrapped(self, model: nn.Module) -> Any:
        """The pipeline around a quantized denoiser."""
        return DiffusionPipeline.from_pretrained(self.directory, torch_dtype=DTYPE, **{self.component: model})
