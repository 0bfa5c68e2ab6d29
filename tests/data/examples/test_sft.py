"""Conversations in rows: whole, apart from each other, trained where they should be, and refused where they cannot be."""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from corpus import Lines
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxllm import config as schema
from jaxllm import models
from jaxllm.data import examples, tokenize
from jaxllm.data.chat import encoding
from jaxllm.data.documents import Document
from jaxllm.data.prepare import load, prepare
from jaxllm.data.shards import Totals
from jaxllm.data.sources import conversations
from jaxllm.data.tokenizers.byte import ByteTokenizer
from jaxllm.data.tokenizers.chat_template import ChatTemplate
from jaxllm.objectives import tokens

BOS, EOS, PAD, START, END = range(256, 261)
TEXT = st.text(alphabet="ab é\n", min_size=1, max_size=6)
TURNS = st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=3)


def config_of(template: str = "chatml", width: int = 96, train_on: str = "assistant", **changes: Any) -> Any:
    config = schema.base()
    config.train.objective, config.model.context_tokens = "sft", 512
    config.data.row_tokens, config.tokenizer.kind = width, "byte"
    config.chat.update({"template": template, "train_on": train_on})
    for key, value in changes.items():
        section, _, name = key.partition("__")
        config[section][name] = value
    return config


def talk(*turns: tuple[str, str]) -> Document:
    roles = [{"role": role, "content": text} for turn in turns for role, text in zip(("user", "assistant"), turn, strict=True)]
    return conversations.document(roles, "here")


def packed(config: Any, documents: list[Document], tokenizer: Any = None) -> tuple[dict[str, np.ndarray], Totals, Any]:
    """(the arrays of a batch of all rows, what was counted, the tokenizer)."""
    tokenizer = tokenizer or tokenize.make(config, list)
    side, totals = examples.make(config), Totals()
    blocks = list(side.pack(iter(documents), tokenizer, (), totals))
    rows = {name: np.concatenate([block[name] for block in blocks]) for name in side.columns(300)}
    return side.batch(tokenizer)(rows, np.arange(len(rows["tokens"])), 0, 0), totals, tokenizer


def pieces(batch: dict[str, np.ndarray]) -> list[tuple[list[int], list[int]]]:
    """(ids, weights of ids[1:]) of every conversation of the rows."""
    found = []
    for row in range(len(batch["tokens"])):
        for number in range(1, batch["segments"][row].max() + 1):
            here = batch["segments"][row] == number
            tokens, targets = batch["tokens"][row][here].tolist(), batch["targets"][row][here].tolist()
            assert tokens[1:] == targets[:-1]
            assert batch["positions"][row][here].tolist() == list(range(len(tokens)))
            found.append(([*tokens, targets[-1]], batch["weights"][row][here].tolist()))
    return found


def by_hand(document: Document) -> tuple[list[int], list[int]]:
    """ChatML written byte by byte: ids, and 1 for those of answers and of their ends."""
    ids, trained = [BOS], [0]
    for message in document.messages:
        before = [START, *f"{message['role']}\n".encode()]
        content = [*message["content"].encode(), END]
        ids += [*before, *content, *b"\n"]
        trained += [0] * len(before) + [int(message["role"] == "assistant")] * len(content) + [0]
    return ids, trained


@settings(max_examples=60, deadline=None)
@given(st.lists(TURNS, min_size=1, max_size=8))
def test_conversations_come_back(turns: list[list[tuple[str, str]]]) -> None:
    """In order of nothing: each is whole in one row, with the weights that are counted by hand; what is longer is cut at its end."""
    width = 96
    documents = [talk(*each) for each in turns]
    batch, totals, _ = packed(config_of(width=width), documents)
    expected = [(ids[: width + 1], trained[1 : width + 1]) for ids, trained in map(by_hand, documents)]
    assert sorted(pieces(batch)) == sorted(expected)
    assert totals.cut == sum(len(by_hand(document)[0]) > width + 1 for document in documents)
    assert totals.documents == len(documents) and not totals.dropped
    assert totals.tokens == sum(len(ids) for ids, _ in expected)
    assert totals.weighted_tokens == batch["weights"].sum() == sum(sum(weights) for _, weights in expected)
    padding = batch["segments"] == 0
    assert (batch["tokens"][padding] == PAD).all() and (batch["targets"][padding] == PAD).all()
    assert not batch["weights"][padding].any()


def test_a_row_by_eye() -> None:
    batch, _, _ = packed(config_of("plain", width=16), [talk(("a", "b"), ("c", "d")), talk(("e", "f"))])
    a, b, c, d, e, f = b"abcdef"
    line = ord("\n")
    expected = {
        "tokens": [BOS, a, line, b, EOS, c, line, d, BOS, e, line, f, PAD, PAD, PAD, PAD],
        "targets": [a, line, b, EOS, c, line, d, EOS, e, line, f, EOS, PAD, PAD, PAD, PAD],
        "segments": [1] * 8 + [2] * 4 + [0] * 4,
        "positions": [*range(8), *range(4), *range(4)],
        "weights": [0, 0, 1, 1, 0, 0, 1, 1, 0, 0, 1, 1, 0, 0, 0, 0],
    }
    assert batch.keys() == expected.keys()
    for name, row in expected.items():
        np.testing.assert_array_equal(batch[name], [row], err_msg=name)
    for train_on, weights in (("last", [0] * 6 + [1, 1]), ("all", [1] * 8)):
        batch, _, _ = packed(config_of("plain", 16, train_on), [talk(("a", "b"), ("c", "d"))])
        np.testing.assert_array_equal(batch["weights"][0][:8], weights)
        assert not batch["weights"][0][8:].any()


@pytest.mark.parametrize("template", ["chatml", "llama3", "alpaca", "plain"])
@pytest.mark.parametrize("train_on", ["assistant", "last"])
def test_the_last_trained_label_ends_the_answer(template: str, train_on: str) -> None:
    """trl#1623, stanford_alpaca#126: a model that never saw the end of an answer never stops."""
    batch, _, tokenizer = packed(config_of(template, 256, train_on), [talk(("ask", "say"), ("more", "yes"))])
    ((ids, weights),) = pieces(batch)
    trained = [index for index, weight in zip(ids[1:], weights, strict=True) if weight]
    ends = [index in encoding.answer_stop_ids(tokenizer) for index in trained]
    assert ends[-1] and sum(ends) == {"assistant": 2, "last": 1}[train_on]


def test_pad_may_be_eos_and_eos_is_still_trained() -> None:
    """llm-course#33, trl#734, unsloth#416: where the two are one token, ids must not decide what is padding."""

    class OneToken(ByteTokenizer):
        pad_id = EOS

    tokenizer = OneToken(template=tokenize.make(config_of("plain"), list).template)
    batch, _, _ = packed(config_of("plain", 12), [talk(("a", "b")), talk(("c", "d"))], tokenizer)
    eos, padding = batch["targets"] == EOS, batch["segments"] == 0
    assert (eos & padding).sum() == 4 and (eos & ~padding).sum() == 2
    assert (batch["weights"][eos & ~padding] == 1).all() and not batch["weights"][padding].any()


def test_training_ids_are_those_that_chat_sends() -> None:
    document = talk(("what?", "that"), ("and?", "this"))
    batch, _, tokenizer = packed(config_of(), [document])
    ((ids, weights),) = pieces(batch)
    sent = encoding.encode(tokenizer, document.messages[:3])
    assert ids[: len(sent)] == sent and weights[len(sent) - 1] == 1 and weights[len(sent) - 2] == 0


def test_the_loss_of_packed_conversations_is_that_of_each_alone() -> None:
    """trl#805, torchtune#892: neighbours in a row neither see nor shift each other, and the last tokens count as the first ones do."""
    documents = [talk(("a", "b"), ("c?", "déf")), talk(("more", "x")), talk(("?", "yes, no"))]
    config = config_of("plain", 48)
    # A table of positions, where they matter by themselves: rotary ones only by their differences.
    config.model.update({"name": "gpt", "layers": 1, "width": 16, "heads": 2, "context_tokens": 48, "vocab_size": 259})
    model = models.build(config)
    objective, params = tokens.make(model, config), model.init(jax.random.key(0))
    together, _, _ = packed(config, documents)
    alone = [packed(config, [document])[0] for document in documents]
    assert len(together["tokens"]) == 1 and together["segments"].max() == 3
    loss, _ = objective(params, together, None)
    each = [objective(params, batch, None)[0] for batch in alone]
    assert loss.weight == sum(mean.weight for mean in each) == together["weights"].sum()
    np.testing.assert_allclose(loss.total, sum(mean.total for mean in each), rtol=2e-6)  # sums in another order


UNUSABLE = {
    "a message that spells <|im_end|>": talk(("x<|im_end|>z", "y")),
    "a message that spells </s>": talk(("x", "</s>")),
    "no trained token within a row (data.row_tokens)": talk(("x" * 90, "y")),
}


def test_what_cannot_be_used_is_left_out_by_its_reason() -> None:
    good = [talk((f"ask {number}", "say")) for number in range(6)]
    batch, totals, _ = packed(config_of(), [*UNUSABLE.values(), *good, *UNUSABLE.values()])
    assert totals.dropped == dict.fromkeys(UNUSABLE, 2)
    assert totals.documents == 6
    assert not (batch["targets"][batch["weights"] > 0] == START).any()


def test_a_set_of_which_most_cannot_be_used_is_refused_with_an_example() -> None:
    """trl#588, #1820: every label was masked, and nobody noticed."""
    with pytest.raises(ValueError, match=r"3 of 4 conversations cannot be used:\n    1 x a message that spells") as caught:
        packed(config_of(), [*UNUSABLE.values(), talk(("a", "b"))])
    assert "The first one, here, for the reason 'a message that spells <|im_end|>':\n    <s><|im_start|>user\n    x" in str(
        caught.value
    )
    assert "\n  Accepted: " in str(caught.value) and "\n  Set another chat.template" in str(caught.value)
    with pytest.raises(ValueError, match=r"1 of 1 conversations") as caught:
        packed(config_of(), [talk(("x" * 1000, "y"))])
    assert "x ...\n  Accepted: " in str(caught.value) and len(str(caught.value)) < 1200, "of a long one its beginning"


def test_what_is_stored_holds_every_id_and_every_segment() -> None:
    """Hundreds of conversations in a row, too; an id beyond the vocabulary, which could become another one, is refused."""
    documents = [talk(("a", "b"))] * 300
    batch, _, tokenizer = packed(config_of("plain", 1300), documents)
    columns = examples.make(config_of("plain", 1300)).columns(tokenizer.vocab_size)
    assert batch["segments"].max() == 300
    for name, column in columns.items():
        np.testing.assert_array_equal(batch[name].astype(column.dtype), batch[name], err_msg=name)
    tokenizer.vocab_size = 257
    with pytest.raises(ValueError, match=r"gave ids from 10 to 257.\n  Accepted: 0 to 256"):
        packed(config_of("plain", 16), documents[:1], tokenizer)


def asking(chars: int) -> Document:
    """A conversation that needs a row of chars + 12 tokens, of which 10 + chars stand before the answer."""
    document = talk(("q" * chars, "y"))
    assert len(by_hand(document)[0]) - 1 == chars + len(by_hand(talk(("", "y")))[0]) - 1
    return document


@pytest.mark.parametrize(("context", "limit"), [(512, ""), (96, ", as many as model.context_tokens allows")])
def test_rows_that_are_too_short_are_an_error_that_says_what_is_needed(context: int, limit: str) -> None:
    around = len(by_hand(talk(("", "y")))[0]) - 1
    documents = [asking(chars) for chars in range(100, 119)] + [asking(300)]
    with pytest.raises(ValueError, match="20 of 20 conversations cannot be used:\n    20 x no trained token within") as caught:
        packed(config_of(model__context_tokens=context), documents)
    # 19 of 20 are 95 %.
    needed = f"needs rows of {300 + around} tokens, and 95% of them need {118 + around} or fewer; data.row_tokens is 96{limit}\n"
    text = str(caught.value)
    assert needed in text and "\n  Accepted: " in text and "\n  Raise data.row_tokens" in text and "template" not in text


def test_conversations_that_are_cut_are_a_warning_that_says_what_is_needed(caplog: pytest.LogCaptureFixture) -> None:
    around = len(by_hand(talk(("", "y")))[0]) - 1
    documents = [*(asking(chars) for chars in range(1, 20)), asking(200), talk(("a", "y" * 90))]
    _, totals, _ = packed(config_of(), documents)
    assert (totals.cut, sum(totals.dropped.values())) == (1, 1)
    needed = f"needs rows of {200 + around} tokens, and 95% of them need {90 + around} or fewer; data.row_tokens is 96"
    assert f"2 of 21 conversations are longer than a row: to be whole, the longest conversation {needed}" in caplog.text
    caplog.clear()
    packed(config_of(), documents[:19])
    assert not caplog.text


def test_a_set_that_is_trained_whole_is_refused() -> None:
    program = "{% for m in messages if m.role == 'assistant' %}{{ m.content + '</s>' }}{% endfor %}"
    tokenizer = ByteTokenizer(template=ChatTemplate(program, {}))
    with pytest.raises(
        ValueError, match=r"every token of the 2 conversations is trained.*writes nothing but answers.\n  Accepted: "
    ):
        packed(config_of(), [talk(("a", "b")), talk(("a", "c"))], tokenizer)
    packed(config_of(train_on="all"), [talk(("a", "b"))], tokenizer)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    rows = [{"prompt": f"What is {number}?", "completion": f"It is {number}."} for number in range(40)]
    rows += [{"prompt": "</s>", "completion": "x"}, {"messages": [{"role": "user", "content": "never answered"}]}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("kind", ["byte", "char", "bpe", "unigram"])
@pytest.mark.parametrize("template", ["chatml", "alpaca"])
def test_prepare_tells_what_is_trained(tmp_path: Path, source: Path, kind: str, template: str) -> None:
    """With every kind of tokenizer that is made here: it has what the template needs, and the template is saved with it."""
    config = config_of(
        template,
        256,
        data__source=str(source),
        tokenizer__kind=kind,
        tokenizer__vocab_size={"chatml": 288, "alpaca": 312}[template],
    )
    lines = Lines()
    prepared = prepare(config, tmp_path / "data", log=lines)
    share = prepared.train.weighted_tokens / prepared.train.tokens
    assert f"train: {share:.1%} of the tokens are trained (chat.train_on = assistant)" in lines
    assert "conversations dropped: 1 by a message that spells </s>" in lines.text
    assert prepared.record["documents"]["data.source"]["dropped"] == {"no answer at the end": 1}
    again = load(config, tmp_path / "data")
    assert sum(sum(split.dropped.values()) for split in (again.train, again.validation)) == 1
    stored = again.train.rows(np.arange(len(again.train)))
    batch = again.make_batch(config)(stored, np.arange(len(again.train)), 0, 0)
    for ids, weights in pieces(batch):
        answer = again.tokenizer.decode([index for index, weight in zip(ids[1:], weights, strict=True) if weight])
        asked = again.tokenizer.decode(ids)
        assert f"What is {answer.removeprefix('It is ').removesuffix('.')}?" in asked
        messages = [{"role": "user", "content": f"What is {answer[6:-1]}?"}]
        sent = encoding.encode(again.tokenizer, messages)
        assert ids[: len(sent)] == sent


def test_questions_alone_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "questions.jsonl"
    path.write_text('{"messages": [{"role": "user", "content": "never answered"}]}\n' * 3)
    config = config_of("chatml", 256, data__source=str(path), tokenizer__kind="byte")
    with pytest.raises(ValueError, match=r"dropped \(3 by no answer at the end\).\n  Accepted: conversations in which an answer"):
        prepare(config, tmp_path / "data", log=Lines())


def test_fields_of_chat_are_part_of_the_recipe(tmp_path: Path, source: Path) -> None:
    prepare(config_of(data__source=str(source)), tmp_path / "data", log=Lines())
    for change in ({"train_on": "all"}, {"template": "plain"}, {"tokenizer__add_tokens": ("<x>",)}):
        lines = Lines()
        prepared = prepare(config_of(data__source=str(source), **change), tmp_path / "data", log=lines)
        assert next(iter(change)).replace("tokenizer__", "") in lines[0]
        assert ("<x>" in prepared.tokenizer.special_tokens) == ("tokenizer__add_tokens" in change)


def test_what_is_read_of_a_row_is_part_of_the_recipe(tmp_path: Path) -> None:
    """The format, and the field of the answers."""
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": f"{n}?", "target": f"{n}.", "other": f"{n}!"}) + "\n" for n in range(40)))
    for change, says in (
        ({}, ""),
        ({"chat__format": "prompt"}, "chat.format"),
        ({"data__target_field": "other"}, "data.target_field"),
    ):
        lines = Lines()
        prepared = prepare(config_of(data__source=str(path), **change), tmp_path / "data", log=lines)
        assert says in lines[0]
        answers = prepared.tokenizer.decode(np.unique(prepared.train.rows(np.arange(len(prepared.train)))["targets"]).tolist())
        assert ("!" in answers) == ("other" in change.values())
