"""Rows to calibrate on: of text, as the model was trained to read it, of prepared data, and of what the model writes itself."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict
from tiny_models import tiny

from jaxllm import models
from jaxllm.compression import calibration
from jaxllm.data import tokenize
from jaxllm.data.prepare import prepare
from jaxllm.types import Model, Params, Tokenizer

# Drawn, so that no two rows of 16 tokens are alike.
TEXTS = ["".join(np.random.default_rng(number).choice(list("abcdefgh"), 20 + number)) for number in range(40)]


@dataclasses.dataclass(frozen=True)
class Opened:
    config: ConfigDict
    tokenizer: Tokenizer
    model: Model
    params: Params
    classes: tuple[str, ...] = ()


def opened(family: str, objective: str, **fields: Any) -> Opened:
    """A tiny model for an objective, with the tokenizer of bytes that it needs."""
    config = tiny(family, **fields)
    config.train.objective, config.tokenizer.kind = objective, "byte"
    config.chat.template = "chatml"
    tokenizer = tokenize.make(config, list)
    config.model.vocab_size = tokenizer.vocab_size
    model = models.build(config)
    return Opened(config, tokenizer, model, model.init(jax.random.key(0)))


@pytest.fixture
def source(tmp_path: Path) -> str:
    path = tmp_path / "texts.jsonl"
    # A text without a character is dropped.
    path.write_text("\n".join(json.dumps({"text": text}) for text in ["", *TEXTS]))
    return str(path)


def made(run: Opened, source: Any, rows: int = 6, tokens: int = 16, seed: int = 0) -> dict[str, np.ndarray]:
    batches = calibration.make(run, str(source), rows, tokens, seed).batches
    return {name: np.concatenate([np.asarray(batch[name]) for batch in batches]) for name in batches[0]}


def test_rows_are_those_of_the_text(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each row stands in the stream of documents, none twice, with their borders; the seed chooses which. Batches are of one size."""
    monkeypatch.setattr(calibration, "BATCH_TOKENS", 50)
    run = opened("llama", "causal_lm")
    run.config.data.max_documents = 1  # of its training
    told: list[tuple[int, int]] = []
    found = calibration.make(run, source, 6, 16, 0, lambda *now: told.append(now))
    assert found.what == f"6 rows of 16 tokens of {source}" and told == [(3, 6), (6, 6)]
    assert [batch["tokens"].shape for batch in found.batches] == [(3, 16)] * 2
    joined = made(run, source)
    ids = [[run.tokenizer.bos_id, *run.tokenizer.encode(text), run.tokenizer.eos_id] for text in TEXTS]
    stream = np.array(sum(ids, []))
    starts = [
        int(np.flatnonzero([np.array_equal(stream[at : at + 16], row) for at in range(0, len(stream), 16)])[0])
        for row in joined["tokens"]
    ]
    assert len(set(starts)) == 6
    document = np.repeat(np.arange(len(ids)), [len(each) for each in ids])
    for at, segments in zip(starts, joined["segments"], strict=True):
        np.testing.assert_array_equal(segments, 1 + document[16 * at : 16 * at + 16] - document[16 * at])
    jax.tree.map(np.testing.assert_array_equal, made(run, source), joined)
    assert (made(run, source, seed=1)["tokens"] != joined["tokens"]).any()
    # The end of the text fills no row.
    assert len(stream) % 16 and len(made(run, source, len(stream) // 16)["tokens"]) == len(stream) // 16
    with pytest.raises(ValueError, match=f"has {len(stream) // 16} full rows"):
        made(run, source, len(stream) // 16 + 1)
    # As long as the context at most.
    jax.tree.map(np.testing.assert_array_equal, made(run, source, tokens=500), joined)


def test_of_a_long_text_the_beginning_is_read(tmp_path: Path) -> None:
    """32 characters for each token that is wanted, whatever a document's length."""
    (tmp_path / "long.txt").write_text(" ".join(f"{number:07}" for number in range(10_000)))
    run = opened("llama", "causal_lm")
    found = [run.tokenizer.decode([int(index) for index in row]) for row in made(run, tmp_path / "long.txt", rows=64)["tokens"]]
    numbers = [int(word) for text in found for word in text.split() if len(word) == 7]
    assert 64 * 16 * 32 / 8 * 0.8 < max(numbers) < 64 * 16 * 32 / 8


@pytest.mark.parametrize(
    ("family", "objective", "arrays"),
    [
        ("bert", "masked_lm", {"tokens": 16}),
        ("t5", "span_corruption", {"tokens": 5, "inputs": 16}),
        ("llama", "sft", {"tokens": 16}),
        ("bert", "sequence_classification", {"tokens": 16}),
    ],
)
def test_a_text_becomes_what_the_model_reads(family: str, objective: str, arrays: dict[str, int], source: str) -> None:
    """Masked or with hidden spans, as in training; a model of conversations or classes, whose tokenizer has no mask, reads it as text."""
    head = {"head": "classify", "classes": 2} if "classification" in objective else {}
    run = opened(family, objective, **head)
    found = made(run, source)
    assert {name: found[name].shape for name in arrays} == {name: (6, width) for name, width in arrays.items()}
    if family == "t5":
        assert (found["inputs"] == run.tokenizer.sentinel_ids[0]).sum() == 6
    assert (objective == "masked_lm") == bool(
        (found["tokens"] == run.tokenizer.mask_id).any() and run.tokenizer.mask_id is not None
    )
    beside = {name: array for name, array in found.items() if name not in ("tokens", "targets", "weights")}
    jax.eval_shape(run.model.hidden, run.params, found["tokens"], **beside)


def test_conversations_and_classes_are_read_as_in_training(tmp_path: Path) -> None:
    """Classes that the model does not know are an error; where nobody knows their names, the texts alone are read."""
    rows = [
        {"messages": [{"role": "user", "content": "a?"}, {"role": "assistant", "content": "b"}], "text": "c", "target": "d"}
    ] * 9
    source = tmp_path / "rows.jsonl"
    source.write_text("\n".join(map(json.dumps, rows)))
    run = opened("llama", "sft", context_tokens=64)
    found = made(run, source, 1, 64)
    written = run.tokenizer.decode([int(index) for index in found["tokens"][0]])
    assert written.startswith("user\na?") and "assistant\nb" in written
    run = opened("bert", "sequence_classification", head="classify", classes=1)
    found = made(dataclasses.replace(run, classes=("d",)), source, 4, 8)
    np.testing.assert_array_equal((found["tokens"] == ord("c")).sum(1), 1)
    assert ((made(run, source, 2, 8)["tokens"] == ord("c")).sum(1) > 1).all()
    with pytest.raises(ValueError, match="labels that the training data lacks: d"):
        made(dataclasses.replace(run, classes=("e",)), source, 4, 8)


def test_prepared_rows_are_taken_as_they_lie(source: str, tmp_path: Path) -> None:
    run = opened("llama", "causal_lm")
    run.config.data.source, run.config.data.row_tokens, run.config.data.validation_frac = source, 16, 0.2
    prepared = prepare(run.config, tmp_path / "data", log=lambda line: None)
    every = prepared.train.rows(np.arange(len(prepared.train)))["tokens"][:, :-1].tolist()
    found = made(run, tmp_path / "data")["tokens"].tolist()
    assert len(found) == 6 and all(found.count(row) == every.count(row) == 1 for row in found)
    masked = opened("bert", "masked_lm")
    for each, tokens, said in (
        (run, 8, "16 tokens for causal_lm.*Accepted: rows of 8 tokens for causal_lm"),
        (dataclasses.replace(run, tokenizer=masked.tokenizer), 16, "for causal_lm, made with another model's"),
        (dataclasses.replace(masked, tokenizer=run.tokenizer), 16, "for causal_lm, made with the model's tokenizer.*for masked_lm"),
    ):
        with pytest.raises(ValueError, match=f"(?s){said}.*Change --tokens"):
            made(each, tmp_path / "data", tokens=tokens)


def test_samples_are_drawn_from_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model whose next token has the same distribution after all others: tokens come as often as it says, at temperature 1."""
    monkeypatch.setattr(calibration, "BATCH_TOKENS", 32 * 16)
    run = opened("llama", "causal_lm", norm="layernorm", bias="on", tied_head="off")
    ids, shares = [*run.tokenizer.encode("abcd"), run.tokenizer.eos_id], np.array([0.5, 0.25, 0.15, 0.05, 0.05])
    chances = np.full(run.tokenizer.vocab_size, 1e-9)
    chances[ids] = shares
    one = jnp.zeros(16).at[0].set(1.0)
    run.params["norm"] = {"scale": jnp.zeros(16), "bias": one}
    run.params["head"]["kernel"] = jnp.log(chances / chances.sum())[:, None] * one
    told: list[tuple[int, int]] = []
    assert (
        calibration.make(run, "samples", 96, 500, 3, lambda *now: told.append(now)).what
        == "96 rows of 16 tokens that the model wrote"
    )
    assert told == [(32, 96), (64, 96), (96, 96)]
    found = made(run, "samples", 96, seed=3)["tokens"]
    assert found.shape == (96, 16) and set(found[:, 0]) == {run.tokenizer.bos_id}
    drawn = found[:, 1:]
    for index, chance in zip(ids, shares, strict=True):
        # Five deviations of a binomial share.
        assert abs((drawn == index).mean() - chance) < 5 * (chance * (1 - chance) / drawn.size) ** 0.5
    # Rows of one batch and of several differ, and the seed alone decides.
    assert len(set(map(tuple, found.tolist()))) > 90
    np.testing.assert_array_equal(made(run, "samples", 96, seed=3)["tokens"], found)
    assert len(set(map(tuple, found.tolist())) & set(map(tuple, made(run, "samples", 96, seed=4)["tokens"].tolist()))) < 10


@pytest.mark.parametrize(
    ("family", "objective", "source", "given", "words"),
    [
        (
            "llama",
            "causal_lm",
            "few",
            (900, 16, 0),
            r"few.txt has \d+ full rows of 16 tokens, and --rows is 900.\n  Accepted: --rows up to \d+,",
        ),
        ("llama", "causal_lm", "short", (1, 16, 0), r"short.txt has 0 full rows of 16 tokens[\s\S]*Accepted: shorter rows, more"),
        ("llama", "causal_lm", "empty", (1, 16, 0), r"empty.txt[\s\S]*Accepted: [\s\S]*--calibrate"),
        ("llama", "causal_lm", "nowhere", (1, 16, 0), r"there is no '.*nowhere.txt'[\s\S]*Change --calibrate."),
        ("llama", "causal_lm", "few", (0, 16, 0), r"--rows 0 --tokens 16 --seed 0[\s\S]*Accepted: 1 row or more"),
        ("llama", "causal_lm", "few", (1, 1, 0), r"--tokens 1 [\s\S]*Accepted: 1 row or more of 2 tokens"),
        ("llama", "causal_lm", "few", (1, 16, -1), r"--seed -1 [\s\S]*a seed of 0 to 4294967295"),
        ("llama", "causal_lm", "samples", (1, 16, 2**32), r"--seed 4294967296 [\s\S]*a seed of 0 to"),
        ("t5", "span_corruption", "few", (1, 16, 0), "has 0 sentinels"),
        ("bert", "masked_lm", "samples", (1, 16, 0), r"--calibrate samples: 'bert' continues no text.\n  Accepted: a gpt or llama"),
        ("t5", "span_corruption", "samples", (1, 16, 0), r"--calibrate samples: 't5' continues no text"),
    ],
)
def test_what_cannot_be_calibrated_on(
    tmp_path: Path, family: str, objective: str, source: str, given: tuple[int, int, int], words: str
) -> None:
    """With the tokenizer of a llama, which has no sentinels."""
    for name, text in (("few", "some words " * 20), ("short", "ab"), ("empty", "")):
        (tmp_path / f"{name}.txt").write_text(text)
    run = dataclasses.replace(opened(family, objective), tokenizer=opened("llama", "causal_lm").tokenizer)
    with pytest.raises(ValueError, match=words):
        made(run, source if source == "samples" else tmp_path / f"{source}.txt", *given)
