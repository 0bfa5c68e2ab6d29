"""Run directories as the training command writes them, made up without training."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from jaxllm import config as schema

LOG_EVERY, EVAL_EVERY = 10, 100


def loss_at(step: int, floor: float) -> float:
    """A power law from about ln(2048) down to `floor`."""
    return floor + (7.6 - floor) * (1 + step / 20) ** -0.8


def write_run(
    directory: Path, *, steps: int = 1000, floor: float = 2.9, fingerprint: str = "f00d" * 16, seed: int = 0, **fields: Any
) -> Path:
    """Writes a whole run to `directory`. `fields`: config fields with "__" for the dot, e.g. model__layers=4."""
    directory.mkdir(parents=True)
    config = schema.base()
    config.train.steps = steps
    for key, value in fields.items():
        section, name = key.split("__")
        config[section][name] = value
    (directory / "config.json").write_text(schema.to_json(config))
    (directory / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows(steps, floor, seed)))
    (directory / "run.json").write_text(json.dumps(environment(steps)))
    (directory / "data.json").write_text(json.dumps(data(fingerprint)))
    (directory / "samples.txt").write_text(
        "=== step 500: samples ===\n>>> The \nThe <b>old & co\n\n=== step 1000: samples ===\n>>> The \nThe function returns <x>\n\n"
    )
    return directory


def rows(steps: int, floor: float, seed: int) -> list[dict[str, Any]]:
    noise = np.random.default_rng(seed)
    found = []
    for step in [1, *range(LOG_EVERY, steps + 1, LOG_EVERY)]:
        warm = min(1.0, step / 100)
        found.append(
            {
                "kind": "train",
                "step": step,
                "loss": loss_at(step, floor) + noise.normal(0, 0.08),
                "accuracy": 0.3,
                "grad_norm": 0.6 + 2 * math.exp(-step / 50) + abs(noise.normal(0, 0.1)),
                "lr": 3e-3 * warm * (0.1 + 0.45 * (1 + math.cos(math.pi * step / steps))),
                "tokens": step * 2048,
                "tokens_per_sec": 150.0 if step == 1 else 12000 + noise.normal(0, 400),
                "secs": 13.0 + step * 0.17,
                "skipped": 0,
            }
        )
        if step % EVAL_EVERY == 0:
            score = loss_at(step, floor) + 0.05
            found.append({"kind": "eval", "step": step, "loss": score, "perplexity": math.exp(score), "bits_per_byte": score / 2.5})
    return found


def environment(steps: int) -> dict[str, Any]:
    return {
        "parameters": 2_164_416,
        "trainable": 2_164_416,
        "bytes": {"params": 8657664, "gradients": 8657664, "optimizer": 17315328, "ema": 0},
        "compile_secs": 9.6,
        "memory_bytes": {"arguments": 26_000_000, "temporaries": 61_000_000, "outputs": 26_000_000, "peak": 92_000_000},
        "flops_per_step": 2.7e10,
        "devices": ["cpu"],
        "mesh": {"pipe": 1, "data": 1, "fsdp": 1, "seq": 1, "tensor": 1},
        "versions": {"jaxllm": "0.1.0", "jax": "0.10.2", "python": "3.11.7"},
        "started": "2026-11-22T16:00:00+00:00",
        "sessions": [
            {
                "started": "2026-11-22T16:00:00+00:00",
                "ended": "2026-11-22T16:03:10+00:00",
                "start_step": 0,
                "end_step": steps,
                "secs": 190.0,
                "reason": "done",
            }
        ],
    }


def data(fingerprint: str) -> dict[str, Any]:
    split = {
        "documents": 9120,
        "rows": 4210,
        "tokens": 538_880,
        "weighted_tokens": 529_760,
        "text_bytes": 1_911_022,
        "fingerprint": "ab" * 32,
    }
    return {
        "prepared": "2026-11-22T15:59:00+00:00",
        "secs": 21.4,
        "versions": {"jaxllm": "0.1.0", "python": "3.11.7", "numpy": "2.4.6", "sentencepiece": "0.2.3"},
        "recipe": {"data.source": "python_docs", "data.row_tokens": 128, "format": 1},
        "origins": {"data.source": [{"path": "python_docs", "version": "3.11.7"}]},
        "documents": {"data.source": {"read": 9800, "dropped": {"min_chars": 200}, "kept": 9600, "chars": 2_011_022}},
        "tokenizer": {"vocab_size": 2048, "fingerprint": fingerprint},
        "splits": {"train": split, "validation": split | {"documents": 480, "rows": 221, "tokens": 28_288}},
    }
