"""GRPO from end to end: it learns, what it writes, and that a run which was stopped ends as if nothing had happened."""

import io
import json
from pathlib import Path
from typing import Any

import jax
import learning_rewards
import numpy as np
import pytest
from ml_collections import ConfigDict
from rich.console import Console

from jaxllm import config as schema
from jaxllm import evaluate, runs, train
from jaxllm.engine.workdir import open_workdir

BASE: dict[str, Any] = {
    "model.layers": 1,
    "model.width": 32,
    "model.heads": 2,
    "model.context_tokens": 32,
    "tokenizer.kind": "char",
    "chat.template": "plain",
    "data.source": "sums:count=60&digits=1",
    "data.validation_frac": 0.2,
    "train.objective": "grpo",
    "train.steps": 10,
    "train.batch_seqs": 8,
    "train.log_every_steps": 1,
    "rl.prompts": 3,
    "rl.answers": 4,
    "rl.max_new_tokens": 4,
    "rl.refresh_steps": 4,
    "rl.epochs": 2,
    "rl.kl": 0.05,
    "rl.rewards": (("learning_rewards:failing", 1.0), ("exact_match", 0.5)),
    "rl.field_bytes": 20,
    "optimizer.learning_rate": 1e-2,
    "schedule.name": "constant",
    "schedule.warmup_steps": 0,
    "eval.every_steps": 5,
    "checkpoint.every_steps": 3,
    "sample.tokens": 0,
    "parallel.data": 1,
}


def config_of(**overrides: Any) -> ConfigDict:
    config = schema.base()
    for key, value in (BASE | {key.replace("__", "."): value for key, value in overrides.items()}).items():
        section, _, name = key.rpartition(".")
        config[section][name] = value
    schema.check(config)
    return config


def run(config: ConfigDict, workdir: Path) -> str:
    """What was printed."""
    output = io.StringIO()
    with open_workdir(workdir) as opened:
        assert train.run(config, opened, Console(file=output, width=200)) == 0
    return output.getvalue()


def rows(workdir: Path, *kinds: str) -> list[dict]:
    """Rows of metrics.jsonl without what depends on the clock."""
    found = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    clock = ("tokens_per_sec", "secs", "rollout_secs")
    return [{key: value for key, value in row.items() if key not in clock} for row in found if row["kind"] in kinds]


def params_of(workdir: Path) -> Any:
    return runs.load(workdir).params


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    workdir = tmp_path_factory.mktemp("grpo") / "finished"
    output = run(config_of(), workdir)
    assert "step 4: reward 0." in output and "validation reward" in output
    return workdir


def test_what_a_run_writes(finished: Path) -> None:
    drawn, trained, evals = (rows(finished, kind) for kind in ("rollouts", "train", "eval"))
    assert [row["step"] for row in drawn] == [0, 4, 8]
    assert [row["step"] for row in trained] == list(range(1, 11))
    assert [row["step"] for row in evals] == [5, 10]
    for row in drawn:
        parts = row["reward_learning_rewards:failing"] + 0.5 * row["reward_exact_match"]
        assert row["reward"] == pytest.approx(parts, abs=1e-9)
        assert 0 < row["answer_tokens"] <= 4 and 0 <= row["truncated"] <= 1
        # The sampler's cache and the trainer's packed rows give the same probabilities.
        assert row["sampler_difference"] < 1e-4
    assert max(row["reward_std"] for row in drawn) > 0 and min(row["alike"] for row in drawn) < 1
    assert drawn[0]["kl"] == 0 and drawn[1]["kl"] != 0
    # The model that drew is the one that is trained first: nothing has drifted, nothing is clipped.
    assert trained[0]["drift"] == pytest.approx(0, abs=1e-6) and trained[0]["clipped_low"] == trained[0]["clipped_high"] == 0
    assert trained[0]["kl"] == pytest.approx(0, abs=1e-6)
    # The same answers once more, two updates later.
    assert trained[2]["drift"] > 1e-3
    assert all(row["weight"] == 1 for row in trained if "weight" in row)
    assert {"reward", "reward_exact_match", "answer_tokens"} <= evals[0].keys()
    assert (finished / "samples.txt").read_text().count("=== step") == 3
    text = (finished / "report.html").read_text()
    assert "Reward of drawn and of held-out answers" in text and "damaged" not in text and "validation reward" in text
    assert {"reward.png", "kl.png", "entropy.png", "answer_tokens.png"} <= {path.name for path in (finished / "pictures").iterdir()}


def test_the_arrays_of_a_block_say_what_was_drawn(finished: Path) -> None:
    """The newest block's file: advantages have mean 0 in each group, weights sum to the loss's weight, answers follow their prompts."""
    with np.load(finished / "rollouts" / "8.npz") as file:
        arrays = {name.removeprefix("batch/"): file[name] for name in file.files if name.startswith("batch/")}
        prompts = file["rows"]
    assert prompts.shape == (2, 3)
    assert {name: array.shape for name, array in arrays.items()} == dict.fromkeys(arrays, (2, 8, 32))
    counts = arrays["weights"] > 0
    for number in range(2):
        # dapo: each token counts 1 / mean tokens of a batch.
        np.testing.assert_allclose(arrays["weights"][number][counts[number]], 2 / counts.sum(), rtol=1e-6)
        first = counts[number] & ~np.pad(counts[number], ((0, 0), (1, 0)))[:, :-1]
        assert first.sum() == 12
        assert np.isclose(arrays["advantages"][number][first].sum(), 0, atol=1e-4)
    assert (arrays["old"][counts] < 0).all() and not arrays["old"][~counts].any()
    assert (arrays["segments"][counts] > 0).all()


def test_the_command_evaluates_what_the_run_did(finished: Path, capsys: pytest.CaptureFixture) -> None:
    row = evaluate.evaluate_split(runs.load(finished), "validation")
    last = rows(finished, "eval")[-1]
    for name in ("reward", "reward_exact_match", "answer_tokens", "answers"):
        assert row[name] == pytest.approx(last[name], abs=1e-9)
    evaluate.show(row, Console(width=200))
    assert "reward exact match" in capsys.readouterr().out


@pytest.mark.parametrize("stops", [(5,), (8,)])
def test_a_run_that_was_stopped_ends_as_if_nothing_had_happened(finished: Path, tmp_path: Path, stops: tuple[int, ...]) -> None:
    """In the middle of a block, and between two: parameters and metrics are equal to the last bit."""
    for steps in (*stops, 10):
        run(config_of(train__steps=steps), tmp_path)
    assert rows(tmp_path, "train", "rollouts") == rows(finished, "train", "rollouts")
    jax.tree.map(np.testing.assert_array_equal, params_of(tmp_path), params_of(finished))
    assert (tmp_path / "samples.txt").read_text() == (finished / "samples.txt").read_text()


@pytest.mark.parametrize("calls", [3, 4])
def test_a_run_that_failed_goes_on_from_its_checkpoint(finished: Path, tmp_path: Path, calls: int) -> None:
    """While it draws the answers of step 4, after the checkpoint of step 3; and in the validation of step 5, with a block that is newer
    than the checkpoint."""
    learning_rewards.calls["left"] = calls
    with pytest.raises(learning_rewards.Failure):
        run(config_of(), tmp_path)
    assert "resuming at step 3" in run(config_of(), tmp_path)
    assert rows(tmp_path, "train", "rollouts", "eval") == rows(finished, "train", "rollouts", "eval")
    jax.tree.map(np.testing.assert_array_equal, params_of(tmp_path), params_of(finished))


def test_a_block_that_is_gone_is_said(finished: Path, tmp_path: Path) -> None:
    run(config_of(train__steps=5), tmp_path)
    (tmp_path / "rollouts" / "4.npz").unlink()
    with pytest.raises(ValueError, match=r"(?s)in the middle of the answers that it drew at step 4.*rl.refresh_steps = 4"):
        run(config_of(), tmp_path)


@pytest.mark.parametrize(
    "settings",
    [
        {"train__transforms": ("lora",), "lora__rank": 4},
        {"parallel__data": 2, "parallel__fsdp": 2, "parallel__tensor": 2, "model__vocab_size": 16},
    ],
    ids=["lora", "mesh"],
)
def test_it_learns_what_is_rewarded(tmp_path: Path, settings: dict[str, Any]) -> None:
    """From nothing: a digit in eleven is a 7 at first, nearly each in the end, and in greedy answers too. With adapters, and on a mesh,
    where the model has a row more than there are tokens."""
    settings |= {"rl__kl": 0.0, "rl__rewards": (("learning_rewards:sevens", 1.0),), "rl__prompts": 4, "rl__answers": 6}
    more = {"rl__refresh_steps": 1, "rl__epochs": 1, "checkpoint__every_steps": 100, "eval__every_steps": 0}
    more |= {"optimizer__learning_rate": 3e-2}
    run(config_of(train__steps=40, **settings, **more), tmp_path)
    drawn = [row["reward"] for row in rows(tmp_path, "rollouts")]
    assert drawn[0] < 0.25 and np.mean(drawn[-5:]) > 0.9
    assert rows(tmp_path, "eval")[-1]["reward"] > 0.95
    assert max(row["sampler_difference"] for row in rows(tmp_path, "rollouts")) < 1e-4


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"(?s)4 x 40 = 160 answers a step.*Accepted: up to 24 answers.*train.batch_seqs=54"):
        run(config_of(rl__prompts=4, rl__answers=40), tmp_path)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"rl__answers": 1}, "rl.answers = 1 with train.objective = 'grpo'"),
        ({"rl__epochs": 3}, "rl.epochs = 3 does not divide rl.refresh_steps = 4"),
        ({"rl__max_new_tokens": 33}, "rl.max_new_tokens = 33 in rows of 32"),
        ({"parallel__seq": 2}, "parallel.seq = 2 with train.objective = 'grpo'"),
        ({"data__replay_source": "python_docs"}, "data.replay_source = 'python_docs' with train.objective = 'grpo'"),
    ],
)
def test_what_contradicts_itself_is_refused(overrides: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        config_of(**overrides)
