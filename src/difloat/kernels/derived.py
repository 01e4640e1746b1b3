"""What a backend derives from packed weights and keeps: once per weight, forgotten with it.

Entries are tied to the memory of the packed tensor (views of one parameter share it) and to its version counter, so a weight
that is loaded again in place is derived again. What is written through ``tensor.data`` is not seen; autograd does not see it
either.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, TypeVar

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

Derived = TypeVar("Derived")
_entries: dict[Hashable, tuple[tuple[StorageWeakRef, ...], tuple[int, ...], Any]] = {}


def derived(what: Hashable, sources: tuple[Tensor, ...], make: Callable[[], Derived]) -> Derived:
    """The result of `make`, kept as long as the memory of all `sources` lives and is not written to.

    Args:
        what: Names the derivation, with all settings it depends on besides the sources.
        sources: Tensors it is made from.
        make: Makes it.
    """
    found: Derived | None = found_again(what, sources)
    if found is not None:
        return found
    _forget()
    versions, value = _versions(sources), make()
    references = tuple(StorageWeakRef(source.untyped_storage()) for source in sources)
    _entries[_key(what, sources)] = (references, versions, value)
    return value


def found_again(what: Hashable, sources: tuple[Tensor, ...]) -> Any:
    """What `derived` keeps under this name for these sources; None if there is nothing, or the sources were written to."""
    found = _entries.get(_key(what, sources))
    if found is None or found[1] != _versions(sources) or any(ref.expired() for ref in found[0]):
        return None
    return found[2]


def _key(what: Hashable, sources: tuple[Tensor, ...]) -> Hashable:
    # A weak reference keeps the storage's header, so its address names no other storage while the entry is there.
    return (
        what,
        *((s.untyped_storage()._cdata, s.storage_offset(), s.shape, s.stride(), s.dtype) for s in sources),
    )


def _versions(sources: tuple[Tensor, ...]) -> tuple[int, ...]:
    return tuple(0 if source.is_inference() else source._version for source in sources)


def _forget() -> None:
    dead = [key for key, (refs, _, _) in _entries.items() if any(ref.expired() for ref in refs)]
    for key in dead:
        del _entries[key]


def resident_bytes() -> int:
    """Bytes of all tensors that are kept now."""
    _forget()
    return sum(_bytes(value) for _, _, value in _entries.values())


def bytes_of(kind: str) -> int:
    """Bytes of all tensors that are kept now under names that begin with `kind`."""
    _forget()
    return sum(_bytes(entry[2]) for key, entry in _entries.items() if key[0][0] == kind)


def _bytes(value: Any) -> int:
    items = value if isinstance(value, tuple) else (value,)
    return sum(item.nbytes for item in items if isinstance(item, Tensor))
