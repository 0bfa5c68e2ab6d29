"""`python -m jaxllm.evaluate`: the run's own rows, other text, and what makes a number meaningless."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from random_run import write_run

from jaxllm import evaluate, runs
from jaxllm.data.prepare import load, prepare
from jaxllm.data.tokenize import fingerprint

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
        batch = prepared.validation.rows(np.array([row]))
        stream += batch["tokens"][0].tolist()
    stream.append(int(batch["targets"][0, -1]))
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
    done = call("--data", "x.txt", "--split=train")
    assert (done.returncode, "Leave out one of them" in done.stderr) == (2, True)


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
