"""Objectives of all kinds through the whole command: prepare, train on a mesh, stop, resume, evaluate, sample."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
from ml_collections import ConfigDict
from rich.console import Console

from jaxllm import evaluate, runs, train
from jaxllm.config import base
from jaxllm.engine.workdir import open_workdir

STEPS = 6
CASES: dict[str, dict[str, Any]] = {
    "masked_lm": {
        "model.name": "bert",
        "data.whole_words": True,
        "parallel.data": 2,
        "parallel.fsdp": 2,
        "parallel.tensor": 2,
        "sample.prompts": ("the square of <mask> is 4", "no mask"),
    },
    "span_corruption": {"model.name": "t5", "model.layers_as": "scan", "model.layers": 2},
    "seq2seq": {
        "model.name": "transformer",
        "tokenizer.kind": "char",
        "data.source": "sequences:reverse?count=400&symbols=4&min=3&max=9",
        "train.label_smoothing": 0.1,
        "parallel.fsdp": 4,
        "parallel.data": 2,
        "sample.prompts": ("abcd",),
    },
    "sft": {
        "model.name": "llama",
        "data.target_field": "even",
        "chat.template": "chatml",
        "model.context_tokens": 64,
        "parallel.fsdp": 2,
        "sample.prompts": ("the square of 4 is 16",),
    },
    "sequence_classification": {"model.name": "bert", "model.head": "classify", "data.target_field": "even"},
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sentences, each with a label."""
    path = tmp_path_factory.mktemp("source") / "squares.jsonl"
    with path.open("w") as file:
        for number in range(400):
            words = f"the square of {number} is {number * number}".split()
            file.write(json.dumps({"text": " ".join(words), "even": str(number % 2 == 0)}) + "\n")
    return path


def make_config(objective: str, source: Path, steps: int) -> ConfigDict:
    config = base()
    tiny = {
        "model.layers": 1,
        "model.decoder_layers": 1,
        "model.width": 16,
        "model.heads": 4,
        "model.context_tokens": 32,
        "model.dropout_frac": 0.1,
        "tokenizer.kind": "byte",
        "data.source": str(source),
        "train.objective": objective,
        "train.steps": steps,
        "train.batch_seqs": 16,
        "train.log_every_steps": 1,
        "schedule.name": "constant",
        "schedule.warmup_steps": 0,
        "optimizer.learning_rate": 1e-2,
        "eval.every_steps": 3,
        "checkpoint.every_steps": 3,
        "sample.every_steps": 3,
        "sample.tokens": 4,
        "sample.prompts": ("the ",),
    }
    for key, value in (tiny | CASES[objective]).items():
        section, _, name = key.partition(".")
        config[section][name] = value
    return config


def run(config: ConfigDict, workdir: Path) -> tuple[list[dict[str, Any]], str]:
    """(rows of metrics.jsonl without what depends on the clock, what was printed) of a run in this process."""
    output = io.StringIO()
    with open_workdir(workdir) as opened:
        assert train.run(config, opened, Console(file=output, width=200)) == 0
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in ("tokens_per_sec", "secs")} for row in rows], output.getvalue()


@pytest.mark.parametrize("objective", CASES)
def test_an_objective_trains_resumes_and_is_evaluated(objective: str, source: Path, tmp_path: Path) -> None:
    whole, said = run(make_config(objective, source, STEPS), tmp_path / "whole")
    run(make_config(objective, source, STEPS // 2), tmp_path / "parts")
    resumed, _ = run(make_config(objective, source, STEPS), tmp_path / "parts")
    # Noise and dropout are functions of the step: to the bit.
    assert resumed == whole
    validation = [row for row in whole if row["kind"] == "eval"]
    assert [row["step"] for row in validation] == [3, 6]
    assert validation[-1]["loss"] < validation[0]["loss"]

    found = evaluate.evaluate_split(runs.load(tmp_path / "whole"), "validation")
    # On one device instead of eight.
    for name in ("loss", "accuracy", "baseline_loss", "baseline_accuracy"):
        assert found[name] == pytest.approx(validation[-1][name], rel=2e-5), name
    assert ("exact" in found) == (objective == "seq2seq") and ("classes" in found) == ("classification" in objective)

    samples = tmp_path / "whole" / "samples.txt"
    if "classification" in objective:
        assert samples.read_text() == ""
    else:
        assert samples.read_text().count("=== step") == 2
    for text in (said, (tmp_path / "whole" / "report.html").read_text()):
        assert ("jaxllm.classify --run" in text) == ("classification" in objective)
        assert ("jaxllm.generate --chat --run" in text) == (objective == "sft")
    assert ("1 of sample.prompts left out" in said) == (objective == "masked_lm")
