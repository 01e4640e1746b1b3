"""The identity of a sampling loop in a cache: its code with the values it uses, and the arguments of its first call.

A loop's name is not enough, since all lambdas of a function have the same. Its code with the values it uses shows what a user
changes between two runs. The arguments of the first call show what the code does not, such as data behind an object.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Mapping
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any, final

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from difloat.calibration.rows import content_hash, recording
from difloat.calibration.sampler_runs import weights_summary

_DEPTH = 8  # of nested values that are looked into


def fingerprint(loop: Callable[..., Any]) -> str:
    """A hash of a function: bytecode, constants, defaults, and the values and functions it takes from closures and globals.

    Tensors and arrays count by content, modules by class and weights, and objects by class and attributes. Objects without
    attributes, such as files and iterators, count by class alone.
    """
    digest = hashlib.blake2b(digest_size=16)
    _add(loop, digest.update, set(), 0)
    return digest.hexdigest()


def _add(value: Any, update: Callable[[bytes], object], seen: set[int], depth: int) -> None:
    """Feed the bytes that identify a value to a hash."""

    def also(*values: Any) -> None:
        for each in values:
            _add(each, update, seen, depth + 1)

    update(f"{type(value).__module__}.{type(value).__qualname__}(".encode())
    if value is None or isinstance(value, (bool, int, float, complex, str, bytes)):
        update(repr(value).encode())
    elif isinstance(value, Tensor):
        update(content_hash(value.detach().cpu()).encode())
    elif isinstance(value, np.ndarray) and value.dtype != object:
        update(f"{value.dtype}{value.shape}".encode() + value.tobytes())
    elif id(value) in seen or depth > _DEPTH or isinstance(value, (type, ModuleType)):
        update(getattr(value, "__name__", "").encode())
    else:
        seen.add(id(value))
        _add_compound(value, update, also)
    update(b")")


def _add_compound(value: Any, update: Callable[[bytes], object], also: Callable[..., None]) -> None:
    if isinstance(value, CodeType):
        update(value.co_code)
        also(value.co_names, value.co_consts)
    elif isinstance(value, FunctionType):
        closed = [cell.cell_contents for cell in value.__closure__ or () if _is_filled(cell)]
        also(value.__code__, value.__defaults__, value.__kwdefaults__, closed)
        names = sorted(_names(value.__code__) & value.__globals__.keys())
        also(*(value.__globals__[name] for name in names))
    elif isinstance(value, MethodType):
        also(value.__func__, value.__self__)
    elif isinstance(value, functools.partial):
        also(value.func, value.args, value.keywords)
    elif isinstance(value, nn.Module):
        update(weights_summary([value]).encode())
    elif isinstance(value, torch.Generator):
        also(value.get_state())
    elif isinstance(value, Mapping):
        also(*(part for item in value.items() for part in item))
    elif isinstance(value, (list, tuple)):
        also(*value)
    elif isinstance(value, (set, frozenset)):
        also(*sorted(value, key=repr))
    else:
        also(*(part for item in sorted(getattr(value, "__dict__", {}).items()) for part in item))


def _names(code: CodeType) -> set[str]:
    """The names that code and the functions in it read from outside."""
    inner = [constant for constant in code.co_consts if isinstance(constant, CodeType)]
    return set(code.co_names).union(*map(_names, inner))


def _is_filled(cell: Any) -> bool:
    try:
        return cell.cell_contents is not cell
    except ValueError:  # a name that is not bound yet
        return False


class _Begun(BaseException):
    """Ends a loop at its first call. It is no `Exception`, so that no loop swallows it."""


@final
class FirstCall:
    """A forward pre-hook (`with_kwargs=True`) that hashes the arguments of the first call of a module.

    Attributes:
        digest: The hash, which is "" before the call.
    """

    def __init__(self, module: nn.Module) -> None:
        """Prepare for calls of a module."""
        self._module = module
        self._ends = False
        self.digest = ""

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Take a call, of which only the first counts."""
        if self._ends or not self.digest:
            digest = hashlib.blake2b(digest_size=8)
            for path, leaf in pytree.tree_flatten_with_path((args, dict(kwargs)))[0]:
                content = content_hash(leaf.detach().cpu()) if isinstance(leaf, Tensor) else repr(leaf)
                digest.update(f"{pytree.keystr(path)} {content}\n".encode())
            self.digest = digest.hexdigest()
        if self._ends:
            raise _Begun

    def of_loop(self, loop: Callable[[nn.Module], object], seed: int) -> str:
        """Run a loop, as it is recorded, as far as its first call, and return the digest.

        Raises:
            ValueError: if the loop makes no call.
        """
        self._ends = True
        try:
            with recording(self._module, self, seed):
                loop(self._module)
        except _Begun:
            return self.digest
        finally:
            self._ends = False
        raise ValueError(
            "the sampling loop must call the denoiser, got no call; call the module itself, and give a loop that can be run "
            "again, or no cache"
        )
