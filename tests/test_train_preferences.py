"""Training on preferences through the whole command: where it begins, that it learns, goes on to the bit, and its reference."""

import io
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from random_run import write_run
from rich.console import Console

from jaxllm import config as schema
from jaxllm import evaluate, models, runs, start, train
from jaxllm.data import prepare
from jaxllm.engine.checkpoint import Checkpoints
from jaxllm.engine.workdir import open_workdir
from jaxllm.report.training import write_report

STEPS = 6


@pytest.fixture(scope="module")
def beginning(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model, and beside it pairs and labelled answers of unequal lengths."""
    directory = write_run(tmp_path_factory.mktemp("runs") / "beginning", model__name="llama", model__layers_as="scan")
    rng = np.random.default_rng(0)
    asked = [(int(a), int(b)) for a, b in rng.integers(0, 400, (60, 2))]
    pairs = [{"prompt": f"{a}+{b}?", "chosen": f"{a + b}.", "rejected": f"no, {a} times"} for a, b in asked]
    labelled = [
        {"prompt": pair["prompt"], "completion": pair[name], "label": name == "chosen"}
        for pair in pairs
        for name in ("chosen", "rejected")
    ]
    for name, rows in (("pairs", pairs), ("labelled", labelled)):
        (directory / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return directory


def make_config(beginning: Path, **fields: Any) -> Any:
    config = schema.base()
    objective = fields.get("train__objective", "dpo")
    tiny = {
        "train__start": str(beginning),
        "train__objective": objective,
        "train__steps": STEPS,
        "train__batch_seqs": 8,
        "train__log_every_steps": 1,
        "data__source": str(beginning / ("labelled.jsonl" if objective == "kto" else "pairs.jsonl")),
        "data__validation_frac": 0.3,
        "chat__template": "plain",
        "schedule__name": "constant",
        "schedule__warmup_steps": 0,
        "optimizer__learning_rate": 3e-3,
        "optimizer__clip_norm": 0.0,
        "eval__every_steps": 3,
        "checkpoint__every_steps": 3,
        "sample__prompts": ("1+1?",),
        "sample__tokens": 4,
        "model__layers_as": "scan",
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
def finished(beginning: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]], str]:
    workdir = tmp_path_factory.mktemp("finished")
    return workdir, *run(make_config(beginning), workdir)


def test_dpo_begins_where_no_answer_is_preferred_and_learns_to(finished: tuple[Path, list[dict[str, Any]], str]) -> None:
    workdir, rows, said = finished
    first, *_, last = evals(rows)
    assert (first["step"], last["step"]) == (0, STEPS)
    np.testing.assert_allclose(first["loss"], np.log(2), atol=1e-6)
    assert first["accuracy"] == 0 and abs(first["margin"]) < 1e-5
    assert last["loss"] < 0.5 and last["accuracy"] > 0.9 and last["margin"] > 0.5
    np.testing.assert_allclose(last["margin"], last["chosen_reward"] - last["rejected_reward"], atol=1e-5)
    # The rewards are beta times the change of log p.
    for side in ("chosen", "rejected"):
        np.testing.assert_allclose(last[f"{side}_reward"], 0.1 * (last[f"{side}_logp"] - first[f"{side}_logp"]), atol=1e-4)
    trained = next(row for row in rows if row["kind"] == "train")
    np.testing.assert_allclose(trained["loss"], np.log(2), atol=1e-6)
    assert "step 0: validation loss 0.6931 (margin" in said and "accuracy 0.0%)" in said
    assert "scoring" in said and f"generate --chat --run {workdir}" in said and "perplexity" not in said
    assert "1+1? ->" in said
    assert "when all is well" in write_report(workdir).read_text()


def test_a_run_goes_on_to_the_bit_and_finds_its_reference(
    beginning: Path, finished: tuple[Path, list[dict[str, Any]], str], tmp_path: Path
) -> None:
    run(make_config(beginning, train__steps=3), tmp_path)
    rows, said = run(make_config(beginning), tmp_path)
    assert rows == finished[1]
    assert "scoring" not in said


@pytest.mark.parametrize("damage", ["gone", "flipped", "other rows", "half"])
def test_a_reference_that_is_not_as_it_was_written_is_made_again(
    beginning: Path, finished: tuple[Path, list[dict[str, Any]], str], tmp_path: Path, damage: str
) -> None:
    workdir = tmp_path / "run"
    run(make_config(beginning, train__steps=3), workdir)
    (folder,) = (workdir / "data" / "references").iterdir()
    intact = (folder / "train.npy").read_bytes()
    if damage == "gone":
        shutil.rmtree(folder)
    elif damage == "other rows":
        told = json.loads((folder / "train.json").read_text())
        (folder / "train.json").write_text(json.dumps(told | {"rows": "0" * 64}))
    else:
        changed = bytearray(intact)
        changed[-1] ^= 1
        (folder / "train.npy").write_bytes(changed if damage == "flipped" else intact[:-8])
    with pytest.raises(
        ValueError, match=r"of this run cannot be used: .*\n  Accepted: the file as the run wrote it.*\n  Remove it"
    ):
        evaluate.evaluate_split(runs.load(workdir), "train")
    rows, said = run(make_config(beginning), workdir)
    assert "not there as they were: they are made from the first state" in said
    assert rows == finished[1] and (folder / "train.npy").read_bytes() == intact


def test_a_reference_of_another_model_is_not_taken(beginning: Path, tmp_path: Path) -> None:
    moved = tmp_path / "beginning"
    shutil.copytree(beginning, moved)
    run(make_config(moved, train__steps=3), tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "data" / "references")
    # The model of the other checkpoint.
    shutil.rmtree(moved / "checkpoints" / "20")
    with pytest.raises(ValueError, match="the model that this run began with is no longer the one in train.start"):
        run(make_config(moved), tmp_path / "run")


def test_runs_share_a_reference_by_their_model_and_data(beginning: Path, tmp_path: Path) -> None:
    shared = {"data__dir": str(tmp_path / "data"), "train__steps": 1}
    assert "scoring" in run(make_config(beginning, **shared), tmp_path / "one")[1]
    assert "scoring" not in run(make_config(beginning, **shared, preference__loss="ipo"), tmp_path / "other")[1]
    # Adapters begin as nothing, but are other parameters.
    assert "scoring" in run(make_config(beginning, **shared, train__transforms=("lora",)), tmp_path / "adapted")[1]
    assert len(list((tmp_path / "data" / "references").iterdir())) == 2


def test_the_reference_is_what_the_model_says_of_each_target(
    beginning: Path, finished: tuple[Path, list[dict[str, Any]], str]
) -> None:
    """Against log-softmax of the logits of the model as `runs.load` opens it."""
    workdir, before = finished[0], runs.load(beginning)
    (folder,) = (workdir / "data" / "references").iterdir()
    config = schema.load(workdir / "config.json")
    prepared = prepare.load(config, workdir / "data")
    for split, rows in prepared.splits.items():
        numbers = np.arange(len(rows))
        batch = prepared.make_batch(config)(rows.rows(numbers), numbers, 0, 0)
        read = {name: batch[name] for name in ("segments", "positions", "branches")}
        logits = models.build(before.config).apply(before.params, batch["tokens"], **read)
        log_p = np.take_along_axis(np.asarray(jax.nn.log_softmax(logits)), batch["targets"][..., None], -1)[..., 0]
        np.testing.assert_allclose(np.load(folder / f"{split}.npy"), log_p * batch["weights"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("objective", ["orpo", "simpo", "kto"])
def test_other_objectives_learn_too(beginning: Path, tmp_path: Path, objective: str) -> None:
    rows, said = run(make_config(beginning, train__objective=objective, train__start=str(beginning)), tmp_path)
    first, *_, last = evals(rows)
    assert first["step"] == 0 and last["loss"] < first["loss"] and last["margin"] > first["margin"]
    assert ("scoring" in said) == (objective == "kto") == (tmp_path / "data" / "references").exists()
    if objective == "kto":
        np.testing.assert_allclose(first["loss"], 0.5, atol=1e-6)
        assert first["kl"] == pytest.approx(0, abs=1e-5) and "accuracy" not in last
    found = evaluate.evaluate_split(runs.load(tmp_path), "validation")
    for name in last.keys() - {"kind", "step"}:
        # The divergence of kto is that of a batch, of which evaluate has the same rows.
        assert found[name] == pytest.approx(last[name], rel=1e-4, abs=1e-5), name


@pytest.mark.parametrize("transforms", [("lora",), ("int8", "lora")], ids="+".join)
def test_adapters_begin_as_their_reference(beginning: Path, tmp_path: Path, transforms: tuple[str, ...]) -> None:
    rows, _ = run(make_config(beginning, train__transforms=transforms, lora__rank=2, optimizer__learning_rate=1e-2), tmp_path)
    first, *_, last = evals(rows)
    np.testing.assert_allclose(first["loss"], np.log(2), atol=1e-6)
    assert last["loss"] < 0.65 and last["margin"] > 0
    record = Checkpoints(tmp_path / "checkpoints").record(STEPS)
    assert record.frozen is not None


# Not from the random run, whose weights are so large that a rounding error of a parameter moves a gradient by a per cent.
SMALL = {
    "train__start": "",
    "tokenizer__kind": "byte",
    "model__layers": 2,
    "model__width": 32,
    "model__context_tokens": 64,
    "model__vocab_size": 260,
    "sample__tokens": 0,
}
MESHES = [{"parallel__fsdp": 4, "parallel__data": 2}, {"parallel__pipe": 2, "parallel__tensor": 2, "train__microbatches": 2}]


@pytest.mark.parametrize("mesh", MESHES, ids=str)
@pytest.mark.usefixtures("compiled_anew")
def test_a_mesh_trains_as_one_device(beginning: Path, tmp_path: Path, mesh: dict[str, int]) -> None:
    one, many = (run(make_config(beginning, **SMALL, **fields), tmp_path / str(len(fields)))[0] for fields in ({}, mesh))
    for expected, found in zip(one, many, strict=True):
        # Where model and reference are the same, rounding decides which reward is higher.
        for name in expected.keys() - ({"kind"} if abs(expected["margin"]) > 1e-4 else {"kind", "accuracy"}):
            assert found[name] == pytest.approx(expected[name], rel=1e-4, abs=1e-4), (expected["step"], name)
    first, second = (next((tmp_path / str(count) / "data" / "references").iterdir()) for count in (0, len(mesh)))
    assert first.name == second.name
    np.testing.assert_allclose(np.load(first / "train.npy"), np.load(second / "train.npy"), rtol=1e-6, atol=2e-6)
