"""Rows to calibrate on: of text, as the model was trained to read it, and of what it writes itself."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from random_run import write_run

from jaxllm import runs
from jaxllm.compression import calibration

OBJECTIVES: dict[str, dict[str, Any]] = {
    "llama": {"model__name": "llama"},
    "bert": {"model__name": "bert", "train__objective": "masked_lm"},
    "t5": {"model__name": "t5", "train__objective": "span_corruption"},
}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "other.jsonl"
    path.write_text(
        "\n".join(json.dumps({"text": f"{index} is a number, and so is {index * 7}. " * 4}) for index in range(40)), "utf-8"
    )
    return path


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, runs.Run]:
    folder = tmp_path_factory.mktemp("runs")
    return {name: runs.load(write_run(folder / name, **fields)) for name, fields in OBJECTIVES.items()}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_rows_of_text(found: dict[str, runs.Run], text: Path, name: str) -> None:
    """Chosen by the seed, in batches of one shape, and they are what the model reads: it decodes to the text."""
    run = found[name]
    made, again, other = (calibration.make(run, str(text), 12, 32, seed) for seed in (0, 0, 1))
    assert made.what == f"12 rows of 32 tokens of {text}"
    for one, two in zip(made.batches, again.batches, strict=True):
        assert one.keys() == two.keys() and all(np.array_equal(one[key], two[key]) for key in one)
    assert not all(np.array_equal(one["tokens"], two["tokens"]) for one, two in zip(made.batches, other.batches, strict=True))
    assert len({batch["tokens"].shape for batch in made.batches}) == 1 and sum(len(batch["tokens"]) for batch in made.batches) == 12
    key = "inputs" if name == "t5" else "tokens"
    assert "is a number" in "".join(run.tokenizer.decode([int(id) for id in row]) for row in np.asarray(made.batches[0][key]))


def test_batches_are_no_larger_than_they_may_be(found: dict[str, runs.Run], text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "BATCH_TOKENS", 100)
    sizes = [batch["tokens"].shape for batch in calibration.make(found["llama"], str(text), 8, 32, 0).batches]
    assert sizes == [(2, 32)] * 4


def test_rows_that_the_model_writes(found: dict[str, runs.Run]) -> None:
    """Full, begun by the token that texts begin with, and different from each other; of the model's own distribution."""
    run = found["llama"]
    made, again = (calibration.make(run, "samples", 6, 500, 3) for _ in range(2))
    ids = np.concatenate([np.asarray(batch["tokens"]) for batch in made.batches])
    assert ids.shape == (6, run.config.model.context_tokens) and set(ids[:, 0]) == {run.tokenizer.bos_id}
    assert made.what == "6 rows of 64 tokens that the model wrote" and len({tuple(row) for row in ids}) == 6
    assert all(np.array_equal(one["tokens"], two["tokens"]) for one, two in zip(made.batches, again.batches, strict=True))


@pytest.mark.parametrize(
    ("name", "source", "words"),
    [
        ("llama", "few", r"has \d rows of 32 tokens, and --rows is 900.\n  Accepted: up to \d rows"),
        ("llama", "nowhere.txt", r"there is no 'nowhere.txt'[\s\S]*Change --calibrate."),
        ("bert", "samples", r"--calibrate samples: 'bert' continues no text.\n  Accepted: a gpt or llama"),
        ("t5", "samples", r"--calibrate samples: 't5' continues no text"),
    ],
)
def test_what_cannot_be_used_is_named(found: dict[str, runs.Run], tmp_path: Path, name: str, source: str, words: str) -> None:
    (tmp_path / "few.txt").write_text("some words " * 20)
    with pytest.raises(ValueError, match=words):
        calibration.make(found[name], str(tmp_path / "few.txt") if source == "few" else source, 900, 32, 0)
