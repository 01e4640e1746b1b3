"""Cache entries prove themselves: whatever happened to one, the run says so, makes it again, and ends with the same bytes."""

from __future__ import annotations

import json
import os
import random
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import difloat
from difloat.cache_entries import CacheWarning, read_entry, write_atomically, write_entry
from difloat.calibration.collect import CalibrationSettings, collect
from difloat.plan.plan import Plan
from difloat.plan.validation import plain
from test_calibration import PROMPTS, DotPipeline
from test_finetune import Denoiser, sample_with

FAST = {"iterations": 2, "rounding_rows": 8, "epochs": 1, "adapters": 1, "rank": 2, "samples": 24}
PLAIN = {"dfa": False, "guidance_weight": 0.0, "keep_8bit": (), "rounding": "learned"}
KINDS = {"shard": "*/loop-*.safetensors", "block": "rounding-*/0001.safetensors", "state": "fine-tuning-*"}


def made(cache: Path) -> Plan:
    """A run whose cache has every kind of entry: calibration, learned rounding of blocks, the state of fine-tuning."""
    torch.manual_seed(0)
    model = Denoiser()
    own = {"forward_loop": sample_with, "cache_dir": cache, "progress": False}
    return difloat.plan(model, "msfp", "w4a4", **own, **FAST, **PLAIN)


def same(one: Plan, two: Plan) -> bool:
    return one.layers.keys() == two.layers.keys() and all(
        plain(layer) == plain(two.layers[name])
        and all(torch.equal(tensor, two.layers[name].tensors[key]) for key, tensor in layer.tensors.items())
        for name, layer in one.layers.items()
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Plan]:
    """The cache of an undamaged run, and what the run gave."""
    cache = tmp_path_factory.mktemp("cache")
    plan = made(cache)
    assert same(plan, made(cache)), "an undamaged cache is read without a word"
    return cache, plan


def entry_of(cache: Path, kind: str) -> Path:
    (path,) = cache.glob(KINDS[kind])
    return path


@contextmanager
def said_once(path: Path) -> Iterator[None]:
    """The block must warn of this entry, in one line, and of nothing else."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    said = [str(one.message) for one in caught]
    assert len(said) == 1, said
    warning = caught[0]
    text = str(warning.message)
    assert warning.category is CacheWarning and str(path) in text and "\n" not in text


def flipped(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 0x10
    path.write_bytes(content)


def in_its_place(path: Path) -> None:
    """A whole entry, but of another place of a cache."""
    other = path.parent / "other.safetensors"
    write_entry(other, "other", {"x": torch.ones(2)}, {"rows": "[]", "losses": "[]", "scaler": "{}"})
    os.replace(other, path)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "empty": lambda path: path.write_bytes(b""),
    "cut short": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "cut in the header": lambda path: path.write_bytes(path.read_bytes()[:60]),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
    "flipped in the header": lambda path: flipped(path, 30),
    "flipped in a tensor": lambda path: flipped(path, -3),
    "no such file": lambda path: path.write_bytes(b"this is a letter to my aunt"),
    "tensors of somebody else": lambda path: save_file({"x": torch.ones(2)}, path),
    "another entry": in_its_place,
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_said_and_made_again(
    finished: tuple[Path, Plan], tmp_path: Path, kind: str, damage: str
) -> None:
    cache = Path(shutil.copytree(finished[0], tmp_path / "cache"))
    path = entry_of(cache, kind)
    DAMAGES[damage](path)
    with said_once(path):
        again = made(cache)
    assert same(again, finished[1])
    assert same(made(cache), finished[1]), "what was made again is undamaged"


@pytest.mark.parametrize("kind", KINDS)
def test_every_cut_and_every_flip_is_noticed(finished: tuple[Path, Plan], tmp_path: Path, kind: str) -> None:
    source = entry_of(finished[0], kind)
    key = source.name if kind == "state" else f"{source.parent.name}/{source.name}"
    path = tmp_path / "entry.safetensors"
    content = source.read_bytes()
    draw = random.Random(kind)
    header = 8 + int.from_bytes(content[:8], "little")
    cuts = {
        *range(0, min(header, 200), 7),
        *(draw.randrange(len(content)) for _ in range(40)),
        len(content) - 1,
    }
    flips = {*range(0, min(header, 600), 2), *(draw.randrange(len(content)) for _ in range(100))}
    damaged = [content[:at] for at in cuts]
    for at in flips:
        changed = bytearray(content)
        changed[at] ^= 1 << draw.randrange(8)
        damaged.append(bytes(changed))
    for one in damaged:
        path.write_bytes(one)
        with said_once(path):
            assert read_entry(path, key, dict) is None
    path.write_bytes(content)
    assert read_entry(path, key, dict) is not None


def test_a_shard_of_another_version_is_drawn_again(tmp_path: Path) -> None:
    settings = CalibrationSettings(samples=24, steps=4, prompts_per_batch=4, seed=3)
    expected = collect(DotPipeline(), PROMPTS, settings, cache_dir=tmp_path, progress=False)
    shard = min(tmp_path.glob("*/batch-*.safetensors"))
    key = f"{shard.parent.name}/{shard.name}"
    tensors, texts = read_entry(shard, key, dict)
    rows = [{**row, "colour": "red"} for row in json.loads(texts["rows"])]
    write_entry(shard, key, tensors, {"rows": json.dumps(rows)})
    with pytest.warns(CacheWarning, match=r"of this version of difloat, but calibration row .* 'colour'"):
        data = collect(DotPipeline(), PROMPTS, settings, cache_dir=tmp_path, progress=False)
    assert data.fingerprint == expected.fingerprint
    assert read_entry(shard, key, dict)[1] == texts, "what was drawn again took its place"


def test_shards_do_not_stand_for_each_other(tmp_path: Path) -> None:
    settings = CalibrationSettings(samples=24, steps=4, prompts_per_batch=4, seed=3)

    def rows() -> list[object]:
        data = collect(DotPipeline(), PROMPTS, settings, cache_dir=tmp_path, progress=False)
        return [(row.timestep, row.leaves) for row in data._rows]

    expected = rows()
    first, second = sorted(tmp_path.glob("*/batch-*.safetensors"))
    shutil.copy(second, first)
    with said_once(first):
        assert rows() == expected
    (tmp_path / first.parent.name / "index.json").write_bytes(b"{")  # it is for people only
    assert rows() == expected


def test_data_changed_under_a_run_are_refused(tmp_path: Path) -> None:
    """What does not fit the memory is read from the disk while the run is at work."""
    settings = CalibrationSettings(samples=24, steps=4, prompts_per_batch=4, seed=3, memory_bytes=0)
    data = collect(DotPipeline(), PROMPTS, settings, cache_dir=tmp_path, progress=False)
    shards = sorted(tmp_path.glob("*/batch-*.safetensors"))
    data = collect(DotPipeline(), PROMPTS, settings, cache_dir=tmp_path, progress=False)
    for shard in shards:
        flipped(shard, -1)
    with pytest.raises(OSError, match="must stay as they are during a run, but .*batch-0"):
        data._shelf._proven.clear()
        data._shelf._open_files.clear()
        data.batch(range(24))


def test_leftovers_of_killed_writers_are_removed_later(tmp_path: Path) -> None:
    path = tmp_path / "entry.safetensors"
    old, fresh = tmp_path / ".entry.safetensors.0a1b2c3d", tmp_path / ".entry.safetensors.4d5e6f70"
    for leftover in (old, fresh):
        leftover.write_bytes(b"half")
    os.utime(old, (0, 0))
    write_atomically(path, b"whole")
    assert sorted(tmp_path.iterdir()) == [fresh, path], "another process may be at work on the fresh one"
