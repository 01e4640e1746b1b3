"""An accelerator that is none: the CPU computes, but a tensor that is "on" it refuses to meet one that is not.

`register()` makes ``pretend`` a device of torch's PrivateUse1 key. Its tensors wrap tensors of the CPU. As CUDA does, every
operator refuses operands of several devices, except numbers (tensors without axes) and indices; random numbers refuse a
generator of another device; `numpy()` refuses. Operators of difloat run their body on such tensors, so that they are watched
inside too. What is drawn, copied or decided is what the CPU gives, bit for bit. Autograd works, with its own thread.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import return_and_correct_aliasing
from torch.utils._pytree import tree_flatten, tree_map

NAME = "pretend"
_COPIES = {"_to_copy", "copy_", "copy", "_copy_from", "_copy_from_and_resize"}
_INDEXED = {"index", "index_put_", "index_put", "_index_put_impl_", "_unsafe_index", "_unsafe_index_put"}
_FACTORIES = (
    "empty.memory_format",
    "empty_strided",
    "arange",
    "arange.start",
    "arange.start_step",
    "eye",
    "eye.m",
    "linspace",
    "randperm.generator",
    "randperm",
)
_kernels: list[torch.library.Library] = []


class PretendTensor(Tensor):
    """A tensor "on" the pretended accelerator; `raw` has its values."""

    raw: Tensor

    @staticmethod
    def __new__(cls, raw: Tensor, requires_grad: bool = False) -> PretendTensor:
        outer = Tensor._make_wrapper_subclass(
            cls,
            raw.shape,
            strides=raw.stride(),
            storage_offset=raw.storage_offset(),
            dtype=raw.dtype,
            device=torch.device(NAME, 0),
            requires_grad=requires_grad,
        )
        outer.raw = raw
        return outer

    def __repr__(self, *, tensor_contents: object = None) -> str:
        return f"PretendTensor({self.raw!r})"

    def tolist(self) -> Any:
        """Its numbers, as accelerators give them; torch refuses it for tensors that are classes of their own."""
        return self.raw.tolist()

    def numpy(self, *, force: bool = False) -> Any:
        """Refused, as on any accelerator."""
        raise TypeError(f"can't convert {NAME} device type tensor to numpy. Use Tensor.cpu() first")

    def untyped_storage(self) -> torch.UntypedStorage:
        """Its bytes; whoever saves compares their addresses, which accelerators have as well."""
        return self.raw.untyped_storage()

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func.namespace == "difloat":
            return _body(func)(*args, **kwargs)
        _check(func, args, kwargs)
        device = kwargs.get("device")
        here = device is None or torch.device(device).type == NAME
        if device is not None:
            kwargs["device"] = torch.device("cpu")
        raw_args, raw_kwargs = tree_map(_unwrap, (args, kwargs))
        if func._schema.name == "aten::_pin_memory":
            raise RuntimeError("only tensors of the CPU can be pinned")
        found = func(*raw_args, **raw_kwargs)
        if not here:  # a copy to the CPU must not share memory with the accelerator
            return tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, found)
        onto_cpu = func._schema.name == "aten::copy_" and not isinstance(args[0], PretendTensor)
        if onto_cpu:
            return args[0]
        return return_and_correct_aliasing(func, args, kwargs, tree_map(_wrap, found))


def _unwrap(value: Any) -> Any:
    return value.raw if isinstance(value, PretendTensor) else value


def _wrap(value: Any) -> Any:
    return (
        PretendTensor(value) if isinstance(value, Tensor) and not isinstance(value, PretendTensor) else value
    )


def _check(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    name = func._schema.name.removeprefix("aten::")
    if name in _COPIES:
        return
    if name in _INDEXED:
        args = (args[0], *args[2:])
    flat = tree_flatten((args, kwargs))[0]
    there = any(isinstance(value, PretendTensor) for value in flat)
    strangers = [v for v in flat if isinstance(v, Tensor) and not isinstance(v, PretendTensor) and v.dim()]
    if there and strangers:
        raise RuntimeError(
            f"expected all tensors to be on the same device, but {func} got {NAME} and {strangers[0].device}"
        )
    if there and any(isinstance(v, torch.Generator) and v.device.type != NAME for v in flat):
        raise RuntimeError(f"expected a generator of {NAME}, but {func} got one of another device")


def _body(func: Any) -> Callable[..., Any]:
    """What an operator of difloat does, to run it on tensors that are watched."""
    definition = torch._library.custom_ops.OPDEFS[func._schema.name]
    return definition._backend_fns.get(None) or definition._init_fn


def _make(name: str) -> Callable[..., Tensor]:
    packet, _, overload = name.partition(".")
    operator = getattr(getattr(torch.ops.aten, packet), overload or "default")

    def make(*args: Any, **kwargs: Any) -> Tensor:
        kwargs = {**kwargs, "device": torch.device("cpu")}
        return PretendTensor(operator(*args, **kwargs))

    return make


def _copy_from(source: Tensor, target: Tensor, non_blocking: bool = False) -> Tensor:
    _unwrap(target).copy_(_unwrap(source))
    return target


class _Module:
    """What torch asks the module of a device for: ``torch.pretend``."""

    is_initialized = is_available = staticmethod(lambda: True)
    device_count = staticmethod(lambda: 1)
    current_device = staticmethod(lambda: 0)
    _is_in_bad_fork = staticmethod(lambda: False)
    get_amp_supported_dtype = staticmethod(lambda: [torch.bfloat16, torch.float16])
    get_rng_state = staticmethod(lambda device=0: torch.zeros(1, dtype=torch.uint8))
    synchronize = staticmethod(lambda device=None: None)

    def set_rng_state(self, state: Tensor, device: Any = 0) -> None: ...

    def manual_seed_all(self, seed: int) -> None: ...

    def manual_seed(self, seed: int) -> None: ...


@functools.cache
def register() -> torch.device:
    """Make the device known to torch, once for the process; returns it."""
    from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

    _setup_privateuseone_for_python_backend(NAME, _Module())
    library = torch.library.Library("aten", "IMPL")
    for name in _FACTORIES:
        library.impl(name, _make(name), "PrivateUse1")
    library.impl("_copy_from", _copy_from, "PrivateUse1")  # of torch.tensor, which keeps Python out
    _kernels.append(library)  # kernels go with it
    return torch.device(NAME, 0)
