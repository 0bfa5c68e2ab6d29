"""Conversations as text: runs the chat template of a tokenizer, a Jinja program that came with the weights, in a sandbox.

What a template writes is the whole text, bos included where it wants one. Training data and prompts are made by the same call.
"""

import functools
import json
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NamedTuple, NoReturn

from jaxllm.data.documents import Message
from jaxllm.data.tokenizers.chat_template import ChatTemplate

# {% generation %} writes these around what it marks, and nobody else does: Unicode keeps the two for use inside of a program
# (noncharacters), so no text that is passed on has them.
BEGIN, END = "\ufdd0", "\ufdd1"
MARKS = re.compile(f"[{BEGIN}{END}]")
TAG = re.compile(r"{%-?\+?\s*generation\b")


class Rendered(NamedTuple):
    """spans: (start, stop) in `text` of what {% generation %} marks, in order."""

    text: str
    spans: tuple[tuple[int, int], ...]


def marks_answers(template: ChatTemplate) -> bool:
    """Whether the template says by {% generation %} what the assistant wrote."""
    return TAG.search(template.text) is not None


def render(template: ChatTemplate, messages: Sequence[Message], *, add_generation_prompt: bool = True) -> str:
    """The conversation as one text, with the beginning of the next answer unless `add_generation_prompt` is False.

    As transformers renders it: same settings of Jinja, same functions. ValueError for messages that are none, and for what the
    template refuses.
    """
    return marked(template, messages, add_generation_prompt=add_generation_prompt).text


def marked(template: ChatTemplate, messages: Sequence[Message], *, add_generation_prompt: bool) -> Rendered:
    """As `render`, with the places that the template marks."""
    _check_messages(messages)
    try:
        # Templates ask whether there are tools and documents, some of them by `is not none`.
        options = {"tools": None, "documents": None, "add_generation_prompt": add_generation_prompt}
        written = _program(template.text).render(messages=messages, **options, **template.names)
    except _NoJinja:
        raise
    except Exception as error:
        # A template is a program of somebody else: what it raises is not known beforehand.
        raise ValueError(
            f"the chat template of the model does not accept this conversation: {error}.\n  Accepted: what its authors meant, mostly an"
            " optional system message, then user and assistant in turn.\n  Change the messages; a model without system messages"
            " wants them in the first user message."
        ) from error
    return _without_marks(written)


def _without_marks(written: str) -> Rendered:
    parts, spans = [], []
    place = begun = before = 0
    for mark in MARKS.finditer(written):
        parts.append(written[before : mark.start()])
        place, before = place + mark.start() - before, mark.end()
        if mark[0] == BEGIN:
            begun = place
        elif begun < place:
            spans.append((begun, place))
    return Rendered("".join([*parts, written[before:]]), tuple(spans))


class _NoJinja(ValueError):
    """The package jinja2 is missing."""


@functools.lru_cache(maxsize=16)
def _program(text: str) -> Any:
    return _environment().from_string(text)


def _environment() -> Any:
    """Jinja as templates expect it."""
    try:
        import jinja2  # noqa: PLC0415
        from jinja2 import ext, sandbox  # noqa: PLC0415
    except ImportError as error:
        raise _NoJinja(
            "a chat template needs the package jinja2, which is not installed.\n  Accepted: generating text without one.\n"
            "  Run: pip install 'jaxllm[hf]'"
        ) from error

    class Generation(ext.Extension):
        """{% generation %} marks for training what the assistant said; it changes no text."""

        tags = {"generation"}

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            before, after = (jinja2.nodes.Output([jinja2.nodes.TemplateData(mark)]) for mark in (BEGIN, END))
            return [before, *body, after]

    def refuse(message: str) -> NoReturn:
        raise jinja2.TemplateError(message)

    def to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)

    environment = sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, ext.loopcontrols]
    )
    environment.filters["tojson"] = to_json
    environment.globals |= {"raise_exception": refuse, "strftime_now": lambda layout: datetime.now().strftime(layout)}
    return environment


def _check_messages(messages: Sequence[Message]) -> None:
    for message in messages:
        texts = isinstance(message, Mapping) and all(isinstance(message.get(key), str) for key in ("role", "content"))
        if not texts:
            raise ValueError(
                f"{message!r} is no message.\n  Accepted: {{'role': 'user', 'content': 'text'}}; roles are system, user and assistant."
                "\n  Write the conversation as a list of these."
            )
        if found := MARKS.search(message["content"]):
            raise ValueError(
                f"a message of the {message['role']} contains U+{ord(found[0]):04X}, which is no character.\n  Accepted: text.\n"
                "  Remove it."
            )
    if not messages:
        raise ValueError("no message.\n  Accepted: a list of one or more.\n  Begin with {'role': 'user', 'content': 'text'}.")
