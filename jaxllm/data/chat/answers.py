"""Which tokens of a conversation are trained: found exactly, or the conversation is refused with the reason.

The text is what the template writes, encoded once, as a prompt is (encoding.py). Where an answer stands in it is said by the template's
{% generation %}; a template without one is asked twice: an answer begins where the text of what stands before it ends, with the
beginning of the next answer, and the text with the answer must go on from there, whatever follows. In both ways an answer goes up to
the token that ends it, and with it.

A token is trained if it holds a character of an answer. In a chat the model is sent what stands before an answer by itself, which may
be split otherwise than with the answer behind it (`resplit`): a token of both, or GPT-2's two newlines, which are one token at the end of
a text and two before a word. A template should end what stands before an answer with a special token, or with one newline.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from absl import logging

from jaxllm.data.chat import encoding, render
from jaxllm.data.documents import Message
from jaxllm.data.tokenizers.chat_template import ChatTemplate
from jaxllm.data.tokenizers.located import Located
from jaxllm.types import Tokenizer

# A question that no template contains.
QUESTION = "a-question-to-look-for"
# [start, stop) of an answer in a text, with the token that ends it.
Span = tuple[int, int]


NO_END = "no token that ends the answer"


class Refused(ValueError):
    """A conversation that cannot be trained on; the text says why in a few words."""


class Encoded(NamedTuple):
    """ids: int32 [N]. trained: bool [N], whether an id is to be predicted. resplit: whether what stands before the first answer that is
    trained has other ids by itself."""

    ids: np.ndarray
    trained: np.ndarray
    resplit: bool


Encode = Callable[[Sequence[Message]], Encoded]


def make(tokenizer: Tokenizer, train_on: str) -> Encode:
    """messages -> their ids and which of them are trained: those of each answer (assistant), of the last one (last), or all.

    ValueError for a tokenizer without a chat template, and for a template that marks other things than answers. Refused, by the
    function, for a conversation that cannot be used.
    """
    talker = encoding.require(tokenizer)
    _check_marks(talker.template)
    forbidden, ends = encoding.forbidden(talker), encoding.answer_ends(talker)

    def encode(messages: Sequence[Message]) -> Encoded:
        if found := [token for message in messages for token in encoding.spelled(message, forbidden)]:
            raise Refused(f"a message that spells {found[0]}")
        try:
            text, spans = find(talker.template, messages, ends)
        except Refused:
            raise
        except ValueError as error:
            why = str(error.__cause__ or error).partition("\n")[0]
            raise Refused(f"the chat template refuses it ({why})") from error
        located = talker.locate(text)
        if tokenizer.bos_id is not None and located.ids[:2] == [tokenizer.bos_id] * 2:
            raise Refused("two bos tokens at the beginning")
        chosen = spans[-1:] if train_on == "last" else spans
        answer = _mark(located, chosen)
        before = talker.encode_with_specials(text[: chosen[0][0]]) if chosen else []
        resplit = bool(chosen) and before != located.ids[: int(answer.argmax())]
        return Encoded(np.array(located.ids, np.int32), np.ones_like(answer) if train_on == "all" else answer, resplit)

    return encode


def warn_resplit(resplit: int, count: int, many: str) -> None:
    """Tells of how many of the conversations, or of `many` others, what stands before an answer has other ids by itself."""
    if resplit:
        logging.warning(
            "in %d of %d %s what stands before an answer is split into other tokens by itself, as chat sends it: the model meets other ids"
            " there than in training. Another chat.template may not have that.",
            resplit,
            count,
            many,
        )


def find(template: ChatTemplate, messages: Sequence[Message], ends: Mapping[str, int]) -> tuple[str, list[Span]]:
    """The conversation as text, and where its answers are. ends: the tokens that may end one."""
    rendered = render.marked(template, messages, add_generation_prompt=False)
    if not render.marks_answers(template):
        return rendered.text, _between(template, messages, rendered.text, ends)
    spans = _marked(rendered, ends)
    if len(spans) < sum(message["role"] == "assistant" for message in messages):
        raise Refused("an answer that the chat template does not mark")
    return rendered.text, spans


def _check_marks(template: ChatTemplate) -> None:
    """ValueError for a template whose {% generation %} marks a question, or marks no answer."""
    if not render.marks_answers(template):
        return
    exchange = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": encoding.MARK}]
    try:
        text, spans = render.marked(template, exchange, add_generation_prompt=False)
    except ValueError:
        # It wants other conversations than this one: those of the data are looked at one by one.
        return
    marked = "".join(text[start:stop] for start, stop in spans)
    if QUESTION in marked or encoding.MARK not in marked:
        all_or_none = "a user's message, so that all tokens would be trained", "no answer: no token would be trained"
        what = all_or_none[QUESTION not in marked]
        raise ValueError(
            f"{{% generation %}} in the chat template marks {what}.\n  Accepted: it stands around what the assistant writes, and nothing"
            " else.\n  Correct the template, take it out (answers are then found by themselves), or set another chat.template."
        )


def _marked(rendered: render.Rendered, ends: Mapping[str, int]) -> list[Span]:
    """What the template marks, up to the token that ends it. Parts that touch are one answer until such a token comes."""
    text = rendered.text
    spans: list[Span] = []
    for start, stop in rendered.spans:
        begun = spans[-1] if spans else (0, 0)
        if spans and begun[1] == start and not any(token in text[slice(*begun)] for token in ends):
            spans[-1] = (begun[0], stop)
        else:
            spans.append((start, stop))
    found = []
    for start, stop in spans:
        inside = start + len(text[start:stop].rstrip())
        blank = len(text[stop:]) - len(text[stop:].lstrip())
        behind = (stop + blank + len(token) for token in ends if text.startswith(token, stop + blank))
        end = inside if text[start:inside].endswith(tuple(ends)) else max(behind, default=None)
        if end is None:
            raise Refused(NO_END)
        found.append((start, end))
    return found


def _between(template: ChatTemplate, messages: Sequence[Message], text: str, ends: Mapping[str, int]) -> list[Span]:
    """Each answer, from the end of what is sent to get it to the first token behind its content that ends it."""
    spans = []
    for number, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = render.render(template, messages[:number], add_generation_prompt=True)
        after = render.render(template, messages[: number + 1], add_generation_prompt=False)
        if not after.startswith(before):
            raise Refused("the chat template begins an answer in another way than it asks for one")
        # Some templates end a text by a token of its own, which is not there when other messages follow.
        same, content = os.path.commonprefix([after, text]), message["content"]
        head = before + _head(template, messages[: number + 1], before)
        forms = (head + form for form in (content.rstrip(), content.strip()))
        stop = next((len(form) for form in forms if same.startswith(form)), None)
        if stop is None:
            raise Refused("the chat template changes an answer, or changes it when other messages follow")
        behind = [(at, -at - len(token)) for token in ends if (at := same.find(token, stop)) >= 0]
        if not behind:
            raise Refused(NO_END)
        # Of two that begin at one place the longer one is meant.
        spans.append((len(before), -min(behind)[1]))
    return spans


def _head(template: ChatTemplate, messages: Sequence[Message], before: str) -> str:
    """What the template writes between `before`, which asks for the last of the messages, and its content."""
    known = [*messages[:-1], {**messages[-1], "content": encoding.MARK}]
    return render.render(template, known, add_generation_prompt=False)[len(before) :].partition(encoding.MARK)[0]


def _mark(located: Located, spans: Sequence[Span]) -> np.ndarray:
    """bool [N]: the tokens that hold a character of these spans."""
    places = np.array(located.spans, np.int32).reshape(-1, 2)
    starts, stops = places[:, 0], places[:, 1]
    found = np.zeros(len(places), bool)
    for start, stop in spans:
        # A token without characters (the space that SentencePiece puts before a text) counts where it stands.
        found |= (starts < stop) & ((stops > start) | (starts >= start))
    return found
