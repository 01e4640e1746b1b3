"""A few lines of code inside a checkpoint, for machines on which nobody imports difloat before loading it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from difloat.checkpoint.layout import CONFIG, read_json, write_json

LOADER = "difloat_loader"
INDEX = "model_index.json"  # of a pipeline

_TEXT = '''"""Loads this checkpoint through difloat: AutoModel.from_pretrained(..., trust_remote_code=True) runs this file."""

import difloat  # noqa: F401  (registers with diffusers and transformers)
from {library} import {name} as QuantizedModel  # noqa: F401
'''


def write_loaders(root: Path, models: Mapping[str, Any]) -> None:
    """Add the loader to saved models of diffusers or transformers, by sub-directory of `root`, and name it in their configs.

    Of a pipeline the index names it too, since that is what diffusers reads where it is asked for a sub-folder.
    """
    for name, model in models.items():
        kind = type(model)
        text = _TEXT.format(library=kind.__module__.split(".")[0], name=kind.__name__)
        (root / name / f"{LOADER}.py").write_text(text, encoding="utf-8")
    for path in [root / INDEX, *(root / name / CONFIG for name in models)]:
        if path.is_file():
            write_json(path, {**read_json(path), "auto_map": {"AutoModel": f"{LOADER}.QuantizedModel"}})
