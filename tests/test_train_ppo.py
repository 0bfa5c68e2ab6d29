"""PPO from end to end: what a block says, that a stopped run ends as if nothing had happened, and where its value head goes."""

import io
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import safetensors.numpy
from ml_collections import ConfigDict
from rich.console import Console

from jaxllm import adapters, convert, runs, start, train
from jaxllm import config as schema
from jaxllm.engine.workdir import open_workdir
from jaxllm.objectives import policy_losses

BASE: dict[str, Any] = {
    "model.layers": 1,
    "model.width": 32,
    "model.heads": 2,
    "model.context_tokens": 32,
    "tokenizer.kind": "char",
    "chat.template": "plain",
    "data.source": "sums:count=60&digits=1",
    "data.validation_frac": 0.2,
    "train.objective": "ppo",
    "train.steps": 8,
    "train.batch_seqs": 8,
    "train.log_every_steps": 1,
    "rl.prompts": 4,
    "rl.answers": 4,
    "rl.max_new_tokens": 4,
    "rl.refresh_steps": 2,
    "rl.epochs": 2,
    "rl.kl": 0.05,
    "rl.kl_target": 0.01,
    "rl.kl_horizon": 32,
    "rl.gamma": 0.9,
    "rl.gae_lambda": 0.8,
    "rl.rewards": (("learning_rewards:sevens", 1.0),),
    "rl.field_bytes": 20,
    "optimizer.learning_rate": 1e-2,
    "schedule.name": "constant",
    "schedule.warmup_steps": 0,
    "eval.every_steps": 0,
    "checkpoint.every_steps": 100,
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


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    workdir = tmp_path_factory.mktemp("ppo") / "finished"
    run(config_of(), workdir)
    return workdir


def test_the_coefficient_follows_the_divergence(finished: Path) -> None:
    drawn = rows(finished, "rollouts")
    assert [row["step"] for row in drawn] == [0, 2, 4, 6]
    expected = 0.05
    for row in drawn:
        assert row["kl_coefficient"] == pytest.approx(expected, rel=1e-12)
        # 16 answers of a horizon of 32.
        expected *= 1 + 0.5 * np.clip(row["kl"] / 0.01 - 1, -0.2, 0.2)
    assert drawn[0]["kl"] == 0 and drawn[1]["kl_coefficient"] == pytest.approx(0.05 * 0.9)
    assert drawn[-1]["kl"] > 0.012 and drawn[-1]["kl_coefficient"] != drawn[-2]["kl_coefficient"]
    # The head begins at 0: it explains nothing.
    assert drawn[0]["explained"] == pytest.approx(0, abs=1e-9)
    trained = rows(finished, "train")
    assert trained[0]["drift"] == pytest.approx(0, abs=1e-6) and trained[0]["value_clipped"] == 0
    assert trained[-1]["value_error"] > 0
    assert {"explained.png", "kl_coefficient.png", "kl.png"} <= {path.name for path in (finished / "pictures").iterdir()}


def test_the_arrays_of_a_block_follow_from_what_was_drawn(finished: Path) -> None:
    """Of the first block, whose values are 0 and whose model is the reference: rewards come at the end, and are learnt from there on."""
    with np.load(finished / "rollouts" / "6.npz") as file:
        newest = {name.removeprefix("batch/"): file[name][0] for name in file.files if name.startswith("batch/")}
    counts = newest["weights"] > 0
    np.testing.assert_allclose(newest["weights"][counts], 1 / counts.sum(), rtol=1e-6)
    advantages = newest["advantages"][counts].astype(np.float64)
    np.testing.assert_allclose([advantages.mean(), advantages.std()], [0, 1], atol=1e-6)
    assert not newest["advantages"][~counts].any() and not newest["returns"][~counts].any()
    # Whitened, they are an affine function of what was estimated: returns - values.
    estimated = (newest["returns"] - newest["old_values"])[counts].astype(np.float64)
    np.testing.assert_allclose(advantages, (estimated - estimated.mean()) / estimated.std(), atol=1e-4)
    # One step back of the recursion: A_t - gamma lambda A_{t+1} = r_t + gamma V_{t+1} - V_t, r_t what the divergence costs alone.
    inner = counts[:, :-1] & counts[:, 1:] & (newest["segments"][:, :-1] == newest["segments"][:, 1:])
    gaps = newest["returns"] - newest["old_values"]
    paid = (gaps[:, :-1] - 0.9 * 0.8 * gaps[:, 1:] - 0.9 * newest["old_values"][:, 1:] + newest["old_values"][:, :-1])[inner]
    assert inner.sum() > 3 and 0 < np.abs(paid).max() < 0.2
    values = newest["old_values"][counts]
    assert values.std() > 0
    loss, _ = policy_losses.value_loss(values, values, newest["returns"][counts], 0.2)
    np.testing.assert_allclose(2 * loss, estimated**2, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("stops", [(3,), (4,)])
def test_a_run_that_was_stopped_ends_as_if_nothing_had_happened(finished: Path, tmp_path: Path, stops: tuple[int, ...]) -> None:
    """In the middle of a block, and between two: parameters, metrics and the KL coefficient are equal to the last bit."""
    for steps in (*stops, 8):
        run(config_of(train__steps=steps), tmp_path)
    assert rows(tmp_path, "train", "rollouts") == rows(finished, "train", "rollouts")
    jax.tree.map(np.testing.assert_array_equal, runs.load(tmp_path).params, runs.load(finished).params)


def test_a_coefficient_that_is_gone_is_said(tmp_path: Path) -> None:
    run(config_of(train__steps=2), tmp_path)
    (tmp_path / "rollouts" / "0.npz").unlink()
    with pytest.raises(ValueError, match=r"(?s)with the KL coefficient of the answers of step 0, and '.*0.npz' is gone"):
        run(config_of(), tmp_path)


def begun_with(path: Path, **overrides: Any) -> ConfigDict:
    default = schema.base().tokenizer.kind
    return start.resolve(config_of(train__start=str(path), tokenizer__kind=default, **overrides), path / "none")


def test_it_learns_what_is_rewarded_beside_adapters(tmp_path: Path) -> None:
    """From a model without a value head, which is trained though nothing names it; what follows needs none."""
    grpo = {"train__objective": "grpo", "train__steps": 1, "rl__refresh_steps": 1, "rl__epochs": 1, "rl__kl_target": 0.0}
    run(config_of(**grpo), tmp_path / "grpo")
    more = {
        "train__transforms": ("lora",),
        "lora__rank": 4,
        "rl__refresh_steps": 1,
        "rl__epochs": 1,
        "rl__kl": 0.0,
        "rl__kl_target": 0.0,
    }
    more |= {"rl__answers": 6, "optimizer__learning_rate": 3e-2}
    said = run(begun_with(tmp_path / "grpo", train__steps=40, **more), tmp_path / "ppo")
    assert "begin at 0: value/bias, value/kernel" in said and "random" not in said
    drawn = rows(tmp_path / "ppo", "rollouts")
    assert drawn[0]["reward"] < 0.4 and np.mean([row["reward"] for row in drawn[-5:]]) > 0.8
    assert max(row["explained"] for row in drawn) > 0.05
    assert np.abs(runs.load(tmp_path / "ppo").params["value"]["kernel"]).max() > 0
    adapters.export(str(tmp_path / "ppo"), tmp_path / "peft")
    names = list(safetensors.numpy.load_file(tmp_path / "peft" / "adapter_model.safetensors"))
    assert names and all("lora_" in name for name in names)
    assert "not used: value/bias, value/kernel" in run(begun_with(tmp_path / "ppo", **grpo), tmp_path / "after")


def test_files_for_others_leave_the_value_head_out(tmp_path: Path) -> None:
    output, tokens = io.StringIO(), np.arange(6)[None]
    run(config_of(train__steps=2, tokenizer__kind="byte"), tmp_path / "ppo")
    assert convert.convert(tmp_path / "ppo", tmp_path / "hf", "", None, Console(file=output, width=200), checked=True) == 0
    assert "value/bias, value/kernel" in output.getvalue() and "ok" in output.getvalue()
    before, after = runs.load(tmp_path / "ppo"), runs.load(tmp_path / "hf")
    expected, found = (each.model.apply(each.params, tokens) for each in (before, after))
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"rl__kl": 0.0}, "rl.kl_target = 0.01 with rl.kl = 0"),
        ({"train__objective": "grpo"}, "rl.kl_target = 0.01 with train.objective = 'grpo'"),
    ],
)
def test_what_contradicts_itself_is_refused(overrides: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        config_of(**overrides)
