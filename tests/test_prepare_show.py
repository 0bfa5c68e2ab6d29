"""`prepare --show`: what a model sees and what it is to predict, readable for every objective."""

import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ml_collections import ConfigDict
from rich.console import Console

from jaxllm import config as schema
from jaxllm.data import mixture, order
from jaxllm.data.examples.contract import Piece
from jaxllm.data.prepare import prepare
from jaxllm.prepare import remarks, show_rows, spelled, table

MODELS = {
    "causal_lm": "llama",
    "prefix_lm": "gpt",
    "masked_lm": "bert",
    "span_corruption": "t5",
    "seq2seq": "t5",
    "sequence_classification": "bert",
    "sft": "llama",
    "token_classification": "gpt",
}
FIELDS = {"seq2seq": "answer", "sft": "answer", "sequence_classification": "label", "token_classification": "tags"}
# Shown of a text of 5 documents, "say NUMBER words": each with its numbers put in.
SEEN = {
    "causal_lm": ["document 1, ", "say 2 words</s>", " tokens, 13 trained", "45 of 48 tokens trained (93.8%)"],
    "prefix_lm": ["prefix of ", "tokens to predict", "say"],
    "masked_lm": ["<mask>", "tokens to predict"],
    "span_corruption": ["<extra_id_0>", "example 1, 48 inputs", "tokens to predict"],
    "seq2seq": ["say 2 words", "answer 2", "example 1, 12 inputs", "example 1, 9 tokens to predict"],
    "sequence_classification": ["<s>say 2 words</s>\nno 2</s>", "class to predict", "even"],
    "sft": ["document 1, 22 tokens, 9 trained", "answer 2"],
    "token_classification": ["say 2 words", "say O, 2 N, words O", "3 classes to predict"],
}


@pytest.mark.parametrize("objective", SEEN)
def test_rows_are_shown(tmp_path: Path, objective: str) -> None:
    rows: list[dict[str, Any]] = [
        {
            "text": f"say {number} words",
            "answer": f"answer {number}",
            "label": ("even", "odd")[number % 2],
            "no": f"no {number}",
            "tags": "O N O",
        }
        for number in range(30)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = schema.base()
    config.train.objective, config.model.name, config.model.context_tokens = objective, MODELS[objective], 48
    config.tokenizer.kind, config.chat.template = "byte", "plain"
    config.data.update({"source": str(tmp_path / "rows.jsonl"), "validation_frac": 0.3, "target_field": FIELDS.get(objective, "")})
    config.data.pair_field = "no" if objective == "sequence_classification" else ""
    prepared = prepare(config, tmp_path / "data", log=lambda line: None)
    out = io.StringIO()
    console = Console(file=out, width=300, highlight=False)
    show_rows(console, config, prepared, 2 * len(prepared.train))
    for words in SEEN[objective]:
        assert words in out.getvalue(), out.getvalue()
    console.print(table(prepared))
    console.print(remarks(prepared))
    shown = out.getvalue()
    assert "positions filled" in shown
    assert (re.search(r"^ *trained tokens  ", shown, re.MULTILINE) is not None) == (objective == "sft")
    assert "cut to a row" not in shown and not re.search(r"^ *dropped  ", shown, re.MULTILINE)
    assert ("bytes a token" in shown) == (objective in ("causal_lm", "prefix_lm"))
    assert ("may be predicted" in shown) == (objective == "masked_lm")
    assert ("2 classes: even, odd" in shown) == (objective == "sequence_classification")


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, "user: \u27e6h\u00e9<eos>\u27e7 next"),
        ({"force_terminal": True, "color_system": "standard"}, "\x1b[2muser: \x1b[0m\x1b[32mh\u00e9<eos>\x1b[0m next"),
        ({"force_terminal": True, "color_system": "standard", "no_color": True}, "user: \u27e6h\u00e9<eos>\u27e7 next"),
    ],
    ids=["a pipe", "a terminal", "NO_COLOR"],
)
def test_what_is_trained_is_seen_anywhere(options: dict[str, Any], expected: str) -> None:
    console = Console(file=io.StringIO(), width=80, highlight=False, _environ={}, **options)
    with console.capture() as out:
        console.print(spelled([Piece("user: ", False), Piece("h\u00e9<eos>", True), Piece(" next")], console))
    assert out.get() == expected + "\n"


def conversations(folder: Path) -> ConfigDict:
    """Of exchanges, two of which are cut at the end of a row and three left out."""
    answers = [f"answer {number}" for number in range(40)] + ["a longer answer, " * 4] * 2 + ["</s>"] * 3
    rows = [json.dumps({"text": f"say {number} words", "target": answer}) for number, answer in enumerate(answers)]
    (folder / "rows.jsonl").write_text("\n".join(rows))
    config = schema.base()
    config.train.objective, config.model.context_tokens = "sft", 48
    config.tokenizer.kind, config.chat.template = "byte", "plain"
    config.data.update({"source": str(folder / "rows.jsonl"), "validation_frac": 0.3})
    return config


def printed(print_on: Callable[[Console], None]) -> str:
    console = Console(file=(out := io.StringIO()), width=300, highlight=False)
    print_on(console)
    return out.getvalue()


def test_the_first_rows_are_those_of_the_first_batch(tmp_path: Path) -> None:
    config = conversations(tmp_path)
    prepared = prepare(config, tmp_path / "data", log=lambda line: None)
    chosen = order.batch_rows(len(prepared.train), config.train.batch_seqs, config.seed, 0)[:3]
    batch = prepared.train.rows(chosen)
    shown = printed(lambda console: show_rows(console, config, prepared, 3))
    asked = re.findall(r"say \d+ words", shown)
    assert asked == re.findall(r"say \d+ words", prepared.tokenizer.decode(batch["tokens"].ravel().tolist()))
    trained, real = int(batch["weights"].sum()), int((batch["segments"] > 0).sum())
    assert 0 < trained < real < batch["segments"].size
    assert f"rows shown: {trained:,} of {real:,} tokens trained ({trained / real:.1%})" in shown


@pytest.mark.parametrize("count", [6, 11])
def test_replayed_rows_stand_where_training_has_them(tmp_path: Path, count: int) -> None:
    """Text among conversations, each shown as what it is; also in the rows of the next batch."""
    config = conversations(tmp_path)
    (tmp_path / "general.txt").write_text("".join(f"On day {n} the wind came from the north.\n" for n in range(60)))
    config.data.update({"replay_source": str(tmp_path / "general.txt"), "replay_frac": 0.5})
    config.train.batch_seqs = 8
    prepared = prepare(config, tmp_path / "data", log=lambda line: None)
    own = len(prepared.train)
    steps = [mixture.batch_rows(own, mixture.Replay(prepared.replay, print, 4, 1), 8, config.seed, step) for step in range(2)]
    expected = np.concatenate(steps)[:count]
    assert len({*(expected < own)}) == 2
    _, *shown = re.split(
        r"\nrow ", "\n" + printed(lambda console: show_rows(console, config, prepared, count)).split("and others\n")[1]
    )
    for row, text in zip(expected, shown, strict=True):
        if row < own:
            assert text.startswith(f"{row}: ") and "say " in text and "the wind" not in text
        else:
            assert text.startswith(f"{row - own} of data.replay_source: 48 of 48 tokens trained")
            tokens = prepared.replay.rows(np.array([row - own]))["tokens"][0, :-1].tolist()
            assert prepared.tokenizer.decode(tokens) in text and "\u27e6" not in text


def test_the_table_counts_what_became_of_conversations(tmp_path: Path) -> None:
    config = conversations(tmp_path)
    prepared = prepare(config, tmp_path / "data", log=lambda line: None)
    lines = printed(lambda console: console.print(table(prepared))).splitlines()
    found = {cells[0]: cells[1:] for line in lines if len(cells := re.split(r" {2,}", line.strip())) == 3}
    for place, split in enumerate(prepared.splits.values()):
        rows = split.rows(np.arange(len(split)))
        trained, real, documents = int(rows["weights"].sum()), int((rows["segments"] > 0).sum()), int(rows["segments"].max(1).sum())
        # The last token of a conversation is a target alone.
        expected = {
            "documents": f"{documents:,}",
            "tokens": f"{real + documents:,}",
            "rows of 48 tokens": f"{len(split):,}",
            "positions filled": f"{real / rows['segments'].size:.2%}",
            "weighted predictions": f"{trained / rows['segments'].size:.2%}",
            "trained tokens": f"{trained / (real + documents):.2%}",
        }
        assert {name: found[name][place] for name in expected} == expected
    assert [sum(map(int, found[name])) for name in ("documents", "cut to a row", "dropped")] == [42, 2, 3]
    assert "text" not in found and "bytes a token" not in found
    for name, split in prepared.splits.items():
        counts = ", ".join(f"{number} by {reason}" for reason, number in split.dropped.items())
        assert (f"{name}: dropped {counts}" in remarks(prepared)) == bool(counts)
