"""Sums: right, no pair twice, the same each time, and what cannot be is named."""

from typing import Any

import pytest

from jaxllm import config as schema
from jaxllm.data import documents
from jaxllm.data.prepare import prepare


def read(source: str, objective: str = "sft") -> list[documents.Document]:
    config = schema.base()
    config.train.objective = objective
    return list(documents.open(source, config))


def _exchange(document: documents.Document) -> tuple[Any, Any]:
    """Question and answer, which is beside the question where the model is to answer itself."""
    if document.fields is None:
        question, answer = document.messages
        return question, answer
    (question,) = document.messages
    return question, {"role": "assistant", "content": document.fields["answer"]}


@pytest.mark.parametrize("objective", ["sft", "grpo"])
def test_sums_are_right_and_new(objective: str) -> None:
    found = read("sums:count=9000&digits=2", objective)
    assert found == read("sums:count=9000&digits=2", objective)
    pairs = set()
    for document in found:
        question, answer = _exchange(document)
        left, right = question["content"].removesuffix("=").split("+")
        assert question["role"] == "user" and answer == {"role": "assistant", "content": str(int(left) + int(right))}
        pairs.add((int(left), int(right)))
    assert len(pairs) == len(found) == 9000
    assert max(max(pair) for pair in pairs) == 99 and min(min(pair) for pair in pairs) == 0
    assert found[:50] == read("sums:count=50", objective), "more of them leave the first ones as they are"
    assert found[:50] != read("sums:count=50&seed=1", objective)
    assert found[50:90] == read("sums:first=50&count=40", objective)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("sums:count=101&digits=1", "first = 0 and count = 101, of 100 pairs"),
        ("sums:digits=10", "digits = 10 is not from 1 to 9"),
        ("sums:terms=3", "unknown option 'terms'"),
        ("sums:count=-1", "count = '-1' is no whole number"),
    ],
)
def test_what_is_no_sum(source: str, words: str) -> None:
    with pytest.raises(ValueError, match=f"(?s){words}.*Accepted: sums, or sums:count"):
        read(source)


def test_other_objectives_are_told() -> None:
    with pytest.raises(ValueError, match="'sums' holds conversations"):
        read("sums", "causal_lm")


def test_prompts_are_stored_with_their_answers(tmp_path) -> None:
    """From the source to the arrays on disk and back; a prompt too long for the row is left out by name."""
    from jaxllm.data.examples import prompts

    config = schema.base()
    config.train.objective, config.tokenizer.kind, config.chat.template = "grpo", "byte", "plain"
    config.data.source, config.data.row_tokens, config.data.validation_frac = "sums:count=90&digits=2", 12, 0.4
    config.rl.update({"max_new_tokens": 6, "field_bytes": 40})
    prepared = prepare(config, tmp_path / "data", log=lambda line: None)
    seen = []
    for split in prepared.splits.values():
        rows = split.rows(range(len(split)))
        for ids, beside in zip(prompts.prompts(rows), prompts.fields(rows), strict=True):
            answer = beside["answer"]
            text = prepared.tokenizer.decode(ids.tolist())
            left, right = text.removesuffix("=\n").split("+")
            assert int(left) + int(right) == int(answer)
            seen.append((text, answer))
    # <bos>, at most 5 characters and the line end: a row of 12 has room for prompts of 7 before 6 new tokens, of which one is no input.
    expected = {(f"{q['content']}\n", a["content"]) for q, a in (document.messages for document in read(config.data.source))}
    kept = {(text, answer) for text, answer in expected if len(text) + 1 <= 7}
    assert set(seen) == kept and len(seen) == len(kept) < len(expected)
    dropped = [reason for split in prepared.splits.values() for reason, number in split.dropped.items() if number]
    assert set(dropped) == {prompts.TOO_LONG}


def test_a_prompt_with_too_much_beside_it_is_left_out(tmp_path) -> None:
    from jaxllm.data.examples import prompts

    config = schema.base()
    config.train.objective, config.tokenizer.kind, config.chat.template = "grpo", "byte", "plain"
    config.data.source = "sums:count=90&digits=2"
    config.rl.update({"field_bytes": 16})
    prepared = prepare(config, tmp_path / "data", log=lambda line: None)
    stored = [beside["answer"] for split in prepared.splits.values() for beside in prompts.fields(split.rows(range(len(split))))]
    assert max(map(len, stored)) == 2
    assert len(stored) + sum(split.dropped.get(prompts.LONG_FIELDS, 0) for split in prepared.splits.values()) == 90
