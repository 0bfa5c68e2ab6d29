"""Reward models through the whole command: a rule is learnt, by all models and beside adapters; runs resume to the bit, on a mesh as on one
device, and end with a picture of their calibration."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from random_run import write_run
from rich.console import Console

import jaxllm
from jaxllm import config as schema
from jaxllm import convert, evaluate, runs, start, train
from jaxllm.engine.workdir import open_workdir
from jaxllm.report.training import write_report

# What a model to begin with says by itself.
ARCHITECTURE = ("model__name", "model__layers", "model__width", "model__heads", "model__context_tokens", "tokenizer__kind")
Finished = tuple[Path, list[dict[str, Any]], str]


def words(rng: np.random.Generator, red: int) -> str:
    return "".join("r" if index < red else "b" for index in rng.permutation(9))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of two answers the one with more of one word is the better one."""
    rng, rows = np.random.default_rng(0), []
    for number in range(400):
        less, more = sorted(rng.choice(np.arange(1, 9), 2, replace=False).tolist())
        rows.append(
            {"prompt": f"say {number}", "chosen": words(rng, more), "rejected": words(rng, less), "margin": (more - less) / 4}
        )
    path = tmp_path_factory.mktemp("source") / "pairs.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def make_config(source: Path, **fields: Any) -> Any:
    config = schema.base()
    tiny = {
        "model__name": "llama",
        "model__head": "classify",
        "model__layers": 1,
        "model__width": 32,
        "model__heads": 4,
        "model__context_tokens": 64,
        "tokenizer__kind": "byte",
        "data__source": str(source),
        "data__validation_frac": 0.2,
        "chat__template": "plain",
        "train__objective": "reward",
        "train__steps": 40,
        "train__batch_seqs": 16,
        "train__log_every_steps": 1,
        "schedule__warmup_steps": 4,
        "optimizer__learning_rate": 1e-2,
        "eval__every_steps": 20,
        "checkpoint__every_steps": 20,
        "parallel__data": 1,
    }
    for key, value in (tiny | fields).items():
        section, _, name = key.partition("__")
        config[section][name] = value
    return config


def run(config: Any, workdir: Path) -> tuple[list[dict[str, Any]], str]:
    """(rows of metrics.jsonl without what depends on the clock, what was printed) of a run in this process."""
    config, output = start.resolve(config, workdir), io.StringIO()
    schema.check(config)
    with open_workdir(workdir) as opened:
        assert train.run(config, opened, Console(file=output, width=200)) == 0
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in ("tokens_per_sec", "secs")} for row in rows], output.getvalue()


def evals(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [row for row in rows if row["kind"] == "eval"]


@pytest.fixture(scope="module")
def finished(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    workdir = tmp_path_factory.mktemp("finished")
    return workdir, *run(make_config(source), workdir)


def test_a_rule_is_learnt_and_what_is_measured_is_shown(finished: Finished) -> None:
    workdir, rows, said = finished
    last = evals(rows)[-1]
    assert last["accuracy"] >= 0.9 and last["pairs"] >= 60
    np.testing.assert_allclose(last["margin"], last["chosen_reward"] - last["rejected_reward"], atol=1e-5)
    # Centred: the squared sum of a pair's rewards stays small beside the difference.
    assert abs(last["chosen_reward"] + last["rejected_reward"]) < 0.5 * last["margin"] and 0 < last["penalty"] < 0.2
    assert sum(pairs for _, _, pairs in last["calibration"]) == last["pairs"] and 0 <= last["calibration_error"] < 0.2
    assert f"jaxllm.reward --run {workdir}" in said and "jaxllm.classify" not in said
    page = write_report(workdir).read_text()
    assert "calibration error" in page and "jaxllm.reward --run" in page and "beta too low" not in page
    assert (workdir / "pictures" / "calibration.png").is_file()


def test_evaluation_is_that_of_the_run_and_shows_bins(finished: Finished, source: Path) -> None:
    workdir, rows, _ = finished
    last, opened = evals(rows)[-1], runs.load(workdir)
    found = evaluate.evaluate_split(opened, "validation")
    for name in ("loss", "penalty", "accuracy", "margin", "chosen_reward", "rejected_reward", "calibration_error"):
        assert found[name] == pytest.approx(last[name], rel=1e-4, abs=1e-5), name
    np.testing.assert_allclose(found["calibration"], last["calibration"], rtol=1e-4)
    assert evaluate.evaluate_source(opened, str(source))["pairs"] == 400
    output = io.StringIO()
    evaluate.show(found, Console(file=output, width=120))
    for text in ("calibration error", "probability", "is right", f"{found['accuracy']:.4f}"):
        assert text in output.getvalue()


def test_an_export_is_evaluated_as_the_run_is(finished: Finished, source: Path, tmp_path: Path) -> None:
    """Opened as a model of transformers with one label."""
    assert convert.convert(finished[0], tmp_path / "hf", "hf", None, Console(file=io.StringIO()), checked=True) == 0
    both = [evaluate.evaluate_source(runs.load(path), str(source)) for path in (finished[0], tmp_path / "hf")]
    for name in ("accuracy", "margin", "calibration_error", "pairs"):
        assert both[1][name] == pytest.approx(both[0][name], rel=1e-5), name


def test_scores_of_the_run_rank_as_the_rule_does(finished: Finished) -> None:
    scorer, rng = jaxllm.reward_model(finished[0]), np.random.default_rng(9)
    answers = [words(rng, red) for red in range(10)]
    found = scorer(["say 7"] * 10, answers)
    # Spearman: ranks of ten answers in the order of the rule.
    assert np.corrcoef(np.argsort(np.argsort(found)), np.arange(10))[0, 1] > 0.9


def test_a_run_goes_on_to_the_bit(finished: Finished, source: Path, tmp_path: Path) -> None:
    config = make_config(source, schedule__name="constant", train__steps=20)
    run(config, tmp_path / "parts")
    resumed, _ = run(make_config(source, schedule__name="constant"), tmp_path / "parts")
    whole, _ = run(make_config(source, schedule__name="constant"), tmp_path / "whole")
    assert resumed == whole


@pytest.mark.parametrize("name", ["gpt", "bert"])
def test_other_models_learn_it(source: Path, tmp_path: Path, name: str) -> None:
    """Without centring, too, where parameters that shift all rewards alike have no gradient."""
    rows, _ = run(make_config(source, model__name=name, reward__centering=0.0), tmp_path)
    assert evals(rows)[-1]["accuracy"] >= 0.9
    found = evaluate.evaluate_split(runs.load(tmp_path), "validation")
    assert found["loss"] == pytest.approx(evals(rows)[-1]["loss"], rel=1e-4)


def test_a_margin_in_the_data_makes_the_rewards_differ_more(finished: Finished, source: Path, tmp_path: Path) -> None:
    without = evals(run(make_config(source, reward__margin_factor=0.0), tmp_path)[0])[-1]
    assert evals(finished[1])[-1]["margin"] > without["margin"]


@pytest.mark.parametrize("transforms", [("lora",), ("nf4", "lora")], ids="+".join)
def test_adapters_and_a_new_head_learn_it_beside_a_model_of_text(source: Path, tmp_path: Path, transforms: tuple[str, ...]) -> None:
    beginning = write_run(tmp_path / "beginning", model__name="llama", model__layers=1, model__width=64, model__init_std=0.005)
    config = make_config(
        source,
        train__start=str(beginning),
        train__transforms=transforms,
        lora__rank=16,
        lora__also="(head|embed)/.*",
        train__steps=60,
        **{key: schema.SCHEMA[key.replace("__", ".")].default for key in ARCHITECTURE},
    )
    rows, said = run(config, tmp_path / "run")
    assert "drawn at random: head/kernel" in said and "are trained" in said
    assert evals(rows)[-1]["accuracy"] >= 0.9
    assert jaxllm.reward_model(tmp_path / "run")(["say 1"], ["rr"]).shape == (1,)


MESHES = [{"parallel__fsdp": 4, "parallel__data": 2}, {"parallel__tensor": 2, "parallel__fsdp": 2, "train__microbatches": 2}]


@pytest.mark.parametrize("mesh", MESHES, ids=str)
@pytest.mark.usefixtures("compiled_anew")
def test_a_mesh_trains_as_one_device(source: Path, tmp_path: Path, mesh: dict[str, int]) -> None:
    short = {"train__steps": 6, "eval__every_steps": 3, "checkpoint__every_steps": 6, "model__vocab_size": 264}
    both = [run(make_config(source, **short, **fields), tmp_path / str(bool(fields)))[0] for fields in ({}, mesh)]
    for one, other in zip(*both, strict=True):
        for name, value in one.items():
            if name not in ("calibration", "kind"):
                assert other[name] == pytest.approx(value, rel=2e-3, abs=2e-4), (one["step"], name)
