"""The choice of a product's tile: by a rule of thumb, or the one that was measured fastest on this device.

Measuring compiles a dozen kernels per shape. So it happens only inside `tuning()` (or with ``DIFLOAT_TUNE=1``), and never while
a CUDA graph is captured. Its results are kept on disk, and every later process on the same kind of device uses them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path

import torch
from pydantic import TypeAdapter

from difloat.cache_entries import whole_file
from difloat.kernels.triton.operands import DTYPES, Operands, step_words

_MOST_SPLITS = 32
_K_PER_STEP = 128  # the k after which FP8 sums must leave the tensor core anyway
_WARMUP_MS, _REPEAT_MS = 5, 20


@dataclass(frozen=True)
class Tile:
    """The part of the output that one program computes, and how it does.

    Attributes:
        rows: How many output channels the tile has.
        tokens: How many tokens the tile has.
        words: How many words of packed weight one step along k takes.
        splits: How many programs share the k axis of the tile.
        warps: How many warps a program has.
        stages: How many steps ahead loads are in flight.
        together: How many rows of tiles run next to each other.
    """

    rows: int
    tokens: int
    words: int
    splits: int = 1
    warps: int = 4
    stages: int = 4
    together: int = 8


@dataclass(frozen=True)
class Problem:
    """The product that a tile is chosen for. Words and taps give the length of its k axis."""

    operands: Operands
    rows: int
    tokens: int
    words: int
    taps: int = 1

    def key(self) -> str:
        """The name in the cache, which token counts share that round up to the same power of two."""
        o = self.operands
        activation = "none" if o.activation is None else o.activation.name
        formats = f"{o.kind} {o.weight.name} {activation} planes{o.planes} group{o.group_words}"
        return f"{formats} rows{self.rows} words{self.words} taps{self.taps} tokens{max(16, _power_of_two(self.tokens))}"


@dataclass(frozen=True)
class Device:
    """The limits of a device that a tile must fit: its multiprocessors and the shared memory of each."""

    name: str
    processors: int
    shared_bytes: int


@cache
def device_of(index: int | None) -> Device:
    """The limits of a CUDA device. None stands for the interpreter, which has none."""
    if index is None:
        return Device("interpreter", 1, 1 << 30)
    from triton.runtime import driver

    properties = torch.cuda.get_device_properties(index)
    shared = driver.active.utils.get_device_properties(index)["max_shared_mem"]
    return Device(properties.name, properties.multi_processor_count, shared)


def _power_of_two(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


def rule(problem: Problem, device: Device) -> Tile:
    """A tile without measuring. Few tokens want many programs that read memory, and many tokens want large products."""
    most = max(32, _K_PER_STEP // problem.operands.planes)
    if problem.tokens <= 64:
        wide = problem.tokens <= 16 and problem.rows >= 64 * device.processors
        words = step_words(problem.operands, 128 if wide else most)
        tile = Tile(64, max(16, _power_of_two(problem.tokens)), words)
    elif problem.tokens <= 256:
        tile = Tile(64, 128, step_words(problem.operands, most))
    else:
        tile = Tile(128, 128, step_words(problem.operands, most), warps=8)
    return _fit(_split(tile, problem, device), problem, device)


def _split(tile: Tile, problem: Problem, device: Device) -> Tile:
    tiles = -(-problem.rows // tile.rows) * -(-problem.tokens // tile.tokens)
    few = problem.tokens <= 64
    # With few tokens a program waits for memory, so two share a multiprocessor.
    wanted = (2 if few else 1) * device.processors // tiles
    # A split shorter than a few steps would spend its time on starting up and adding.
    steps = -(-problem.words // tile.words) * problem.taps
    return replace(tile, splits=max(1, min(wanted, steps // (2 if few else 4), _MOST_SPLITS)))


def _fit(tile: Tile, problem: Problem, device: Device) -> Tile:
    while tile.stages > 1 and shared_bytes(tile, problem.operands) > device.shared_bytes:
        tile = replace(tile, stages=tile.stages - 1)
    return tile


def shared_bytes(tile: Tile, operands: Operands) -> int:
    """The bytes of shared memory that the loads in flight take."""
    of_weights = tile.rows * tile.words * operands.word_bytes
    of_inputs = tile.tokens * tile.words * operands.planes * DTYPES[operands.kind].itemsize
    return tile.stages * (of_weights + of_inputs)


def candidates(problem: Problem, device: Device) -> list[Tile]:
    """The tiles that are worth measuring, beginning with that of the rule."""
    first = rule(problem, device)
    few = problem.tokens <= 64
    k = _K_PER_STEP
    shapes = [(128, 128, k, 8), (128, 128, 2 * k, 8), (128, 256, k, 8), (64, 256, k, 4), (64, 128, k, 4)]
    if few:
        shapes = [(rows, first.tokens, depth, 4) for rows in (64, 128) for depth in (k, 2 * k)]
    found = [first]
    for rows, tokens, depth, warps in shapes:
        words = step_words(problem.operands, max(32, depth // problem.operands.planes))
        tile = _fit(_split(Tile(rows, tokens, words, warps=warps), problem, device), problem, device)
        if tile not in found and tile.stages > 1:
            found.append(tile)
    return found


_tuning = os.environ.get("DIFLOAT_TUNE") == "1"


@contextmanager
def tuning() -> Iterator[None]:
    """Measure tiles for every new shape that is computed inside a ``with`` block. The results stay on disk."""
    global _tuning
    before, _tuning = _tuning, True
    try:
        yield
    finally:
        _tuning = before


def choose(problem: Problem, index: int | None, run: Callable[[Tile], object]) -> Tile:
    """The measured tile if there is one, else that of the rule.

    Args:
        problem: The product.
        index: The index of the CUDA device, or None in the interpreter.
        run: A function that computes the product with a tile. It is called with every candidate where measuring is on.
    """
    device = device_of(index)
    known = _known(device.name)
    key = problem.key()
    if key not in known and _tuning and index is not None and not torch.cuda.is_current_stream_capturing():
        known[key] = fastest(candidates(problem, device), run)
        _store(device.name, known)
    return known.get(key) or rule(problem, device)


def fastest(tiles: list[Tile], run: Callable[[Tile], object]) -> Tile:
    """The tile with the lowest median time. Tiles that need more of the device than it has are left out.

    Raises:
        RuntimeError: if no candidate fits the device.
    """
    from triton.runtime.errors import OutOfResources
    from triton.testing import do_bench

    times: dict[Tile, float] = {}
    for tile in tiles:
        try:
            times[tile] = do_bench(
                lambda tile=tile: run(tile), warmup=_WARMUP_MS, rep=_REPEAT_MS, return_mode="median"
            )
        except OutOfResources:  # registers and layouts take shared memory that only the compiler can count
            continue
    if not times:
        raise RuntimeError("a tile must fit the device, got none among the candidates; report the device")
    return min(times, key=lambda tile: times[tile])


def cache_file(device: str) -> Path:
    """The file of tiles measured on a kind of device, below ``DIFLOAT_CACHE`` or the user's cache folder."""
    root = os.environ.get("DIFLOAT_CACHE") or os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    name = "".join(c if c.isalnum() else "-" for c in device.lower())
    return Path(root) / "difloat" / f"tiles-{name}.json"


@cache
def _known(device: str) -> dict[str, Tile]:
    path = cache_file(device)
    if not path.is_file():
        return {}
    try:
        return TypeAdapter(dict[str, Tile]).validate_json(path.read_bytes(), strict=True)
    except ValueError as error:
        raise ValueError(f"file of measured tiles must be JSON as written, got {path}; delete it") from error


def _store(device: str, tiles: dict[str, Tile]) -> None:
    path = cache_file(device)
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({key: asdict(tile) for key, tile in sorted(tiles.items())}, indent=1)
    with whole_file(path) as partial:
        partial.write_text(text + "\n", encoding="utf-8")
