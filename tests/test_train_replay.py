"""A run that replays a second source and measures what it forgets of it: rows, messages, report, resuming."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ml_collections import ConfigDict
from rich.console import Console

from jaxllm import evaluate, runs, train
from jaxllm.config import base
from jaxllm.data import examples
from jaxllm.data.prepare import load
from jaxllm.engine.watchdog import Watchdog
from jaxllm.engine.workdir import open_workdir
from jaxllm.evals import baseline, perplexity

WINDS = ("north", "east", "south", "west")
MOST_SEQS = 5


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> ConfigDict:
    folder = tmp_path_factory.mktemp("sources")
    (folder / "text.txt").write_text("".join(f"line {n}: the square of {n} is {n * n}.\n" for n in range(400)))
    (folder / "general.txt").write_text("".join(f"On day {n % 31} the wind came from the {WINDS[n % 4]}.\n" for n in range(400)))
    config = base()
    config.model.update({"layers": 1, "width": 16, "heads": 2, "context_tokens": 32})
    config.tokenizer.kind = "byte"
    config.data.update({"source": str(folder / "text.txt"), "replay_source": str(folder / "general.txt"), "replay_frac": 0.25})
    config.train.update({"steps": 12, "batch_seqs": 16, "microbatches": 2, "log_every_steps": 1})
    config.optimizer.learning_rate = 1e-2
    config.schedule.update({"name": "constant", "warmup_steps": 0})
    config.eval.every_steps, config.checkpoint.every_steps, config.sample.tokens = 6, 6, 0
    config.eval.max_seqs = MOST_SEQS
    return config


def run(config: ConfigDict, workdir: Path) -> str:
    """What was printed."""
    output = io.StringIO()
    with open_workdir(workdir) as opened:
        assert train.run(config, opened, Console(file=output, width=200)) == 0
    return output.getvalue()


def rows(workdir: Path, kind: str) -> list[dict]:
    """Without what depends on the clock."""
    found = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in ("tokens_per_sec", "secs")} for row in found if row["kind"] == kind]


@pytest.fixture(scope="module")
def finished(config: ConfigDict, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    workdir = tmp_path_factory.mktemp("finished")
    return workdir, run(config, workdir)


def test_the_loss_on_replay_is_measured_before_during_and_after(finished: tuple[Path, str]) -> None:
    workdir, output = finished
    evals = rows(workdir, "eval")
    assert [row["step"] for row in evals] == [0, 6, 12]
    for row in evals:
        assert row["forgetting"] == row["replay_loss"] - evals[0]["replay_loss"]
    # Nothing was known, so nothing could be forgotten: it learns from the replayed rows.
    assert evals[2]["forgetting"] < -1
    first, last = evals[0], evals[2]
    change = f"on replay_source {first['replay_loss']:.3f} -> {last['replay_loss']:.3f} (forgetting {last['forgetting']:+.3f})"
    assert f"validation {first['loss']:.3f} -> {last['loss']:.3f}; {change}" in output
    assert f"step 6: validation loss {evals[1]['loss']:.4f}" in output
    assert f"on replay_source {evals[1]['replay_loss']:.4f} (forgetting {evals[1]['forgetting']:+.4f})" in output
    assert "replay: 4 of the 16 rows of a batch, 25" in output
    assert change.replace("->", "-&gt;") in (workdir / "report.html").read_text()


def assert_measured(workdir: Path) -> None:
    """The last evaluation is what the saved model gets on evenly spaced rows of either held-out split, on one device."""
    opened = runs.load(workdir)
    held = load(opened.config, workdir / "data")
    last = rows(workdir, "eval")[-1]
    assert last["step"] == opened.step
    # Beside conversations, text is replayed.
    for kind, split, objective in (
        ("", held.validation, opened.config.train.objective),
        ("replay_", held.replay_validation, "causal_lm"),
    ):
        config = opened.config.copy_and_resolve_references()
        config.train.objective = objective
        assert len(split) > MOST_SEQS
        chosen = np.arange(MOST_SEQS) * len(split) // MOST_SEQS
        batch = examples.make(config).batch(held.tokenizer)(split.rows(chosen), chosen, 0, 0)
        expected = perplexity.make_eval(opened.model, config)(opened.params, [batch], split.bytes_per_token)
        names = ("loss", "perplexity", "accuracy", *["bits_per_byte"] * (objective == "causal_lm"))
        assert [last[kind + name] for name in names] == pytest.approx([expected[name] for name in names], rel=2e-5)
    guess = baseline.measure(held.train, held.validation, held.make_batch(opened.config), opened.config.model.vocab_size, MOST_SEQS)
    assert (last["baseline_loss"], last["baseline_accuracy"]) == pytest.approx(guess)


def test_each_loss_is_that_of_its_own_held_out_rows(finished: tuple[Path, str]) -> None:
    assert_measured(finished[0])


def test_text_is_replayed_beside_conversations(config: ConfigDict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was learned of text is measured as text, with its bits per byte, whatever the answers are measured by. Each batch of an
    evaluation is a sign of life."""
    signs, each = [], Watchdog.each

    def spy(self: Watchdog, batches: Any) -> Any:
        for batch in each(self, batches):
            signs.append(batch)
            yield batch

    monkeypatch.setattr(Watchdog, "each", spy)
    exchanges = (json.dumps({"prompt": f"{n}?", "completion": f"It is {n}."}) for n in range(200))
    (tmp_path / "talk.jsonl").write_text("\n".join(exchanges))
    config = config.copy_and_resolve_references()
    config.train.update({"objective": "sft", "steps": 2})
    config.data.source, config.chat.template = str(tmp_path / "talk.jsonl"), "plain"
    run(config, tmp_path / "run")
    assert_measured(tmp_path / "run")
    assert len(signs) == 2 * len(rows(tmp_path / "run", "eval")) == 4


def test_a_resumed_run_goes_on_as_if_nothing_had_happened(config: ConfigDict, finished: tuple[Path, str], tmp_path: Path) -> None:
    config = config.copy_and_resolve_references()
    config.train.steps = 6
    # Of a run that was begun here before, and never got to a checkpoint.
    (tmp_path / "metrics.jsonl").write_text('{"kind": "eval", "step": 0, "loss": 1.0, "replay_loss": 1.0}\n')
    run(config, tmp_path)
    config.train.steps = 12
    output = run(config, tmp_path)
    assert "resuming at step 6" in output
    assert "step 0:" not in output
    for kind in ("train", "eval"):
        assert rows(tmp_path, kind) == rows(finished[0], kind)


@pytest.mark.parametrize("objective", ["causal_lm", "sft"])
def test_evaluate_finds_the_same_on_the_rows_of_replay(config: ConfigDict, tmp_path: Path, objective: str) -> None:
    """Beside conversations they are plain text. It takes all rows, as the run does without eval.max_seqs."""
    config, workdir = config.copy_and_resolve_references(), tmp_path / "run"
    config.train.steps, config.eval.max_seqs = 2, 0
    if objective == "sft":
        talks = [{"prompt": f"{n}?", "completion": f"{n * n}."} for n in range(40)]
        (tmp_path / "talks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in talks))
        config.data.source, config.train.objective, config.chat.template = str(tmp_path / "talks.jsonl"), "sft", "plain"
    run(config, workdir)
    opened, last = runs.load(workdir), rows(workdir, "eval")[-1]
    found = evaluate.evaluate_split(opened, "replay_validation")
    for name in ("loss", "accuracy", "bits_per_byte"):
        assert found[name] == pytest.approx(last[f"replay_{name}"], rel=1e-5)
    assert found["objective"] == "causal_lm" and found["data"].endswith("general.txt (replay validation rows)")
    trained = evaluate.evaluate_split(opened, "replay")
    assert trained["bytes"] > 10 * found["bytes"] and trained["data"].endswith("general.txt (replay rows)")
    # Of the frequencies in the rows of replay.
    assert found["baseline_loss"] == pytest.approx(trained["baseline_loss"], rel=0.1)
    with pytest.raises(ValueError, match="has no split 'test'.\n  Accepted: train, validation, replay, replay_validation.\n  "):
        evaluate.evaluate_split(opened, "test")


def test_a_source_that_is_only_measured_changes_nothing(config: ConfigDict, tmp_path: Path) -> None:
    """With the source itself as replay source the same rows are held out of both."""
    config = config.copy_and_resolve_references()
    config.data.update({"replay_source": "", "replay_frac": 0.0})
    run(config, tmp_path / "plain")
    with pytest.raises(ValueError, match="no split 'replay', as data.replay_source was empty.\n  Accepted: train, validation.\n  "):
        evaluate.evaluate_split(runs.load(tmp_path / "plain"), "replay")
    config.data.replay_source = config.data.source
    assert "only the loss on it is measured" in run(config, tmp_path / "measured")
    assert rows(tmp_path / "plain", "train") == rows(tmp_path / "measured", "train")
    plain, (_, *measured) = rows(tmp_path / "plain", "eval"), rows(tmp_path / "measured", "eval")
    for before, row in zip(plain, measured, strict=True):
        assert (row["loss"], row["replay_loss"], row["replay_accuracy"]) == (before["loss"], before["loss"], before["accuracy"])
    assert not [name for name in plain[0] if "replay" in name or name == "forgetting"]
