"""Thousands of damaged checkpoints of tiny models: loading with proof gives the identical result, or one sentence.

``python tests/mutate_checkpoints.py 1800 --seed 0`` makes that many mutations and prints how each kind ended. For each:

* `load` with proof gives the identical result, or ValueError, CheckpointError or OSError with one line of text;
* plain `load` ends without an error of another type (a changed float weight loads, nothing says so: hence the proof);
* the same for a manifest that was made anew, as someone would who edits a checkpoint by hand;
* `verify` reports and never raises; what it passes altogether loads to the identical result or is a file it does not guard.

Every mutation follows from its number and the seed alone.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import random
import shutil
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers.utils.logging
import safetensors.torch
import torch
import transformers.utils.logging
from torch import nn

from difloat import checkpoint
from difloat.checkpoint import CheckpointError
from difloat.checkpoint.manifest import write_manifest

SENTENCES = (ValueError, CheckpointError, OSError)
VALUES: list[Any] = [
    *(
        math.inf,
        -math.inf,
        math.nan,
        1e308,
        10**400,
        2**70,
        2**63,
        2**31,
        -1,
        0,
        1,
        3,
        1.5,
        True,
        False,
        None,
    ),
    *(
        "",
        "7",
        "e2m1",
        "e9m9",
        "int8",
        "uint1",
        "group",
        "token",
        "\u0000",
        "\ud83d\ude00",
        "x" * 5000,
        "../x",
    ),
    *([], {}, [[]], [1, 2, 3], [None], {"a": 1}, [math.inf], {"format": "e2m1"}, list(range(3000))),
]


def plain(directory: Path, **options: Any) -> nn.Module:
    """Load the plain module of `tests/test_checkpoint.py`."""
    from test_checkpoint import tiny

    return checkpoint.load(directory, into=tiny(1), **options)


def banded(directory: Path, **options: Any) -> nn.Module:
    """The same for its layers with rows of several widths."""
    return plain(directory, **options)


def library(directory: Path, **options: Any) -> Any:
    """Load a model or pipeline of diffusers."""
    return checkpoint.load(directory, **options)


def sources(root: Path) -> dict[str, tuple[Path, Callable[..., Any]]]:
    """Clean checkpoints, and what loads them."""
    from test_checkpoint import banded as banded_model
    from test_checkpoint import quantized
    from test_diffusers import quantized_pipeline

    pipeline = quantized_pipeline("transformer")
    return {
        "plain": (checkpoint.save(quantized(), root / "plain"), plain),
        "shards": (checkpoint.save(quantized(), root / "shards", max_shard_bytes=100), plain),
        "bands": (checkpoint.save(banded_model(), root / "bands"), banded),
        "model": (checkpoint.save(pipeline.transformer, root / "model", max_shard_bytes=20_000), library),
        "pipeline": (checkpoint.save(pipeline, root / "pipeline"), library),
    }


# Mutations: each changes one thing of a directory, and returns what it did


def pick(rng: random.Random, directory: Path, *endings: str) -> Path:
    files = sorted(path for path in directory.rglob("*") if path.is_file() and path.name.endswith(endings))
    return rng.choice(files)


def flipped(rng: random.Random, directory: Path) -> None:
    """One to three bits of any file; in safetensors files half of them in the header."""
    path = pick(rng, directory, "")
    data = bytearray(path.read_bytes())
    limit = min(len(data), 600) if path.suffix == ".safetensors" and rng.random() < 0.5 else len(data)
    for _ in range(rng.randint(1, 3)):
        if data:
            data[rng.randrange(limit)] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


def truncated(rng: random.Random, directory: Path) -> None:
    """A file ends early, is empty, or goes on."""
    path = pick(rng, directory, "")
    data = path.read_bytes()
    end = rng.choice([0, 1, 7, 8, 9, len(data) // 2, len(data) - 1, rng.randrange(len(data) + 1)])
    path.write_bytes(data[:end] if rng.random() < 0.8 else data + data[:end] + b"\0")


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    found = [path] if path else []
    children = (
        value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    )
    for key, child in children:
        found += places(child, (*path, key))
    return found


def edited_json(rng: random.Random, directory: Path) -> None:
    """Another value, another name, an entry twice, one less: anywhere in a JSON file, mostly in a plan."""
    path = pick(rng, directory, "config.json") if rng.random() < 0.7 else pick(rng, directory, ".json")
    data = json.loads(path.read_text(encoding="utf-8"))
    where = places(data)
    planned = [place for place in where if place[0] == "quantization_config"]
    *parents, last = rng.choice(planned if planned and rng.random() < 0.8 else where)
    owner = data
    for step in parents:
        owner = owner[step]
    way = rng.randrange(6)
    if way < 3 or isinstance(owner, list):
        owner[last] = rng.choice(VALUES)
    elif way == 3:
        owner[rng.choice(["", "x", f"{last} ", "weight", "shape", "é" * 300])] = owner.pop(last)
    elif way == 4:
        del owner[last]
    else:
        owner[rng.choice(["x", "online", "zero_point", "side", "bands", "schedule"])] = rng.choice(VALUES)
    try:
        text = json.dumps(data)
    except ValueError:  # a number of too many digits to be written by Python
        text = "1" * 5000
    path.write_text(text, encoding="utf-8", errors="surrogatepass")


def numbers(rng: random.Random, directory: Path) -> None:
    """A number or word of a JSON text becomes another one, the syntax perhaps broken."""
    import re

    path = pick(rng, directory, ".json")
    text = path.read_text(encoding="utf-8")
    found = list(re.finditer(r"-?\d+(\.\d+)?|true|false|null|\"\w+\"", text))
    if found:
        match = rng.choice(found)
        new = rng.choice(
            ["1e999", "-1", "NaN", "1" * 5000, "true", "null", "2.0", '"1"', "[", "}", "", "0x1", "٣"]
        )
        path.write_text(text[: match.start()] + new + text[match.end() :], encoding="utf-8")


def edited_tensors(rng: random.Random, directory: Path) -> None:
    """A tensor of another dtype, shape, name or value; one less or more."""
    path = pick(rng, directory, ".safetensors")
    tensors = {name: tensor.clone() for name, tensor in safetensors.torch.load_file(path).items()}
    name = rng.choice(sorted(tensors))
    value = tensors[name]
    other = rng.choice(sorted(tensors))
    changes: list[Callable[[], Any]] = [
        lambda: tensors.update(
            {name: value.to(rng.choice([torch.float64, torch.float16, torch.int8, torch.bool]))}
        ),
        lambda: tensors.update({name: value.reshape(-1)}),
        lambda: tensors.update({name: value[:-1].clone() if value.dim() else value[None]}),
        lambda: tensors.update({name: value[None]}),
        lambda: tensors.update({name: torch.zeros_like(value)}),
        lambda: tensors.update({name: torch.zeros(0, dtype=value.dtype)}),
        lambda: (
            tensors.update({name: (value.float() * rng.choice([math.nan, math.inf, -1])).to(value.dtype)})
            if value.is_floating_point()
            else tensors.update({name: ~value})
        ),
        lambda: tensors.update({name + rng.choice(["", ".x", ".weight", "2"]): tensors.pop(name)}),
        lambda: tensors.pop(name),
        lambda: tensors.update({name: tensors[other], other: value}),
        lambda: tensors.update({rng.choice(["extra", f"{name}.lora", "difloat.input"]): torch.ones(2)}),
    ]
    rng.choice(changes)()
    safetensors.torch.save_file(
        {name: tensor.contiguous().clone() for name, tensor in tensors.items()},
        path,
        metadata={"format": "pt"},
    )


def duplicated(rng: random.Random, directory: Path) -> None:
    """A tensor of one file in another one as well; where there is one file, in a second one with an index over both."""
    first = pick(rng, directory, ".safetensors")
    tensors = safetensors.torch.load_file(first)
    name = rng.choice(sorted(tensors))
    others = sorted(path for path in first.parent.glob("*.safetensors") if path != first)
    value = tensors[name].clone()
    if others:
        second = rng.choice(others)
        more = safetensors.torch.load_file(second) | {name: value}
        safetensors.torch.save_file(more, second, metadata={"format": "pt"})
        return
    stem = first.stem
    shards = [first.parent / f"{stem}-0000{n}-of-00002.safetensors" for n in (1, 2)]
    safetensors.torch.save_file(tensors, shards[0], metadata={"format": "pt"})
    safetensors.torch.save_file({name: value}, shards[1], metadata={"format": "pt"})
    weight_map = dict.fromkeys(tensors, shards[0].name) | {name: shards[rng.randrange(2)].name}
    index = first.parent / f"{stem}.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    first.unlink()


def missing(rng: random.Random, directory: Path) -> None:
    """A file is gone, a directory in its place, or two files have changed places."""
    path, other = pick(rng, directory, ""), pick(rng, directory, "")
    way = rng.randrange(4)
    if way == 3 and path != other:
        data = path.read_bytes()
        path.write_bytes(other.read_bytes())
        other.write_bytes(data)
        return
    path.unlink()
    if way == 2:
        path.mkdir()


MUTATIONS = {
    mutation.__name__: mutation
    for mutation in (flipped, truncated, edited_json, numbers, edited_tensors, duplicated, missing)
}


def state_of(loaded: Any) -> dict[str, torch.Tensor]:
    """Everything a loaded model computes with."""
    if isinstance(loaded, nn.Module):
        return dict(loaded.state_dict())
    return {
        f"{part}.{name}": tensor
        for part, model in loaded.components.items()
        if isinstance(model, nn.Module)
        for name, tensor in model.state_dict().items()
    }


def same(one: Any, other: Any) -> bool:
    """Whether two loaded models have the same tensors bit for bit."""
    first, second = state_of(one), state_of(other)
    return first.keys() == second.keys() and all(
        tensor.dtype == second[name].dtype
        and tensor.shape == second[name].shape
        and torch.equal(bits(tensor), bits(second[name]))
        for name, tensor in first.items()
    )


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of a tensor, so that NaN equals itself."""
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def outcome(load: Callable[..., Any], directory: Path, clean: Any, faults: list[str], **options: Any) -> str:
    """How loading ended: "identical", "other", or "refused"; anything else is written into `faults`."""
    try:
        loaded = load(directory, **options)
    except SENTENCES as error:
        text = str(error)
        if not text or "\n" in text.strip() or len(text) > 1500:
            faults.append(f"no sentence ({options}): {type(error).__name__}: {text[:300]!r}")
        return "refused"
    except Exception as error:  # noqa: BLE001  the fault this script looks for
        frame = traceback.extract_tb(error.__traceback__)[-1]
        faults.append(
            f"{type(error).__name__} ({options}) at {frame.filename}:{frame.lineno}: {str(error)[:200]!r}"
        )
        return "fault"
    return "identical" if same(loaded, clean) else "other"


def try_mutation(
    number: int,
    seed: int,
    made: dict[str, tuple[Path, Callable[..., Any]]],
    clean: dict[str, Any],
    work: Path,
) -> tuple[str, str, list[str]]:
    """Mutation `number`: its kind, how it ended, and what was wrong with that."""
    rng = random.Random(f"{seed} {number}")
    source = rng.choice(list(made))
    kind = list(MUTATIONS)[number % len(MUTATIONS)]
    origin, load = made[source]
    directory = work / str(number)
    shutil.copytree(origin, directory)
    MUTATIONS[kind](rng, directory)
    faults: list[str] = []
    proven = outcome(load, directory, clean[source], faults, verify=True)
    if proven == "other":
        faults.append("another result loaded with proof")
    trusting = outcome(load, directory, clean[source], faults)
    verified = findings(directory, faults)
    if verified and proven != "identical":
        faults.append(f"verify passed what does not load with proof ({proven})")
    if (directory / "difloat.json").is_file():
        (directory / "difloat.json").unlink()
    if not (directory / "difloat.json").exists():
        write_manifest(directory)
        outcome(load, directory, clean[source], faults, verify=True)
        findings(directory, faults)
    shutil.rmtree(directory)
    return (
        kind,
        f"{proven} with proof, {trusting} without",
        [f"{number} {source} {kind}: {fault}" for fault in faults],
    )


def findings(directory: Path, faults: list[str]) -> bool:
    """Whether `verify` passes the directory; that it raises is a fault."""
    try:
        found = checkpoint.verify(directory)
    except Exception as error:  # noqa: BLE001
        frame = traceback.extract_tb(error.__traceback__)[-1]
        faults.append(
            f"verify raised {type(error).__name__} at {frame.filename}:{frame.lineno}: {str(error)[:200]!r}"
        )
        return False
    faults += [
        f"verify has no sentence: {one.message!r:.200}"
        for one in found
        if "\n" in one.message or not one.message
    ]
    return all(one.passed for one in found)


def run(numbers: range, seed: int, work: Path) -> tuple[Counter[tuple[str, str]], list[str]]:
    """All mutations: how many of each kind ended how, and every fault."""
    logging.disable(logging.WARNING)
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    try:
        made = sources(work)
        clean = {name: load(directory, verify=True) for name, (directory, load) in made.items()}
        counts: Counter[tuple[str, str]] = Counter()
        faults: list[str] = []
        for number in numbers:
            kind, ended, wrong = try_mutation(number, seed, made, clean, work)
            counts[kind, ended] += 1
            faults += wrong
            for line in wrong:
                print(line, flush=True)
    finally:
        logging.disable(logging.NOTSET)
        diffusers.utils.logging.enable_progress_bar()
        transformers.utils.logging.enable_progress_bar()
    return counts, faults


def main() -> None:
    """Run from the command line; exit code 1 if a mutation ended otherwise than it may."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("count", type=int, nargs="?", default=1800)
    parser.add_argument("--start", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        counts, faults = run(
            range(arguments.start, arguments.start + arguments.count), arguments.seed, Path(work)
        )
    for (kind, ended), count in sorted(counts.items()):
        print(f"{kind:15} {ended:40} {count}")
    print(f"{sum(counts.values())} mutations, {len(faults)} faults")
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
