"""A whole run directory around a random model: nothing is trained, everything that reads a run can read it."""

import json
from pathlib import Path
from typing import Any

import jax

from jaxllm import config as schema
from jaxllm import models
from jaxllm.data.prepare import prepare
from jaxllm.engine import state
from jaxllm.engine.checkpoint import Checkpoints

TEXT = "The quick brown fox jumps over the lazy dog, and 1 + 1 is 2.\nGrüße aus Köln, 日本語 too.\n"
STEPS = (10, 20)


def write_run(directory: Path, **fields: Any) -> Path:
    """The run, with checkpoints of STEPS (seeded by the step) and prepared data. `fields`: config fields with "__" for the dot."""
    source = directory / "text.jsonl"
    directory.mkdir(parents=True)
    rows = [json.dumps({"text": f"{index} {TEXT[: 20 + 7 * index]}"}) for index in range(12)]
    source.write_text("\n".join(rows), encoding="utf-8")
    config = schema.base()
    sizes = {"layers": 2, "width": 32, "heads": 4, "kv_heads": 2, "context_tokens": 64}
    config.model.update(sizes)
    config.tokenizer.kind = "byte"
    config.data.source = str(source)
    config.data.validation_frac = 0.4
    config.train.batch_seqs = 4
    for key, value in fields.items():
        section, _, name = key.partition("__")
        config[section][name] = value
    (directory / "config.json").write_text(schema.to_json(config))
    prepared = prepare(config, directory / "data", log=lambda line: None)
    prepared.tokenizer.save(str(directory / "tokenizer"))
    (directory / "data.json").write_text(json.dumps(prepared.record))
    config.model.vocab_size = prepared.tokenizer.vocab_size
    model, checkpoints = models.build(config), Checkpoints(directory / "checkpoints", keep_last=len(STEPS))
    for step in STEPS:
        scaled = jax.tree.map(lambda x: 4 * x, model.init(jax.random.key(step)))
        params = state.narrowed(scaled, model.axes, config, state.trains(config, model.axes))
        average = {"ema": jax.tree.map(lambda x: x / 2, params)} if config.train.ema_decay else {}
        checkpoints.save(step, {"params": params} | average)
    checkpoints.close()
    return directory
