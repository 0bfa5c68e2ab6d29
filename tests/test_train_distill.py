"""Distillation through the whole command: from the teacher's files to a student that resumes to the bit, and what is refused."""

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

from jaxllm import command, evaluate, runs, train
from jaxllm import config as schema
from jaxllm.data import prepare
from jaxllm.engine.workdir import open_workdir
from jaxllm.report.training import write_report

STEPS, TOP = 6, 7


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model, and beside it conversations."""
    directory = write_run(tmp_path_factory.mktemp("runs") / "teacher", model__width=64, model__kv_heads=4, model__layers_as="scan")
    rows = [{"prompt": f"{a} + {a}?", "completion": f"{2 * a}."} for a in range(40)]
    (directory / "talks.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return directory


def make_config(teacher: Path, **fields: Any) -> Any:
    config = schema.base()
    tiny = {
        "model__layers": 1,
        "model__width": 16,
        "model__heads": 2,
        "model__context_tokens": 64,
        "model__layers_as": "scan",
        "train__objective": "distill",
        "train__steps": STEPS,
        "train__batch_seqs": 8,
        "train__log_every_steps": 1,
        "distill__teacher": str(teacher),
        "distill__top_k": TOP,
        "data__source": str(teacher / "text.jsonl"),
        "data__row_tokens": 32,
        "data__validation_frac": 0.4,
        "schedule__name": "constant",
        "schedule__warmup_steps": 0,
        "optimizer__learning_rate": 1e-2,
        "eval__every_steps": 3,
        "checkpoint__every_steps": 3,
        "sample__tokens": 0,
        "parallel__data": 1,
    }
    for key, value in (tiny | fields).items():
        section, _, name = key.partition("__")
        config[section][name] = value
    return config


def started_from(beginning: Path, teacher: Path, **fields: Any) -> Any:
    """A student that begins with a model, which brings its architecture."""
    config = make_config(teacher, train__start=str(beginning), **fields)
    own = schema.base().model
    for name in ("layers", "width", "heads", "context_tokens"):
        config.model[name] = own[name]
    return config


def run(config: Any, workdir: Path) -> tuple[list[dict[str, Any]], str]:
    """(rows of metrics.jsonl without what depends on the clock, what was printed) of a run in this process."""
    config, output = command.resolved(config, workdir, ()), io.StringIO()
    with open_workdir(workdir) as opened:
        assert train.run(config, opened, Console(file=output, width=200)) == 0
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in ("tokens_per_sec", "secs")} for row in rows], output.getvalue()


def evals(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [row for row in rows if row["kind"] == "eval"]


def kept(workdir: Path, split: str) -> np.ndarray:
    (folder,) = (workdir / "data" / "references").iterdir()
    return np.load(folder / f"{split}.npy")


@pytest.fixture(scope="module")
def finished(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]], str]:
    workdir = tmp_path_factory.mktemp("finished")
    return workdir, *run(make_config(teacher), workdir)


def test_a_student_learns_from_its_teacher(teacher: Path, finished: tuple[Path, list[dict[str, Any]], str]) -> None:
    workdir, rows, said = finished
    first, *_, last = evals(rows)
    assert (first["step"], last["step"]) == (0, STEPS)
    assert 0 < last["kl"] < first["kl"] - 0.1 and 0 < last["covered"] < 1
    assert last["perplexity"] == pytest.approx(np.exp(last["loss"])) and last["bits_per_byte"] > 0 and "baseline_loss" in last
    trained = [row for row in rows if row["kind"] == "train"]
    assert trained[-1]["kl"] < trained[0]["kl"] and "accuracy" in trained[0]
    assert f"scoring 10 train rows with the teacher '{teacher}'" in said.replace("\n", " ") or "train rows with the teacher" in said
    assert "KL " in said and f"generate --run {workdir}" in said
    # Of the teacher, whose tokenizer no field of the config names.
    stored = schema.load(workdir / "config.json")
    assert (stored.tokenizer.kind, stored.tokenizer.path) == ("file", str(teacher / "tokenizer"))
    write_report(workdir)


def test_what_is_kept_is_what_the_teacher_says(teacher: Path, finished: tuple[Path, list[dict[str, Any]], str]) -> None:
    """Against log-softmax of the logits of the model as `runs.load` opens it."""
    opened, config = runs.load(teacher), schema.load(finished[0] / "config.json")
    prepared = prepare.load(config, finished[0] / "data")
    for split, rows in prepared.splits.items():
        numbers, found = np.arange(len(rows)), kept(finished[0], split)
        batch = prepared.make_batch(config)(rows.rows(numbers), numbers, 0, 0)
        read = {name: batch[name] for name in ("segments", "positions")}
        log_p = np.asarray(jax.nn.log_softmax(opened.model.apply(opened.params, batch["tokens"], **read)), np.float64)
        counted = batch["weights"] > 0
        ids, told = (found[name][counted] for name in ("teacher_ids", "teacher"))
        assert ids.dtype == np.uint16 and found["teacher"].shape == (len(rows), 32, TOP + 1)
        np.testing.assert_array_equal(ids, np.argsort(-log_p[counted], axis=-1)[:, :TOP])
        rest = np.exp(log_p[counted])
        np.put_along_axis(rest, ids.astype(int), 0, -1)
        expected = np.concatenate(
            [np.take_along_axis(log_p[counted], ids.astype(int), -1), np.log(rest.sum(-1, keepdims=True))], -1
        )
        np.testing.assert_allclose(told, expected, rtol=0, atol=2e-5)


def test_a_run_goes_on_to_the_bit_without_its_teacher(
    teacher: Path, finished: tuple[Path, list[dict[str, Any]], str], tmp_path: Path
) -> None:
    moved = tmp_path / "teacher"
    shutil.copytree(teacher, moved)
    fields = {"data__source": str(teacher / "text.jsonl"), "tokenizer__kind": "file", "tokenizer__path": str(teacher / "tokenizer")}
    run(make_config(moved, train__steps=3, **fields), tmp_path / "run")
    shutil.rmtree(moved)
    rows, said = run(make_config(moved, **fields), tmp_path / "run")
    assert rows == finished[1] and "scoring" not in said


def test_what_a_teacher_says_is_made_again(teacher: Path, finished: tuple[Path, list[dict[str, Any]], str], tmp_path: Path) -> None:
    run(make_config(teacher, train__steps=3), tmp_path)
    before = kept(tmp_path, "train")
    shutil.rmtree(tmp_path / "data" / "references")
    assert "kl" not in evaluate.evaluate_split(runs.load(tmp_path), "validation")
    rows, said = run(make_config(teacher), tmp_path)
    assert "they are made by the teacher" in said and rows == finished[1]
    assert kept(tmp_path, "train").tobytes() == before.tobytes()


def test_another_teacher_is_not_taken_on_the_way(teacher: Path, tmp_path: Path) -> None:
    moved = tmp_path / "teacher"
    shutil.copytree(teacher, moved)
    run(make_config(moved, train__steps=3), tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "data" / "references")
    shutil.rmtree(moved / "checkpoints" / "20")  # the model of the other checkpoint
    with pytest.raises(ValueError, match="the model that this run began with is no longer the one in distill.teacher"):
        run(make_config(moved), tmp_path / "run")


def test_evaluate_measures_what_the_run_did(finished: tuple[Path, list[dict[str, Any]], str]) -> None:
    last = evals(finished[1])[-1]
    found = evaluate.evaluate_split(runs.load(finished[0]), "validation")
    for name in ("loss", "perplexity", "accuracy", "kl", "covered", "bits_per_byte"):
        assert found[name] == pytest.approx(last[name], rel=1e-5, abs=1e-6), name
    assert found["metric"].startswith("token perplexity")
    assert any("KL" in name for name, *_ in evaluate._lines(found))


TRANSFORMS = [((), "reverse"), (("lora",), "forward"), (("int8", "lora"), "forward"), (("nf4", "dora"), "reverse")]


@pytest.mark.parametrize(("transforms", "kl"), TRANSFORMS, ids=str)
def test_a_student_that_is_its_teacher_has_nothing_to_learn(
    teacher: Path, tmp_path: Path, transforms: tuple[str, ...], kl: str
) -> None:
    fields = {"distill__kl": kl, "train__transforms": transforms, "lora__rank": 4, "optimizer__learning_rate": 5e-4}
    first, *_, last = evals(run(started_from(teacher, teacher, **fields), tmp_path)[0])
    if "nf4" in transforms or "int8" in transforms:  # what quantization does to a model, which adapters take back
        assert 0 < last["kl"] < first["kl"]
    else:
        assert abs(first["kl"]) < 1e-6


def test_a_quantized_teacher_keeps_its_codes(teacher: Path, tmp_path: Path) -> None:
    codes = write_run(tmp_path / "codes", train__transforms=("int8",), model__layers_as="scan", train__trainable="norm/.*")
    first, *_ = evals(run(started_from(codes, codes, train__transforms=("lora",), train__steps=1), tmp_path / "run")[0])
    assert abs(first["kl"]) < 1e-6


def test_conversations_are_learnt_on_as_sft_has_them(teacher: Path, tmp_path: Path) -> None:
    talks = {"data__source": str(teacher / "talks.jsonl"), "distill__rows": "sft", "chat__template": "plain"}
    rows, said = run(make_config(teacher, **talks), tmp_path)
    first, *_, last = evals(rows)
    assert last["kl"] < first["kl"] and last["bits_per_byte"] is None
    assert f"generate --chat --run {tmp_path}" in said and "generate --chat" in write_report(tmp_path).read_text()
    assert evaluate.evaluate_split(runs.load(tmp_path), "validation")["metric"].startswith("trained token perplexity")


def test_runs_share_what_a_teacher_says(teacher: Path, tmp_path: Path) -> None:
    shared = {"data__dir": str(tmp_path / "data"), "train__steps": 1}
    assert "scoring" in run(make_config(teacher, **shared), tmp_path / "one")[1]
    # Neither the student nor the loss decides it, nor is the data another one than that of training without a teacher.
    _, said = run(
        make_config(teacher, **shared, model__width=32, distill__kl="reverse", distill__hard_frac=0.5), tmp_path / "other"
    )
    assert "scoring" not in said
    plain = make_config(teacher, **shared, train__objective="causal_lm", distill__teacher="")
    plain.tokenizer.update({"kind": "file", "path": str(teacher / "tokenizer")})
    assert "preparing" not in run(plain, tmp_path / "plain")[1]
    assert "scoring" in run(make_config(teacher, **shared, distill__temperature=2.0), tmp_path / "warm")[1]


MESHES = [{"parallel__fsdp": 4, "parallel__data": 2}, {"parallel__seq": 2, "parallel__fsdp": 2}]


@pytest.mark.parametrize("mesh", MESHES, ids=str)
@pytest.mark.usefixtures("compiled_anew")
def test_a_mesh_trains_as_one_device(
    teacher: Path, finished: tuple[Path, list[dict[str, Any]], str], tmp_path: Path, mesh: dict[str, Any]
) -> None:
    rows, _ = run(make_config(teacher, **mesh), tmp_path)
    for one, other in zip(rows, finished[1], strict=True):
        for name, value in other.items():
            assert value == one[name] if isinstance(value, str) else one[name] == pytest.approx(value, rel=2e-3, abs=2e-4), (
                other["step"],
                name,
            )
    # Of a model whose weights were made large; tests/objectives/test_distill.py has tight tolerances.
    np.testing.assert_allclose(kept(tmp_path, "train")["teacher"], kept(finished[0], "train")["teacher"], rtol=0, atol=2e-2)


REFUSED = {
    r"has another tokenizer than the student.*it has 2\d\d tokens.\n  Accepted: a teacher whose first": {
        "tokenizer__kind": "file",
        "tokenizer__path": "{teacher}/tokenizer",
        "tokenizer__add_tokens": ("<|note|>",),
    },
    r"distill.top_k = 1000 of a vocabulary of \d+ tokens.\n  Accepted: up to \d+": {"distill__top_k": 1000},
    r"reads 64 tokens, and rows have 128.\n  Accepted: up to 64": {"model__context_tokens": 128, "data__row_tokens": 128},
    r"tokenizer.kind = 'char' with distill.teacher = .*, whose embeddings": {"tokenizer__kind": "char"},
    r"distill.teacher = '' with train.objective = 'distill'": {"distill__teacher": ""},
    r"distill.teacher = '.*' with train.objective = 'causal_lm'": {"train__objective": "causal_lm"},
    r"train.z_loss = 0.1 with train.objective = 'distill'": {"train__z_loss": 0.1},
    r"data.replay_source = '.*' with train.objective = 'distill'": {"data__replay_source": "python_docs"},
}


@pytest.mark.parametrize("words", REFUSED)
def test_what_cannot_be_taught_is_refused(teacher: Path, tmp_path: Path, words: str) -> None:
    fields = {name: value.format(teacher=teacher) if isinstance(value, str) else value for name, value in REFUSED[words].items()}
    with pytest.raises(ValueError, match=words) as caught:
        run(make_config(teacher, **fields), tmp_path)
    assert len(str(caught.value).splitlines()) == 3


def test_the_ids_must_mean_the_same_to_both(teacher: Path, tmp_path: Path) -> None:
    other = write_run(tmp_path / "other", tokenizer__kind="char")
    fields = {"tokenizer__kind": "file", "tokenizer__path": str(teacher / "tokenizer"), "data__source": str(teacher / "text.jsonl")}
    with pytest.raises(
        ValueError, match=r"has another tokenizer.*\n  Accepted: a teacher whose first .* tokens are .*\n  Set tokenizer"
    ):
        run(make_config(other, **fields), tmp_path / "run")
