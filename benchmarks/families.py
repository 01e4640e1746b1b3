"""Write docs/families.md from the lists of the tests: which pipeline classes of diffusers work, what was tried, and why not.

    python benchmarks/families.py

`tests/test_pipeline_sweep.py` runs what the page says, and fails where the page is not what this script writes.
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs/families.md"
_HEAD = """# Families of pipelines

`benchmarks/families.py` writes this page from the lists that `tests/test_pipeline_sweep.py` runs over: every pipeline class of
diffusers {version}, {classes} in all. A new class that is on neither list fails the suite.

## What works

Each of these {built} classes was built tiny, with random weights and its real components. It was saved, quantized by
`difloat quantize`, and sampled by `difloat generate`. Loaded by diffusers' own `from_pretrained`, it gave the same samples.
This shows structure, not quality. Recipe `rtn` needs no data. Recipe `lbfp` was calibrated by running the pipeline itself.

Pictures and masks go in as `--input name=FILE`. Arrays are NumPy files, such as the embeddings that `difloat generate` writes
for a prior. Several files of one name make a list, such as the frames of a video. Other arguments of the call are
`--call name=value`:

```text
difloat quantize my-video-model small --recipe rtn
difloat generate small clips --count 1 --input image=first-frame.png --call num_frames=25
```

Where a pipeline has two denoisers (Wan 2.2), both are quantized, each calibrated at its own timesteps. Combined pipelines of
two stages have their decoder quantized. Control networks, adapters and autoencoders stay as they are unless
`--components` names them.

An IP-Adapter is loaded onto the quantized pipeline with `load_ip_adapter`, after loading the checkpoint. Quantizing with one
works as well, but such a model is not saved, since no config describes it. `save` then says so.
"""
_KINDS = """
## What is quantized in a denoiser, and what stays

| layers | what becomes of them |
|---|---|
| linear layers, two-dimensional convolutions | quantized as the recipe says |
| experts that are linear layers of their own (HiDream) | quantized |
| experts stacked in one tensor (NucleusMoE) | stay float |
| one- and three-dimensional convolutions (sound, patch embedders and temporal blocks of video) | stay float |
| transposed convolutions | stay float |
| embeddings, norms, torch's own attention | stay float |
| layers whose weight the model reads without calling them | stay float |

`difloat quantize` names what is left in float, and the plan of a checkpoint keeps the reason for each of them
(`Plan.skipped`).
"""
_TABLE = """
## Classes that work

| class | takes | recipes tried | needs besides |
|---|---|---|---|
"""
_REASONS = """
## Classes that were not run

"Not tried" means that no tiny build of it exists here yet. Its denoiser may well be in the
[sweep over denoisers](../tests/class_table.py), which quantizes, saves and loads every denoiser class alone.

| reason | classes |
|---|---|
"""


def page() -> str:
    """The page."""
    sys.path.insert(0, str(ROOT / "tests"))
    import diffusers

    from pipeline_table import BUILT, CALIBRATED, REASONS

    rows = []
    for name, row in sorted(BUILT.items()):
        takes = ["text"] * row.prompts + [*row.pictures, *row.arrays]
        recipes = "rtn, lbfp" if name in CALIBRATED else "rtn"
        rows.append(f"| {name} | {', '.join(takes) or 'nothing'} | {recipes} | {row.needs or ''} |")
    reasons: dict[str, list[str]] = {}
    for name, reason in sorted(REASONS.items()):
        reasons.setdefault(reason, []).append(name)
    others = [f"| {reason} | {', '.join(names)} |" for reason, names in sorted(reasons.items())]
    counts = {"version": diffusers.__version__, "built": len(BUILT), "classes": len(BUILT) + len(REASONS)}
    return "".join(
        [_HEAD.format(**counts), _KINDS, _TABLE, "\n".join(rows), "\n", _REASONS, "\n".join(others), "\n"]
    )


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(PAGE)
