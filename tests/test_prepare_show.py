"""`prepare --show`: what a model sees and what it is to predict, readable for every objective."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from jaxllm import config as schema
from jaxllm.data.prepare import prepare
from jaxllm.prepare import remarks, show_rows, table

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
    "causal_lm": ["document 1, ", "say 2 words"],
    "prefix_lm": ["prefix of ", "tokens to predict", "say"],
    "masked_lm": ["[MASK]", "tokens to predict"],
    "span_corruption": ["<extra_id_0>", "example 1, 48 inputs", "tokens to predict"],
    "seq2seq": ["say 2 words", "answer 2", "example 1, 12 inputs", "example 1, 9 tokens to predict"],
    "sequence_classification": ["say 2 words\nno 2", "class to predict", "even"],
    "sft": ["conversation 1, 22 tokens, 9 of them trained", "say 4 words\nanswer 4"],
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
    assert ("bytes a token" in shown) == (objective in ("causal_lm", "prefix_lm"))
    assert ("may be predicted" in shown) == (objective == "masked_lm")
    assert ("2 classes: even, odd" in shown) == (objective == "sequence_classification")
