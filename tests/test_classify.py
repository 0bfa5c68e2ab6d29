"""`python -m jaxllm.classify` from end to end: the classes of the API with their names on standard output, and mistakes explained."""

import json
import subprocess
import sys
from pathlib import Path

from random_run import write_run

import jaxllm
from jaxllm import runs

ROOT = Path(__file__).resolve().parent.parent
NAMES = ["even", "odd", "[none]"]
SIZES = {"model__name": "bert", "model__kv_heads": 0, "model__layers": 1, "model__classes": 3}


def named_run(directory: Path, head: str) -> Path:
    """The data of the run are text alone; its names of classes are added."""
    run = write_run(directory, model__head=head, **SIZES)
    record = run / "data.json"
    record.write_text(json.dumps(json.loads(record.read_text()) | {"labels": NAMES}))
    return run


def classify(*flags: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([sys.executable, "-m", "jaxllm.classify", *flags], cwd=ROOT, capture_output=True, text=True, check=False)


def test_classes_are_shown_with_their_names(tmp_path: Path) -> None:
    run = named_run(tmp_path / "texts", "classify")
    given = ("--text", "one [bold] two", "--text", "three", "--pair", "four", "--pair", "five")
    done = classify("--run", str(run), *given, "--top_k=2", "--step=10")
    assert done.returncode == 0, done.stderr
    model, names = jaxllm.load(run, 10), runs.load(run).classes
    pairs = jaxllm.classify(*model, ["one [bold] two", "three"], ["four", "five"], classes=names, top_k=2)
    expected = []
    for texts, labels in zip((["one [bold] two", "four"], ["three", "five"]), pairs, strict=True):
        expected += texts + [f"{label.name} {label.probability:.2%}" for label in labels]
    assert [" ".join(line.split()) for line in done.stdout.splitlines()] == expected
    # Without names a class is its number; a text and its pair alone are those of the lists.
    alone = jaxllm.classify(*model, "three", "five")
    assert [label.name for label in alone] == [str(label.id) for label in alone] and len(alone) == 3
    assert [label.id for label in alone[:2]] == [label.id for label in pairs[1]]


def test_each_word_is_shown_with_its_class(tmp_path: Path) -> None:
    run = named_run(tmp_path / "words", "tag")
    done = classify("--run", str(run), "--text", "[one] two " + "x" * 60, "--text", "three")
    assert done.returncode == 0, done.stderr
    # The last word does not fit into the context of 64 tokens.
    words = [word for found in jaxllm.classify(*jaxllm.load(run), ["[one] two", "three"], classes=NAMES) for word in found]
    rows = [f"{word.text} {word.labels[0].name} {word.labels[0].probability:.2%}" for word in words]
    assert [" ".join(line.split()) for line in done.stdout.splitlines()] == [*rows[:2], "x" * 60 + " -", rows[2]]
    assert "does not fit into 64 tokens" in done.stderr


def test_a_text_is_needed_and_the_function_stays_one() -> None:
    import jaxllm.classify  # noqa: PLC0415

    assert sys.modules["jaxllm.classify"] is jaxllm.classify
    assert jaxllm.classify.__call__ is __import__("jaxllm.api").api.classify
    done = classify("--run", "anything")
    assert (done.returncode, "no text is given.\n  Accepted: --text" in done.stderr) == (2, True)
