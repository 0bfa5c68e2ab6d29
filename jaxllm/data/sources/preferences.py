"""From a row of a table to a prompt and what was said of its answers, in whichever of the common formats it is written.

Pairs: the fields "chosen" and "rejected". Each is an answer (a text, a message, or a list of messages that begins with the
assistant's), and the prompt stands beside it:
    prompt          {"prompt": "..."}, a text or a list of messages; or the field that data.text_field names
    messages        {"messages": [...]}
    sharegpt        {"conversations": [{"from": "human", "value": "..."}]}
    alpaca          {"instruction": "...", "input": "..."}
Or each is a whole conversation, and the prompt is their common beginning, whatever else the row holds:
    messages        [{"role": "user", ...}, {"role": "assistant", ...}]
    HH-RLHF         "\\n\\nHuman: ...\\n\\nAssistant: ..." (Bai et al. 2022, arXiv:2204.05862); a prompt may be written so, too
By how much chosen is better is said by "margin", or by "score_chosen" and "score_rejected".

Labelled answers: a conversation as conversations.py reads it, of which the last message is judged, and "label": true (good) or false.
"""

import itertools
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from jaxllm.data.documents import Document, Message
from jaxllm.data.sources import conversations
from jaxllm.data.sources.values import kind, valid

CHOSEN, REJECTED, LABEL = "chosen", "rejected", "label"
# chat.format -> the field with the prompt.
PROMPTS = {"prompt": "prompt", "messages": "messages", "sharegpt": "conversations", "alpaca": "instruction"}
LABELS = {"true": 1.0, "1": 1.0, "false": 0.0, "0": 0.0}
# An answer that is not there yet.
TO_COME: Message = {"role": "assistant", "content": ""}
# Where a turn begins, and who speaks.
TURN = re.compile(r"\n\n(Human|Assistant):[ ]?")
SPEAKERS = {"Human": "user", "Assistant": "assistant"}
PAIRS = (
    f"an object with {CHOSEN} and {REJECTED}, and beside them prompt, messages, conversations (ShareGPT) or instruction; or with two whole"
    " conversations in these, as lists of messages or as 'Human:' and 'Assistant:' in turn (HH-RLHF)"
)
CHANGE_PAIRS = "Rename the fields, or set data.text_field to the one with the prompt; chat.format says which of several is it."
LABELLED = f"an object with {conversations.FORMATS}, and {LABEL} beside them"
CHANGE_LABELLED = f"Rename the fields; train.objective = 'dpo' and others read {CHOSEN} and {REJECTED}."


def document(prompt: Sequence[Message], answers: Sequence[Sequence[Message]], origin: str, score: float | None = None) -> Document:
    """The prompt and its answers as a document. Its text is the prompt's, so that what was said of one prompt is held out together."""
    text = "\n".join(message["content"] for message in prompt)
    return Document(text, origin, messages=tuple(prompt), answers=tuple(map(tuple, answers)), score=score)


def flaw(document: Document) -> str:
    """Why nothing can be learnt from the document, a conversation or a prompt with or without answers; empty if something can."""
    if document.fields is not None:
        return conversations.flaw([*document.messages, TO_COME]) or _not_asked(document)
    if not document.answers:
        return conversations.flaw(document.messages)
    if any(len(answer) != 1 for answer in document.answers):
        return f"{CHOSEN} and {REJECTED} differ before their last answer"
    flaws = (conversations.flaw([*document.messages, *answer]) for answer in document.answers)
    return next(filter(None, flaws), "") or _not_asked(document)


def _not_asked(document: Document) -> str:
    return "a prompt that ends with an answer" if document.messages[-1]["role"] == "assistant" else ""


def read_pair(row: Any, format_name: str, text_field: str, origin: str) -> Document:
    """The prompt of a row, its chosen and its rejected answer, and by how much the former is better (None if nothing says it).

    format_name: chat.format, or conversations.NAMED for a prompt in `text_field`. Of conversations that differ before their last answers
    the answers are all that differs. ValueError that says what the row holds if it is no pair.
    """
    try:
        if not isinstance(row, dict):
            raise conversations.Unreadable(origin, f"is {kind(row)}, not an object")
        if lacking := [name for name in (CHOSEN, REJECTED) if name not in row]:
            has_not = " and no field ".join(map(repr, lacking))
            raise conversations.Unreadable(origin, f"has no field {has_not}: its fields are {', '.join(row) or 'none'}")
        answers = [_answer(row[name], f"{origin}, {name}") for name in (CHOSEN, REJECTED)]
        whole = [answer[0]["role"] in ("system", "user") for answer in answers]
        if whole[0] != whole[1]:
            raise conversations.Unreadable(
                origin, f"has a whole conversation as {CHOSEN} or {REJECTED}, and an answer as the other"
            )
        if whole[0]:
            both = zip(*(answer[:-1] for answer in answers), strict=False)
            same = len(list(itertools.takewhile(lambda turns: turns[0] == turns[1], both)))
            prompt = conversations.with_system(answers[0][:same], row, origin)
            answers = [answer[same:] for answer in answers]
        else:
            prompt = read_prompt(row, prompt_field(row, format_name, text_field, origin), origin)
        return document(prompt, answers, origin, _margin(row, origin))
    except conversations.Unreadable as error:
        raise _refuse(error, PAIRS, CHANGE_PAIRS) from None


def read_labelled(row: Any, format_name: str, fields: tuple[str, str], origin: str) -> Document:
    """The prompt of a row and its answer, with the score 1 if that is good, else 0; arguments as those of conversations.read."""
    try:
        messages = conversations.read(row, format_name, fields, origin).messages
        if LABEL not in row:
            raise conversations.Unreadable(origin, f"has no field '{LABEL}': its fields are {', '.join(row)}")
        if (label := LABELS.get(_spelled(row[LABEL]))) is None:
            raise ValueError(
                f"{origin} has {row[LABEL]!r} as '{LABEL}'.\n  Accepted: true for a good answer, false for a bad one; 1 and 0.\n"
                "  Correct the row, or leave it out."
            )
        return document(messages[:-1], [messages[-1:]], origin, label)
    except conversations.Unreadable as error:
        raise _refuse(error, LABELLED, CHANGE_LABELLED) from None


def _refuse(error: conversations.Unreadable, accepted: str, change: str) -> ValueError:
    return ValueError(f"{error.origin} {error.what}.\n  Accepted: {accepted}.\n  {change}")


def _spelled(label: Any) -> str:
    """A label as text: tables without types have nothing else. A number such as 1.5 is none."""
    return str(label).strip().lower() if isinstance(label, bool | int | str) else ""


def _answer(given: Any, origin: str) -> list[Message]:
    """An answer, or a whole conversation with it."""
    if isinstance(given, str) and (transcript := _transcript(given)):
        return transcript
    if isinstance(given, dict) and not all(isinstance(column, list) for column in given.values()):
        given = [given]
    if isinstance(given, list | dict):
        return conversations.turns(given, "from", "value", conversations.SHAREGPT_ROLES, origin)
    return [conversations.message("assistant", given, origin)]


def _transcript(text: str) -> list[Message]:
    """The messages of a text that begins with the turn of a human, as HH-RLHF writes them; else none.

    Turns of one speaker that follow one another are one message. A last turn without words only asks for an answer.
    """
    before, *parts = TURN.split("\n\n" + text.lstrip())
    if before or parts[:1] != ["Human"]:
        return []
    found: list[Message] = []
    for speaker, said in zip(parts[::2], parts[1::2], strict=True):
        role, content = SPEAKERS[speaker], valid(said.strip())
        if found and found[-1]["role"] == role:
            content = f"{found.pop()['content']}\n\n{content}".strip()
        found.append({"role": role, "content": content})
    return found


def prompt_field(row: Mapping[str, Any], format_name: str, text_field: str, origin: str) -> str:
    """The name of the field with the prompt; arguments as those of read_pair. Unreadable if there is none, or if it could be several."""
    if format_name == conversations.NAMED:
        names = [text_field]
    elif format_name != "auto":
        names = [PROMPTS[format_name]]
    else:
        names = [name for name in PROMPTS.values() if name in row]
    if len(names) == 1 and names[0] in row:
        return names[0]
    what = "has no prompt" if not names else f"could have its prompt in {' or '.join(map(repr, names))}"
    if len(names) == 1:
        what = f"has no field '{names[0]}'"
    raise conversations.Unreadable(origin, f"{what}: its fields are {', '.join(row) or 'none'}")


def read_prompt(row: Mapping[str, Any], name: str, origin: str) -> list[Message]:
    """The messages of the prompt in this field of the row, and of its system field."""
    given = row[name]
    if isinstance(given, list | dict):
        messages = conversations.turns(given, "from", "value", conversations.SHAREGPT_ROLES, origin)
    elif name == PROMPTS["alpaca"]:
        messages = [conversations.message("user", conversations.instruction(row, origin), origin)]
    else:
        messages = _transcript(given) if isinstance(given, str) else []
        if messages and messages[-1] == {"role": "assistant", "content": ""}:
            messages.pop()
        messages = messages or [conversations.message("user", given, origin)]
    return conversations.with_system(messages, row, origin)


def _margin(row: Mapping[str, Any], origin: str) -> float | None:
    if row.get("margin") is not None:
        return _number(row["margin"], "margin", origin)
    scores = {name: row.get(name) for name in ("score_chosen", "score_rejected")}
    if None in scores.values():
        return None
    chosen, rejected = (_number(value, name, origin) for name, value in scores.items())
    return chosen - rejected


def _number(value: Any, name: str, origin: str) -> float:
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(
            f"{origin} has {value!r} as '{name}'.\n  Accepted: a number, by how much the chosen answer is better (margin), or how good each"
            " answer is (score_chosen, score_rejected).\n  Correct it, or rename the field if it means something else."
        )
    return number
