"""Runs that trained adapters, and their files: nothing is trained, the adapters are drawn."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
from random_run import write_run
from rich.console import Console

from jaxllm import adapters, convert, models, runs
from jaxllm import config as schema
from jaxllm.data import tokenize
from jaxllm.engine import state
from jaxllm.engine.checkpoint import Checkpoints
from jaxllm.transforms import adapt, tree

ROOT = Path(__file__).resolve().parent.parent
TOKENS_BT = np.random.default_rng(0).integers(0, 200, (2, 9))
TRAINED = {
    "lora": {"rank": 4, "targets": ".*(q|v)/kernel"},
    "dora": {"rank": 2, "rslora": True, "also": "norm/scale"},
    "pissa": {"rank": 3, "init": "pissa", "targets": ".*mlp/.*/kernel"},
}


def write(folder: Path) -> Path:
    """The folder, with first, a run; base, the same for transformers; lora, dora and pissa, which began with it; NAME_peft, their files."""
    write_run(folder / "first", model__kv_heads=4)
    convert.convert(folder / "first", folder / "base", "hf", None, Console(quiet=True))
    base = runs.load(folder / "base")
    for name, settings in TRAINED.items():
        train(folder, name, base, **settings)
        adapters.export(str(folder / name), folder / f"{name}_peft")
    return folder


def train(folder: Path, name: str, base: runs.Run, tokenizer: Any = None, **settings: Any) -> None:
    """A run as one that began with the base: its adapter has moved, and the rest is as it was. tokenizer: one with new tokens."""
    config = schema.load(folder / "first" / "config.json").copy_and_resolve_references()
    config.train.transforms = ("dora" if name == "dora" else "lora",)
    config.train.start = str(folder / "base")
    config.model.layers_as = "scan" if name == "pissa" else "unrolled"
    config.lora.update(settings)
    config.model.start_rows = base.config.model.vocab_size
    (folder / name).mkdir(parents=True)
    (folder / name / "config.json").write_text(schema.to_json(config))
    tokenizer = tokenizer or tokenize.load(folder / "first" / "tokenizer")
    tokenizer.save(str(folder / name / "tokenizer"))
    config.model.vocab_size = tokenizer.vocab_size
    model = models.build(config)
    stacked = tree.stack_layers(base.params) if name == "pissa" else base.params
    more = [(0, config.model.vocab_size - config.model.start_rows), (0, 0)]
    stacked = {
        **stacked,
        **{part: jax.tree.map(lambda table: jax.numpy.pad(table, more), stacked[part]) for part in ("embed", "head")},
    }
    dense = config.copy_and_resolve_references()
    dense.train.transforms = ()
    params = adapt.Adaptation(models.build(dense).axes, model.config.transforms).params(stacked, jax.random.key(0))
    moved, rng = state.trainable(config, model.axes), np.random.default_rng(1)
    params = jax.tree.map_with_path(
        lambda path, array: (
            array + 0.1 * rng.normal(size=array.shape).astype("float32") if tree.path_name(path) in moved else array
        ),
        params,
    )
    checkpoints = Checkpoints(folder / name / "checkpoints")
    checkpoints.save(5, {"params": params})
    checkpoints.close()


def logits(run: runs.Run) -> np.ndarray:
    return np.asarray(run.model.apply(run.params, TOKENS_BT))


def command(*flags: str) -> "subprocess.CompletedProcess[str]":
    environment = {**os.environ, "COLUMNS": "200"}
    return subprocess.run(
        [sys.executable, "-m", *flags], cwd=ROOT, env=environment, capture_output=True, text=True, check=False, errors="replace"
    )
