"""Calibration on tiny real pipelines: rows, merging, spread, cache, resume, budget and refusals."""

from __future__ import annotations

import errno
import signal
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from difloat.cached import CacheWarning
from difloat.calibration import (
    CalibrationSettings,
    collect,
    collect_from_loop,
    denoiser_of,
    load_prompts,
    sampling_of,
)
from difloat.calls import first_tensor, merge
from difloat.forecast import probe
from difloat.renoising import LastCall, clean_calls
from tiny import PROMPTS, tiny_ddim, tiny_pixart, tiny_unet

# diffusers hands torch tensors to numpy 2 in its schedulers.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

SMALL = CalibrationSettings(samples=24, steps=4, prompts_per_batch=4, seed=3)
PIXART_KWARGS = {"clean_caption": False, "max_sequence_length": 8}


@pytest.fixture(scope="module")
def pixart():
    return tiny_pixart()


@pytest.fixture(scope="module")
def unet():
    return tiny_unet()


def contents(calibration):
    """Everything about the rows, tensors by content."""
    return [(row.timestep, row.part, row.template, row.leaves) for row in calibration._rows]


def collect_pixart(pipeline, settings=SMALL, **kwargs):
    return collect(pipeline, PROMPTS, settings, progress=False, call_kwargs=PIXART_KWARGS, **kwargs)


def test_merged_rows_give_the_output_of_the_captured_calls(unet):
    calls = []

    def watch(module, args, kwargs, output):
        if args[1].ndim == 0:  # the sampler's calls, not the merge check's
            text = kwargs["encoder_hidden_states"]
            calls.append((args[0].clone(), float(args[1]), text.clone(), output[0].clone()))

    handle = unet.unet.register_forward_hook(watch, with_kwargs=True)
    calibration = collect(
        unet, PROMPTS, CalibrationSettings(samples=16, steps=4, prompts_per_batch=4), progress=False
    )
    handle.remove()
    assert [len(samples) for samples, *_ in calls] == [8] * 4
    captured = {
        (timestep, sample.numpy().tobytes(), text.numpy().tobytes()): output
        for samples, timestep, texts, outputs in calls
        for sample, text, output in zip(samples, texts, outputs, strict=True)
    }
    rows = calibration.stratified(12, torch.Generator().manual_seed(0))
    args, kwargs = calibration.batch(rows)
    assert args[1].tolist() == [calibration.timesteps[row] for row in rows]
    assert len(set(args[1].tolist())) == 4
    merged = first_tensor(unet.unet(*args, **kwargs))
    assert merged.requires_grad  # captured tensors enter autograd
    for i in range(12):
        key = (
            float(args[1][i]),
            args[0][i].numpy().tobytes(),
            kwargs["encoder_hidden_states"][i].numpy().tobytes(),
        )
        torch.testing.assert_close(merged[i].detach(), captured[key], rtol=1e-4, atol=1e-5)


def test_rows_are_even_over_timesteps_and_guidance_halves(pixart):
    calibration = collect_pixart(pixart)
    described = calibration.describe()
    assert len(calibration) == described["rows"] == 24
    assert list(described["timesteps"].values()) == [6, 6, 6, 6]
    assert described["parts"] == {0: 12, 1: 12}
    few = calibration.stratified(6, torch.Generator().manual_seed(1))
    assert len(set(few)) == 6
    assert set(Counter(calibration.timesteps[row] for row in few).values()) == {1, 2}
    assert Counter(calibration._rows[row].part for row in few) == {0: 3, 1: 3}
    assert sorted(calibration.stratified(24, torch.Generator())) == list(range(24))
    # Steps more than rows: rows lie at even distances, not all at the start.
    sparse = collect_pixart(pixart, CalibrationSettings(samples=3, steps=12, prompts_per_batch=2))
    timesteps = sorted(sparse.timesteps)
    assert (
        len(set(timesteps)) == 3 and min(b - a for a, b in zip(timesteps, timesteps[1:], strict=False)) > 200
    )


def test_shared_tensors_are_stored_once(pixart):
    calibration = collect_pixart(pixart)
    separate_bytes = sum(
        value.nbytes
        for row in range(len(calibration))
        for value in (*calibration.batch([row])[0], *calibration.batch([row])[1].values())
        if isinstance(value, torch.Tensor)
    )
    assert calibration.nbytes < 0.8 * separate_bytes


def test_same_seed_same_rows_and_global_state_untouched(pixart):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    pixart.set_progress_bar_config(desc="mine")
    first = collect_pixart(pixart)
    assert torch.equal(before, torch.get_rng_state())
    assert pixart._progress_bar_config == {"desc": "mine"}
    assert not pixart.transformer._forward_pre_hooks
    assert contents(first) == contents(collect_pixart(pixart))
    other = CalibrationSettings(samples=24, steps=4, prompts_per_batch=4, seed=4)
    assert contents(first) != contents(collect_pixart(pixart, other))


def test_clean_timesteps_are_conditional_rows_near_the_end_of_the_trajectory(pixart):
    settings = CalibrationSettings(samples=20, steps=3, prompts_per_batch=2, timesteps="clean")
    data = collect(pixart, ["a red cat", "a blue house"], settings, progress=False)
    assert sorted(data.timesteps) == [float(number) for number in range(20)]
    assert data.describe()["parts"] == {0: 20}
    followed = collect(
        pixart, ["a red cat", "a blue house"], replace(settings, timesteps="sampler"), progress=False
    )
    kwargs = data.batch(range(20))[1]
    assert len(kwargs["encoder_hidden_states"]) == 20
    texts = followed.batch(range(len(followed)))[1]["encoder_hidden_states"]
    assert len(texts.unique(dim=0)) == 3  # two prompts and the empty one
    assert len(kwargs["encoder_hidden_states"].unique(dim=0)) == 2
    with pytest.raises(ValueError, match="must be 'sampler' for object"):
        list(clean_calls(object(), LastCall(pixart.transformer), 1, torch.Generator()))
    with pytest.raises(ValueError, match="must be sampler or clean, got 'raw'"):
        CalibrationSettings(timesteps="raw")


def test_unconditional_pipeline_and_its_default_steps():
    pipeline = tiny_ddim()
    calibration = collect(
        pipeline, None, CalibrationSettings(samples=60, prompts_per_batch=2), progress=False
    )
    assert Counter(calibration.timesteps).keys() == {float(timestep) for timestep in range(0, 1000, 20)}
    assert len(calibration) == 60
    with pytest.raises(ValueError, match="no prompts"):
        collect(pipeline, ["a cat"], SMALL, progress=False)


def test_budget_on_disk_gives_the_same_rows(pixart, tmp_path):
    in_memory = collect_pixart(pixart)
    tight = CalibrationSettings(samples=24, steps=4, prompts_per_batch=4, seed=3, memory_bytes=0)
    for cache_dir in (None, tmp_path):
        on_disk = collect_pixart(pixart, tight, cache_dir=cache_dir)
        assert on_disk.describe()["memory_bytes"] == 0 < in_memory.describe()["memory_bytes"]
        assert contents(on_disk) == contents(in_memory)
        for a, b in zip(
            in_memory.batch(range(24))[1].values(), on_disk.batch(range(24))[1].values(), strict=True
        ):
            assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def test_cache_is_reused_and_another_request_starts_over(pixart, tmp_path):
    first = collect_pixart(pixart, cache_dir=tmp_path)
    calls = []
    handle = pixart.transformer.register_forward_pre_hook(lambda module, args: calls.append(len(args[0])))
    assert contents(collect_pixart(pixart, cache_dir=tmp_path)) == contents(first)
    assert max(calls) <= 2  # only the merge check, no sampling
    other = CalibrationSettings(samples=24, steps=4, prompts_per_batch=4, seed=9)
    collect_pixart(pixart, other, cache_dir=tmp_path)
    handle.remove()
    assert max(calls) == 8
    assert len(list(tmp_path.iterdir())) == 2
    # A shard cut short by a broken disk is drawn again.
    shard = sorted(tmp_path.glob("*/batch-00001.safetensors"))[0]
    shard.write_bytes(shard.read_bytes()[:100])
    with pytest.warns(CacheWarning, match="batch-00001.* it is made again"):
        for settings in (SMALL, other):
            collect_pixart(pixart, settings, cache_dir=tmp_path)
    assert shard.stat().st_size > 100


def test_what_diffusers_notes_in_configs_does_not_decide_the_cache():
    """It lists the arguments left at their defaults in the order of a set, which every process has another of."""
    pipeline = tiny_pixart()
    requests = []
    for names in (["b", "a"], ["a", "b"]):
        for part in (pipeline.transformer, pipeline.scheduler):
            part.register_to_config(_use_default_values=names, _name_or_path=names[0])
        requests.append(sampling_of(pipeline, PROMPTS, SMALL, PIXART_KWARGS).request())
    assert requests[0] == requests[1]
    pipeline.scheduler.register_to_config(beta_end=0.5)
    assert sampling_of(pipeline, PROMPTS, SMALL, PIXART_KWARGS).request() != requests[0]


class Dots(nn.Module):
    def forward(self, sample, timestep):
        return sample * 0.9 - timestep.reshape(-1, 1) / 1000


class DotPipeline:
    """The least that counts as a pipeline: text gives the noise its colour; needs no diffusers."""

    def __init__(self):
        self.unet = Dots()

    def __call__(self, prompt, num_inference_steps=4, generator=None):
        pairs = zip(generator, prompt, strict=True)
        sample = torch.stack([torch.randn(3, generator=noise) + len(text) for noise, text in pairs])
        for timestep in torch.linspace(999, 0, num_inference_steps):
            sample = self.unet(sample, timestep)


KILLED = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
from test_calibration import SMALL, DotPipeline, PROMPTS, collect
pipeline = DotPipeline()
calls = []
def kill(module, args):
    calls.append(1)
    if len(calls) == 7:
        os.kill(os.getpid(), signal.SIGKILL)
pipeline.unet.register_forward_pre_hook(kill)
collect(pipeline, PROMPTS, SMALL, cache_dir=sys.argv[2], progress=False)
"""


def test_resume_after_kill(tmp_path):
    command = [sys.executable, "-c", KILLED, str(Path(__file__).parent), str(tmp_path)]
    assert subprocess.run(command, timeout=120, check=False).returncode == -signal.SIGKILL
    (shard,) = tmp_path.glob("*/*.safetensors")
    (shard.parent / ".batch-00001.safetensors.1").write_bytes(b"half")
    before = shard.stat().st_mtime_ns
    pipeline, sampled = DotPipeline(), []
    pipeline.unet.register_forward_pre_hook(lambda module, args: sampled.append(len(args[0]) == 4))
    resumed = collect(pipeline, PROMPTS, SMALL, cache_dir=tmp_path, progress=False)
    assert sum(sampled) == 4  # one batch of four steps, not two
    assert shard.stat().st_mtime_ns == before
    assert contents(resumed) == contents(collect(DotPipeline(), PROMPTS, SMALL, progress=False))


def test_interrupt_leaves_finished_shards_and_no_hooks(pixart, tmp_path):
    calls = []

    def interrupt(module, args):
        calls.append(1)
        if len(calls) == 7:
            raise KeyboardInterrupt

    handle = pixart.transformer.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        collect_pixart(pixart, cache_dir=tmp_path)
    handle.remove()
    assert not pixart.transformer._forward_pre_hooks
    files = [path.name for path in tmp_path.rglob("*") if path.is_file()]
    assert sorted(files) == ["batch-00000.safetensors", "index.json"]
    assert contents(collect_pixart(pixart, cache_dir=tmp_path)) == contents(collect_pixart(pixart))


def test_nan_names_the_timestep(pixart):
    def poison(module, args, kwargs):
        if kwargs["timestep"][0] < 500:
            args[0][0, 0, 0, 0] = float("nan")

    handle = pixart.transformer.register_forward_pre_hook(poison, with_kwargs=True)
    try:
        with pytest.raises(ValueError, match=r"in 'hidden_states' at timestep 250 \(denoiser call 3\)"):
            collect_pixart(pixart)
    finally:
        handle.remove()
    assert not pixart.transformer._forward_pre_hooks


def test_full_disk_says_so_and_leaves_nothing(pixart, tmp_path, monkeypatch):
    def full(self, content):
        with open(self, "wb") as file:
            file.write(content[:10])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="disk must have .* MiB free"):
        collect_pixart(pixart, cache_dir=tmp_path)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_estimate_is_near_what_collect_needs(pixart):
    needs, rows = probe(pixart, PROMPTS, SMALL, call_kwargs=PIXART_KWARGS)
    calibration = collect_pixart(pixart)
    assert (needs["rows"], needs["batches"], needs["calls"]) == (24, 2, 8)
    assert 0.7 * calibration.nbytes < needs["disk_bytes"] < 1.5 * calibration.nbytes
    assert 0 < needs["seconds"] < 30
    assert not pixart.transformer._forward_pre_hooks


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        (None, "list of strings"),
        ([], "at least one text"),
        ("a cat", "list of strings"),
        ([1], "list of strings"),
    ],
)
def test_bad_prompts(unet, prompts, message):
    with pytest.raises(ValueError, match=message):
        collect(unet, prompts, SMALL, progress=False)


def test_bad_arguments(unet):
    with pytest.raises(ValueError, match="'samples' must be a whole number of at least 1, got 0"):
        CalibrationSettings(samples=0)
    with pytest.raises(ValueError, match="got 'no_such'"):
        collect(tiny_ddim(), None, SMALL, progress=False, call_kwargs={"no_such": 1})
    with pytest.raises(ValueError, match="'guidance_scale' must be None for DDIMPipeline"):
        collect(tiny_ddim(), None, CalibrationSettings(guidance_scale=3.0), progress=False)
    with pytest.raises(ValueError, match="must have a denoiser"):
        denoiser_of(object())
    assert denoiser_of(unet) == ("unet", unet.unet)
    two = SimpleNamespace(transformer=nn.Linear(1, 1), transformer_2=nn.Linear(1, 1))
    with pytest.raises(ValueError, match="one denoiser, got transformer and transformer_2"):
        denoiser_of(two)


def test_load_prompts(tmp_path):
    path = tmp_path / "prompts.tsv"
    path.write_text(
        "# comment\nPrompt\tCategory\na red cat\tAnimals\n\n  \nthe sun, at noon\tSky\n", encoding="utf-8"
    )
    assert load_prompts(path) == ["a red cat", "the sun, at noon"]
    path.write_text("prompt\na cat\n")
    assert load_prompts(path) == ["prompt", "a cat"]
    for empty in ("", "# only this\n", "Prompt\tCategory\n"):
        path.write_text(empty)
        with pytest.raises(ValueError, match="at least one prompt"):
            load_prompts(path)
    path.write_bytes(b"caf\xe9\n")
    with pytest.raises(ValueError, match="UTF-8"):
        load_prompts(path)
    with pytest.raises(FileNotFoundError, match="check the path"):
        load_prompts(tmp_path / "none.txt")


class Plain(nn.Module):
    """Denoiser of our own, with nested arguments and a table that has no batch axis."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6, 6)

    def forward(self, x, t, extra):
        condition, options = extra
        return {
            "noise": self.linear(x) * t.float().reshape(-1, 1)
            + condition * options["scale"]
            + options["table"]
        }


class ScalarOnly(nn.Module):
    """Denoiser that broadcasts a scalar timestep the wrong way if it is a vector."""

    def forward(self, x, t):
        return x * t


def loop(module, batch=2):
    x = torch.randn(batch, 6)  # torch's own generator: collect_from_loop seeds it
    for timestep in (900, 600, 300):
        options = {"scale": 0.5, "table": torch.arange(6.0), "name": None}
        x = module(x, torch.tensor(timestep), (torch.ones(batch, 6), options))["noise"] / 1000


def test_plain_module_with_a_forward_loop(tmp_path):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = Plain()
    settings = CalibrationSettings(samples=4)
    calibration = collect_from_loop(module, loop, settings, cache_dir=tmp_path, progress=False)
    assert len(calibration) == 4 and set(calibration.timesteps) == {900.0, 600.0, 300.0}
    args, kwargs = calibration.batch([0, 3])
    assert kwargs == {} and isinstance(args[2], tuple) and args[2][1]["name"] is None
    assert args[2][1]["table"].shape == (6,) and args[1].shape == (2,) and args[0].shape == (2, 6)
    broken = collect_from_loop(module, lambda m: loop(m), settings, progress=False)
    assert contents(broken) == contents(calibration)

    def no_loop(module):
        raise AssertionError("a finished shard must be reused")

    no_loop.__qualname__, no_loop.__module__ = loop.__qualname__, loop.__module__
    again = collect_from_loop(module, no_loop, settings, cache_dir=tmp_path, progress=False)
    assert contents(again) == contents(calibration)


def test_inference_mode_loop_gives_tensors_for_autograd():
    module = Plain()
    calibration = collect_from_loop(
        module, torch.inference_mode()(loop), CalibrationSettings(samples=6), progress=False
    )
    args, _ = calibration.batch([0, 1])
    assert not args[0].is_inference()
    module(*args)["noise"].sum().backward()


def test_scalar_only_module_is_refused():
    def scalar_loop(module):
        x = torch.randn(2, 6)
        for timestep in (3.0, 1.0):
            x = module(x, torch.tensor(timestep))

    with pytest.raises(ValueError, match=r"timestep as a \[batch\] tensor"):
        collect_from_loop(ScalarOnly(), scalar_loop, CalibrationSettings(samples=4), progress=False)
    with pytest.raises(ValueError, match="must call the denoiser"):
        collect_from_loop(ScalarOnly(), lambda module: None, SMALL, progress=False)


def test_rows_with_different_shared_values_are_refused():
    def growing_loop(module):
        for scale in (0.5, 0.7):
            options = {"scale": scale, "table": torch.arange(6.0)}
            module(torch.randn(2, 6), torch.tensor(1), (torch.ones(2, 6), options))

    calibration = collect_from_loop(Plain(), growing_loop, CalibrationSettings(samples=4), progress=False)
    calibration.batch([0, 1])
    with pytest.raises(ValueError, match=r"different values or structure of \['extra'\]"):
        calibration.batch([0, 3])
    with pytest.raises(ValueError, match="from 0 to 3"):
        calibration.batch([4])
    assert merge([calibration._rows[0]], calibration._shelf.read)[0][1].tolist() == [1]
