"""Files of LoRAs as diffusers and PEFT write them: their tensors, and the configuration with which PEFT loads them."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import safetensors
import torch
from torch import Tensor, nn

LORA_FILE = "pytorch_lora_weights.safetensors"  # the name that diffusers gives it
_PEFT_FILE, _PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"
_METADATA = "lora_adapter_metadata"  # under this key of a header diffusers keeps the configuration
_FACTOR = re.compile(r"\.lora_(A|B)\.(weight|bias)$")


@final
@dataclass(frozen=True)
class Stored:
    """A LoRA's file.

    Attributes:
        file: The path of the file.
        tensors: The tensors by key, all finite.
        header: The texts of the file's header.
    """

    file: Path
    tensors: dict[str, Tensor]
    header: dict[str, str]

    @property
    def by_peft(self) -> bool:
        """Whether PEFT wrote the file, whose keys diffusers' pipelines do not read."""
        return self.file.name == _PEFT_FILE

    def prefix(self, module: nn.Module) -> str | None:
        """The prefix before the layers' names in all keys, or None if the keys are not all PEFT's, of layers of the module."""
        inside = {name for name, _ in module.named_modules() if name}
        targets = {_FACTOR.sub("", key) for key in self.tensors}
        if not targets or any(_FACTOR.search(key) is None for key in self.tensors):
            return None
        words = min(targets, key=len).split(".")
        prefixes = ["".join(f"{word}." for word in words[:count]) for count in range(len(words))]
        return next(
            (p for p in prefixes if all(t.startswith(p) and t[len(p) :] in inside for t in targets)), None
        )

    def for_peft(self, module: nn.Module, prefix: str) -> tuple[dict[str, Tensor], Any]:
        """The tensors without a prefix, and the configuration with which PEFT loads them.

        Raises:
            ValueError: if a key is not PEFT's or names no layer of the module, or there is no key.
        """
        state = {key.removeprefix(prefix): tensor for key, tensor in self.tensors.items()}
        inside = {name for name, _ in module.named_modules()}
        for key in state:
            target = _FACTOR.sub("", key)
            if target == key:
                raise ValueError(
                    f"LoRA must have keys like '<layer>.lora_A.weight', got {key!r:.200}; convert it with diffusers first"
                )
            if target not in inside:
                raise ValueError(
                    f"LoRA must be of this model, but {target!r:.200} is no layer of it, whatever of it is taken for a "
                    "prefix; load it into its own"
                )
        return state, self._config(prefix, state)

    def _config(self, prefix: str, state: dict[str, Tensor]) -> Any:
        """PEFT's configuration from the header, or from the file beside it, or from the shapes with all factors 1."""
        from diffusers.utils import get_peft_kwargs
        from peft import LoraConfig

        ranks = {f"^{k}": up.shape[1] for k, up in state.items() if k.endswith(".lora_B.weight")}
        if not ranks:
            raise ValueError(
                f"LoRA must hold tensors named '<layer>.lora_B.weight', got none in {str(self.file)!r}; download it again"
            )
        if _METADATA in self.header:
            settings = json.loads(self.header[_METADATA])
            return LoraConfig(**{key.removeprefix(prefix): value for key, value in settings.items()})
        if (self.file.parent / _PEFT_CONFIG).is_file():
            return LoraConfig.from_pretrained(str(self.file.parent))
        return LoraConfig(**get_peft_kwargs(ranks, None, state))


def read(source: Path) -> Stored:
    """Read a safetensors file or pickle of a LoRA, or the one in a directory as diffusers or PEFT save it.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if a tensor is not finite, since no picture would be either.
    """
    candidates = [source] if source.is_file() else [source / LORA_FILE, source / _PEFT_FILE]
    file = next((each for each in candidates if each.is_file()), None)
    if file is None:
        raise FileNotFoundError(
            f"LoRA must be a safetensors file or a directory with {LORA_FILE} or {_PEFT_FILE}, got {str(source)!r}; "
            "check the path"
        )
    if file.suffix == ".safetensors":
        with safetensors.safe_open(file, framework="pt") as opened:
            header = opened.metadata() or {}
            tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
    else:
        tensors, header = torch.load(file, map_location="cpu", weights_only=True), {}
    for key, tensor in tensors.items():
        floating = isinstance(tensor, Tensor) and tensor.is_floating_point()
        if floating and not bool(tensor.float().isfinite().all()):
            raise ValueError(
                f"LoRA must hold finite numbers, got NaN or Inf in {key!r:.200} of {file.name}; download it again or train "
                "it with a lower rate"
            )
    return Stored(file, tensors, header)
