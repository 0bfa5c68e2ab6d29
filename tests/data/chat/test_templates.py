"""Chat templates: the text, the ids and the mask that transformers makes; answers found with and without {% generation %}."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxllm import config as schema
from jaxllm import registry
from jaxllm.data import tokenize
from jaxllm.data.chat import answers, encoding, render, templates
from jaxllm.data.documents import Document
from jaxllm.data.examples import sft
from jaxllm.data.shards import Totals
from jaxllm.data.tokenizers.added import Added
from jaxllm.data.tokenizers.byte import ByteTokenizer
from jaxllm.data.tokenizers.chat_template import ChatTemplate
from jaxllm.data.tokenizers.huggingface import HuggingFaceTokenizer

GOLDEN = json.loads((Path(__file__).parents[2] / "golden" / "chat.json").read_text(encoding="utf-8"))
NAMED = registry.names("chat_template")
# What is frozen of ours are the texts that it makes, not the program.
PROGRAMS = GOLDEN["templates"] | {name: templates.named(name).text for name in NAMED}
DEFINITION = json.dumps(GOLDEN["tokenizer"]).encode()
IDS = {token["content"]: token["id"] for token in GOLDEN["tokenizer"]["added_tokens"]}
TALK = GOLDEN["conversations"]["three turns"]


def tokenizer(template: str, names: dict[str, str] = GOLDEN["names"]) -> Any:
    return HuggingFaceTokenizer(DEFINITION, bos_id=IDS["<s>"], eos_id=IDS["</s>"], pad_id=0, template=ChatTemplate(template, names))


def untagged(template: str) -> str:
    """The same text without {% generation %}; the spaces that its tags take are taken by comments."""
    return re.sub(r"{%(-?)\s*(?:end)?generation\s*(-?)%}", r"{#\1 \2#}", template)


@pytest.mark.parametrize("case", GOLDEN["cases"], ids=lambda case: f"{case['template']}, {case['conversation']}")
def test_text_ids_and_mask_are_those_of_transformers(case: dict[str, Any]) -> None:
    """Where the two differ, ours trains the token that ends an answer, and nothing behind it."""
    made, messages = tokenizer(PROGRAMS[case["template"]]), GOLDEN["conversations"][case["conversation"]]
    assert render.render(made.template, messages, add_generation_prompt=False) == case["text"]
    found = answers.make(made, "assistant")(messages)
    assert found.ids.tolist() == encoding.encode(made, messages, add_generation_prompt=False) == case["ids"]
    theirs, turns = np.array(case["mask"], bool), sum(message["role"] == "assistant" for message in messages)
    more, less = (made.tokenizer.decode(found.ids[part], skip_special_tokens=False) for part in (
        found.trained & ~theirs, theirs & ~found.trained,
    ))  # fmt: skip
    expected = {"end outside": ("\n</s>" * turns, ""), "newline inside": ("", "\n" * turns)}
    assert (more, less) == expected.get(case["template"], ("", ""))
    ends = found.ids[np.flatnonzero(np.diff(found.trained.astype(int), append=0) == -1)]
    assert len(ends) == turns and set(ends) <= set(encoding.answer_stop_ids(made)), "every answer ends with a token that ends it"


@pytest.mark.parametrize("name", PROGRAMS)
@pytest.mark.parametrize("messages", GOLDEN["conversations"].values(), ids=GOLDEN["conversations"])
def test_answers_are_found_without_marks(name: str, messages: list[dict[str, str]]) -> None:
    """Most templates of models have none: what stands before an answer, and with it, says where it is."""
    plain, marked = tokenizer(untagged(PROGRAMS[name])), tokenizer(PROGRAMS[name])
    assert "generation " not in plain.template.text and not render.marks_answers(plain.template)
    one, other = (answers.find(made.template, messages, encoding.answer_ends(made)) for made in (plain, marked))
    assert one[0] == other[0]
    if name in NAMED:
        # Readers elsewhere train what is marked and no more: the end of an answer is within its mark.
        marks = render.marked(marked.template, messages, add_generation_prompt=False).spans
        assert one == other == (one[0], list(marks))
    # Elsewhere the template begins no answer for the model, so that it has to write the role by itself.
    assert [stop for _, stop in one[1]] == [stop for _, stop in other[1]]


@pytest.mark.parametrize("name", NAMED)
def test_training_ids_begin_with_those_of_the_prompt(name: str) -> None:
    """LlamaFactory#4639: what is trained must be what chat sends; the rest is the answer and its end."""
    made = tokenizer(PROGRAMS[name])
    found = answers.make(made, "assistant")(TALK)
    for number in range(1, len(TALK), 2):
        sent = encoding.encode(made, TALK[:number])
        assert found.ids[: len(sent)].tolist() == sent
        assert found.trained[len(sent)] and not found.trained[len(sent) - 1]
    assert not found.resplit


def test_what_is_trained_on() -> None:
    made = tokenizer(templates.CHATML)
    each, last, everything = (answers.make(made, train_on)(TALK).trained for train_on in ("assistant", "last", "all"))
    runs = np.flatnonzero(np.diff(each.astype(int), prepend=0) == 1)
    assert len(runs) == 3
    np.testing.assert_array_equal(last, each & (np.arange(len(each)) >= runs[-1]))
    assert everything.all()


CHAT = "{% for m in messages %}{{ m.role + ': ' + m.content + '</s>' }}{% endfor %}"
GROWING = "{% for m in messages %}{{ m.role + ': ' + (m.content if loop.last else m.content[:2]) + '</s>' }}{% endfor %}"
CHANGING = (
    "{% for m in messages %}{{ m.role + ': ' + ('' if loop.last or m.role == 'user' else '-') + m.content + '</s>' }}{% endfor %}"
)
TAGGED = "{{% for m in messages %}}{}{{% endfor %}}".format


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (GROWING, "begins an answer in another way than it asks for one"),
        (CHANGING, "the chat template changes an answer, or changes it when other messages follow"),
        (CHAT.replace("m.content", "m.content | upper"), "the chat template changes an answer"),
        (CHAT + "{{ '<think>' if add_generation_prompt }}", "begins an answer in another way than it asks for one"),
        (CHAT.replace("</s>", "\\n"), "no token that ends the answer"),
        # The next token that could end it ends the next question.
        (TAGGED("{{ m.role + ': ' + m.content + ('</s>' if m.role == 'user' or loop.last else '\\n') }}"), "no token that ends the answer"),
        (TAGGED("{{ m.content }}{% generation %}{{ m.content if m.role == 'robot' }}{% endgeneration %}"), None),
        (TAGGED("{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}{{ '.' }}{% endif %}"), "no token"),
        (
            TAGGED("{% if loop.last %}{% generation %}{{ m.content + '</s>' }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}"),
            "an answer that the chat template does not mark",
        ),
        ("{{ '<s><s>' }}" + CHAT, "two bos tokens at the beginning"),
        ("{{ raise_exception('one line\nand more') }}", r"^the chat template refuses it \(one line\)$"),
        ("{{ raise_exception('only ' + 'two') if messages | length > 2 }}" + CHAT, r"the chat template refuses it \(only two\)"),
    ],
)  # fmt: skip
def test_conversations_are_refused_with_the_reason(template: str, reason: str | None) -> None:
    if reason is None:
        with pytest.raises(
            ValueError, match=r"marks no answer: no token would be trained.\n  Accepted: .*\n  Correct the template"
        ):
            answers.make(tokenizer(template), "assistant")
        return
    with pytest.raises(answers.Refused, match=reason):
        answers.make(tokenizer(template), "assistant")(TALK)


def test_marks_around_everything_are_refused() -> None:
    """trl#4201, marin#7237: a template that marks all of it trains the questions, too."""
    for template in (
        "{% generation %}" + CHAT + "{% endgeneration %}",
        TAGGED("{% generation %}{{ m.content + eos_token }}{% endgeneration %}"),
    ):
        with pytest.raises(ValueError, match=r"marks a user's message, so that all tokens would be trained.\n  Accepted: "):
            answers.make(tokenizer(template), "assistant")


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        # As Phi-3: the text has an end of its own, which goes when others follow.
        (CHAT + "{{ '<|eot_id|>' if not add_generation_prompt else 'assistant: ' }}", "{}</s>"),
        # As Kimi-K3: what ends an answer also ends the role before it, and the answer is trimmed.
        ("{% for m in messages %}{{ m.role + '</s>' + m.content | trim + '\n</s>' }}{% endfor %}", "assistant</s>{}\n</s>"),
        # Of two that end it the first one does.
        (CHAT.replace("</s>", "<|im_end|></s>"), "assistant: {}<|im_end|>"),
    ],
)
def test_ends_of_templates_without_marks(template: str, expected: str) -> None:
    made = tokenizer(template)
    text, spans = answers.find(made.template, TALK, encoding.answer_ends(made))
    contents = [message["content"].strip() if "trim" in template else message["content"] for message in TALK[1::2]]
    assert [text[start:stop] for start, stop in spans] == [expected.format(content) for content in contents]
    short = [TALK[0], {"role": "assistant", "content": "t"}]
    text, ((start, stop),) = answers.find(made.template, short, encoding.answer_ends(made))
    assert text[start:stop] == expected.format("t"), "not the letter in the role before it"


def test_the_only_answer_to_two_answers_in_a_row() -> None:
    """Each ends for itself, though their marks touch; an answer of several marks is one, and a mark around nothing is none."""
    twice = [TALK[0], {"role": "assistant", "content": "one"}, {"role": "assistant", "content": "two"}]
    parts = TAGGED("{% if m.role == 'user' %}{{ m.content + '\n' }}{% else %}{% generation %}{{ m.content }}{% endgeneration %}"
                   "{% generation %}{{ eos_token }}{% endgeneration %}{% endif %}")  # fmt: skip
    empty = TAGGED("{% generation %}{{ m.content + eos_token if m.role == 'assistant' }}{% endgeneration %}"
                   "{{ m.content + '\n' if m.role == 'user' }}")  # fmt: skip
    for template in (templates.PLAIN, parts, empty):
        made = tokenizer(template)
        text, spans = answers.find(made.template, twice, encoding.answer_ends(made))
        assert [text[start:stop] for start, stop in spans] == ["one</s>", "two</s>"]


@pytest.mark.parametrize("program", [templates.PLAIN, untagged(templates.PLAIN)], ids=["marked", "not marked"])
def test_the_longer_of_two_ends_is_meant(program: str) -> None:
    """Where one begins as the other: the tokenizer takes the longer one for its token."""
    made = ByteTokenizer(Added(tokens=("</s>>",)), ChatTemplate(program.replace("eos_token", "'</s>>'"), {}))
    found = answers.make(made, "assistant")([TALK[0], {"role": "assistant", "content": "a"}])
    assert found.ids[found.trained].tolist() == [ord("a"), made.special_tokens["</s>>"]]
    assert encoding.answer_stop_ids(made) == (made.eos_id, made.special_tokens["</s>>"])


def test_a_template_that_wants_other_conversations_than_ours_is_looked_at_one_by_one() -> None:
    """What it says of marks and of ends cannot be asked beforehand: eos ends an answer."""
    demand = "{{ raise_exception('no system') if messages[0].role != 'system' }}"
    for program in (demand + templates.PLAIN, demand + untagged(templates.PLAIN)):
        encode, short = answers.make(tokenizer(program), "assistant"), TALK[:2]
        found = encode([{"role": "system", "content": "Be."}, *short])
        assert found.ids[found.trained][-1] == IDS["</s>"]
        with pytest.raises(answers.Refused, match=r"the chat template refuses it \(no system\)"):
            encode(short)


def test_an_answer_that_begins_inside_of_a_token_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A space at the end of the prompt becomes one token with the word behind it."""
    program = (
        "{% for m in messages %}{{ m.role + ': ' + m.content + '</s>' }}{% endfor %}{{ 'assistant: ' if add_generation_prompt }}"
    )
    made = tokenizer(program)
    talk = [TALK[0], {"role": "assistant", "content": "cat"}]
    found = answers.make(made, "assistant")(talk)
    assert found.resplit
    assert made.tokenizer.decode(found.ids[found.trained], skip_special_tokens=False) == " cat</s>"
    assert encoding.encode(made, talk[:1])[-1] != found.ids[found.trained][0]
    other = [TALK[0], {"role": "assistant", "content": "Cat"}]
    assert not answers.make(made, "assistant")(other).resplit
    said: list[str] = []
    monkeypatch.setattr(answers.logging, "warning", lambda words, *values: said.append(words % values))
    config = schema.base()
    config.train.objective = "sft"
    for conversations, warnings in (([other], 0), ([[*talk, *talk], other, other], 1)):
        documents = (Document("", "here", messages=tuple(messages)) for messages in conversations)
        list(sft.make(config).pack(documents, made, (), Totals()))
        assert len(said) == warnings
    assert said[0].startswith("in 1 of 3 conversations what stands before an answer is split into other tokens by itself")


def test_a_prompt_that_is_split_otherwise_is_noticed() -> None:
    """No token is of both, yet all are others: GPT-2's rules take the last of several newlines apart from them before a word alone."""
    definition = json.loads(DEFINITION)
    definition["model"]["vocab"]["\u010a\u010a"] = 1 + max(IDS.values())
    definition["model"]["merges"].append(["\u010a", "\u010a"])
    for name, resplit in (("llama3", True), ("chatml", False)):
        template = ChatTemplate(PROGRAMS[name], GOLDEN["names"])
        made = HuggingFaceTokenizer(
            json.dumps(definition).encode(), bos_id=IDS["<s>"], eos_id=IDS["</s>"], pad_id=0, template=template
        )
        for train_on in ("assistant", "last", "all"):
            found, sent = answers.make(made, train_on)(TALK[:2]), encoding.encode(made, TALK[:1])
            assert found.resplit == resplit == (found.ids[: len(sent)].tolist() != sent)


@pytest.mark.parametrize("kind", ["byte", "bpe", "unigram"])
def test_all_bytes_of_an_answers_first_character_are_trained(kind: str) -> None:
    """SentencePiece says of the first bytes of a character that they stand for nothing, and the last one for all of it."""
    made = chosen("plain", kind)
    found = answers.make(made, "assistant")([{"role": "user", "content": "漢"}, {"role": "assistant", "content": "漢é"}])
    assert found.ids[found.trained].tolist() == [*made.encode("漢é"), made.eos_id]
    assert len(made.encode("漢é")) == 5


def test_no_message_can_write_marks_of_its_own() -> None:
    with pytest.raises(answers.Refused, match=r"U\+FDD0, which is no character"):
        answers.make(tokenizer(templates.CHATML), "assistant")([{"role": "user", "content": render.BEGIN}, TALK[1]])


def chosen(template: str, kind: str = "byte", path: str = "") -> Any:
    config = schema.base()
    config.train.objective, config.chat.template = "sft", template
    config.tokenizer.update({"kind": kind, "path": path, "vocab_size": 272})
    return tokenize.make(config, lambda: ["the cat sat on the mat\n" * 9])


@pytest.mark.parametrize("kind", ["byte", "bpe"])
@pytest.mark.parametrize("name", NAMED)
def test_exactly_one_bos(name: str, kind: str) -> None:
    """vllm#27515, lm-eval#2676: neither two nor none where the tokenizer begins a text with it."""
    made = chosen(name, kind)
    for messages in GOLDEN["conversations"].values():
        ids = encoding.encode(made, messages)
        assert ids[0] == made.bos_id and ids.count(made.bos_id) == 1


@pytest.mark.parametrize("name", NAMED)
def test_no_bos_where_the_tokenizer_has_none(name: str, tmp_path: Path) -> None:
    HuggingFaceTokenizer(DEFINITION, bos_id=None, eos_id=IDS["</s>"], pad_id=0).save(str(tmp_path))
    made = chosen(name, "file", str(tmp_path))
    assert "bos_token" not in made.template.names
    assert made.special_tokens["<s>"] not in encoding.encode(made, TALK)


def test_the_template_is_saved_with_the_tokenizer(tmp_path: Path) -> None:
    made = chosen("chatml")
    made.save(str(tmp_path))
    again = tokenize.load(tmp_path)
    assert encoding.encode(again, TALK) == encoding.encode(made, TALK)
    assert encoding.answer_stop_ids(again) == encoding.answer_stop_ids(made) == (257, 260)
    assert tokenize.stop_ids(again) == (257, 260), "generate stops there, too"


def test_a_tokenizer_without_a_template_has_to_be_given_one(tmp_path: Path) -> None:
    ByteTokenizer().save(str(tmp_path))
    with pytest.raises(ValueError, match=r"no chat template.\n  Accepted: alpaca, chatml, llama3, plain; .*\n  Set chat.template"):
        chosen("tokenizer", "file", str(tmp_path))


def test_another_template_than_the_tokenizers_own_is_told_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """LlamaFactory#6736: llama3's template on Qwen gave endless repeats."""
    said: list[str] = []
    for module in (templates, tokenize):
        monkeypatch.setattr(module.logging, "warning", lambda words, *values: said.append(words % values))
    tokenizer(templates.CHATML).save(str(tmp_path))
    assert chosen("tokenizer", "file", str(tmp_path)).template.text == templates.CHATML
    chosen("chatml", "file", str(tmp_path))
    assert not said
    chosen("llama3", "file", str(tmp_path))
    assert [line for line in said if line.startswith("chat.template = 'llama3' is not the template that the tokenizer came with")]
    assert len(said) == 1, "its tokens are there already"
