"""`python -m jaxllm.evaluate`: the run's own rows, other text, and what makes a number meaningless."""

import dataclasses
import json
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from random_run import write_run
from rich.console import Console

from jaxllm import adapters, evaluate, runs
from jaxllm.data import examples
from jaxllm.data.prepare import load, prepare
from jaxllm.data.tokenize import fingerprint
from jaxllm.evals import exact

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ("loss", "perplexity", "bits_per_byte", "accuracy", "tokens", "bytes", "documents", "metric")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "tiny")


def held_out(run: Path) -> list[str]:
    """The texts of the validation split, read back from its rows."""
    prepared = load(runs.load(run).config, run / "data")
    stream: list[int] = []
    for row in range(len(prepared.validation)):
        tokens = prepared.validation.rows(np.array([row]))["tokens"][0].tolist()
        stream += tokens[:-1]
    stream.append(tokens[-1])
    documents = "".join(map(chr, stream)).split(chr(prepared.tokenizer.bos_id))[1:]
    return [prepared.tokenizer.decode([ord(part) for part in document]) for document in documents]


def test_a_source_and_the_split_that_it_became_give_the_same_result(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = held_out(run)
    source = tmp_path / "held_out.jsonl"
    source.write_text("\n".join(json.dumps({"text": text}) for text in texts), encoding="utf-8")
    opened = runs.load(run)
    split, again = evaluate.evaluate_split(opened, "validation"), evaluate.evaluate_source(opened, str(source))
    assert {name: split[name] for name in RESULTS} == {name: again[name] for name in RESULTS}
    assert split["bytes"] == sum(len(text.encode()) for text in texts)
    assert split["documents"] == len(texts) > 1
    assert split["metric"].endswith(f"tokenizer byte-259-{fingerprint(opened.tokenizer)[:8]})")
    assert evaluate.evaluate_split(opened, "train")["documents"] == 12 - len(texts)
    # Fewer rows at once, as a run of a large mesh needs it on one device.
    monkeypatch.setattr(evaluate, "MOST_TOKENS", 1)
    alone = evaluate.evaluate_split(opened, "validation")
    assert (alone["loss"], alone["tokens"]) == (pytest.approx(split["loss"], rel=1e-6), split["tokens"])


def test_the_command_prints_and_keeps_the_result(run: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("Other text, unseen so far.\n" * 5)

    def call(*flags: str) -> "subprocess.CompletedProcess[str]":
        command = [sys.executable, "-m", "jaxllm.evaluate", "--run", str(run), *flags]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)

    done = call("--data", str(tmp_path / "text.txt"), "--step=10", "--json")
    assert done.returncode == 0, done.stderr
    row = json.loads(done.stdout)
    assert (row["step"], row["data"], row["documents"]) == (10, str(tmp_path / "text.txt"), 1)
    done = call()
    assert done.returncode == 0, done.stderr
    kept = [json.loads(line) for line in (run / "evaluations.jsonl").read_text().splitlines()]
    assert kept[-2] == row
    for shown in (kept[-1]["metric"], f"{kept[-1]['loss']:.4f}", f"{kept[-1]['bits_per_byte']:.4f}", "(validation rows)"):
        assert shown in done.stdout
    for flags, words in (
        (("--data", "x.txt", "--split=train"), "Leave out one of them"),
        (("--pair_field=b", "--text_field=a"), "error: --text_field, --pair_field without --data"),
    ):
        done = call(*flags)
        assert (done.returncode, words in done.stderr) == (2, True)
    (tmp_path / "rows.jsonl").write_text('{"text": "not this", "body": "Other text, unseen so far."}\n')
    found = [
        json.loads(call("--data", str(tmp_path / "rows.jsonl"), *flags, "--json").stdout) for flags in ([], ["--text_field=body"])
    ]
    assert [row["bytes"] for row in found] == [len("not this"), len("Other text, unseen so far.")]


def test_data_that_is_not_the_runs_own_is_refused(run: Path, tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(run, moved)
    opened = runs.load(moved)
    text = moved / "text.jsonl"
    text.write_text(text.read_text().replace("quick", "quack"))
    opened.config.data.source = str(text)
    prepare(opened.config, moved / "data", log=lambda line: None)
    with pytest.raises(ValueError, match=r"are not those of this run: their hash is [\s\S]*evaluate a text with --data"):
        evaluate.evaluate_split(opened, "validation")
    shutil.rmtree(moved / "data")
    with pytest.raises(ValueError, match=r"moved/data' does not exist.\n  Accepted"):
        evaluate.evaluate_split(opened, "validation")


def test_characters_that_a_char_tokenizer_does_not_know_are_named(tmp_path: Path) -> None:
    opened = runs.load(write_run(tmp_path / "run", tokenizer__kind="char"))
    (tmp_path / "text.txt").write_text("The fox §")
    with pytest.raises(ValueError, match=r"character '§' \(U\+00A7\)"):
        evaluate.evaluate_source(opened, str(tmp_path / "text.txt"))


SEQ2SEQ = {
    "model__name": "transformer",
    "model__kv_heads": 0,
    "model__layers": 1,
    "train__objective": "seq2seq",
    "data__source": "sequences:copy?count=60&max=8",
    "tokenizer__kind": "char",
}


def test_sequences_are_measured_beside_the_baseline(tmp_path: Path) -> None:
    """The baseline is counted again from the pairs; the exact ones among 5 and among all."""
    opened = runs.load(write_run(tmp_path / "copy", **SEQ2SEQ))
    row = evaluate.evaluate_split(opened, "validation", max_seqs=5)
    prepared = load(opened.config, tmp_path / "copy" / "data")
    make_batch = examples.make(opened.config).batch(opened.tokenizer)
    targets = {}
    for name, rows in (("train", prepared.train), ("validation", prepared.validation)):
        places = np.arange(len(rows))
        targets[name] = [pair.target for pair in exact.unpack([make_batch(rows.rows(places), places, 0, 0)])]
    seen = Counter(token for target in targets["train"] for token in target)
    all_seen, best = sum(seen.values()) + opened.tokenizer.vocab_size, seen.most_common(1)[0][0]
    held_out = [token for target in targets["validation"] for token in target]
    assert row["tokens"] == len(held_out)
    assert row["baseline_loss"] == pytest.approx(np.mean([-np.log((seen[token] + 1) / all_seen) for token in held_out]))
    assert row["baseline_accuracy"] == pytest.approx(np.mean([token == best for token in held_out]))
    assert (row["exact_seqs"], row["objective"], row["bits_per_byte"], row["bytes"]) == (5, "seq2seq", None, None)
    assert evaluate.evaluate_split(opened, "validation", max_seqs=0)["exact_seqs"] == len(targets["validation"])
    console = Console(record=True, width=200)
    evaluate.show(row, console)
    shown = console.export_text()
    for part in ("target token perplexity", "exact sequences, of 5", "unigram baseline", f"{row['baseline_loss']:.4f}"):
        assert part in shown


def test_classes_have_their_recall(tmp_path: Path) -> None:
    """Without the training data there is no baseline; an unknown class is named."""
    source = tmp_path / "labelled.jsonl"
    source.write_text("\n".join(json.dumps({"text": f"{i} {'abc'[i % 3]}", "target": "abc"[i % 3]}) for i in range(30)))
    fields = {"model__name": "bert", "model__kv_heads": 0, "model__layers": 1, "model__head": "classify", "model__classes": 3}
    fields |= {"train__objective": "sequence_classification", "data__source": str(source)}
    directory = write_run(tmp_path / "run", **fields)
    opened = runs.load(directory)
    row = evaluate.evaluate_source(opened, str(source))
    assert {name: recall["examples"] for name, recall in row["classes"].items()} == {"a": 10, "b": 10, "c": 10}
    assert sum(recall["found"] for recall in row["classes"].values()) / 30 == pytest.approx(row["accuracy"])
    assert row["baseline_accuracy"] == pytest.approx(1 / 3)
    shutil.rmtree(directory / "data")
    assert "baseline_loss" not in evaluate.evaluate_source(opened, str(source))
    source.write_text(json.dumps({"text": "x", "target": "d"}))
    with pytest.raises(ValueError, match=r"that the training data lacks: d"):
        evaluate.evaluate_source(opened, str(source))


def test_a_model_of_another_tool_needs_a_text(run: Path) -> None:
    opened: Any = dataclasses.replace(runs.load(run), imported=object())
    with pytest.raises(ValueError, match=r"without the data that it was trained on[\s\S]*Add --data FILE"):
        evaluate.evaluate_split(opened, "validation")


def test_an_adapter_of_peft_has_no_data_and_gets_no_file(run: Path, tmp_path: Path) -> None:
    fields = {"model__name": "llama", "train__transforms": ("lora",), "lora__rank": 2}
    adapters.export(str(write_run(tmp_path / "adapted", **fields)), tmp_path / "peft")
    opened = runs.load(tmp_path / "peft", base=write_run(tmp_path / "base", model__name="llama"))
    before = sorted(path.name for path in (tmp_path / "peft").iterdir())
    with pytest.raises(ValueError, match="peft' holds a model without the data that it was trained on.\n  Accepted: a text"):
        evaluate.evaluate_split(opened, "train")
    row = evaluate.evaluate_source(opened, str(run / "text.jsonl"))
    evaluate.append(opened, row)
    assert "baseline_loss" not in row and sorted(path.name for path in (tmp_path / "peft").iterdir()) == before
