"""Cleaners: each one normalizes a text, or drops the document under its own name.

`data.cleaners` lists them in the order in which they run; the empty tuple leaves every text as it is, byte for byte.
"""

import re
import unicodedata
from collections.abc import Callable
from typing import NamedTuple

from ml_collections import ConfigDict

from jaxllm import registry
from jaxllm.data.documents import Document
from jaxllm.data.sources import preferences

# Text to text, or None: the document is dropped.
Clean = Callable[[str], str | None]

LINE_ENDS = re.compile("\r\n?|[\x0b\x0c\x85\u2028\u2029]")
# Soft hyphen, zero-width space, word joiner, byte order mark, object replacement and replacement character: invisible, or what a
# broken conversion left behind. The zero-width joiner and non-joiner stay: Persian, Indic scripts and emoji are spelt with them.
ODDITIES = re.compile("[\u00ad\u200b\u2060\ufeff\ufffc\ufffd\ud800-\udfff]")
CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")
BLANK_LINES = re.compile(r"\n{4,}")


# The reason why a document is dropped of which the cleaners left fewer words than it has labels.
LOST_WORDS = "words lost in cleaning"


class Dropped(NamedTuple):
    """A document that is not used, and the name of the cleaner that rejected it."""

    document: Document
    reason: str


def make(config: ConfigDict) -> Callable[[Document], Document | Dropped]:
    """Document -> the document with all of its texts cleaned, or Dropped with the document as it was read."""
    target_is_text = registry.resolve("examples", config.train.objective)(config).reads == "target"
    steps: list[tuple[str, Clean]] = [(name, registry.resolve("cleaner", name)(config)) for name in config.data.cleaners]

    def apply(text: str) -> tuple[str, str]:
        """(cleaned text, "") or (text, name of the cleaner that dropped it)."""
        for name, step in steps:
            cleaned = step(text)
            if cleaned is None:
                return text, name
            text = cleaned
        return text, ""

    def converse(document: Document) -> Document | Dropped:
        """Its messages cleaned, and its answers.

        A system message may be blank, which is to say that there is none of a template's own. What is made of a blank answer to choose
        between is said where it is left out.
        """
        turns = [*document.messages, *(message for answer in document.answers for message in answer)]
        done = [apply(message["content"]) for message in turns]
        may_be_blank = [message["role"] == "system" for message in document.messages]
        may_be_blank += [not text.strip() for text, _ in done[len(may_be_blank) :]]
        reasons = (reason for (_, reason), blank in zip(done, may_be_blank, strict=True) if not blank)
        if reason := preferences.flaw(document) or next(filter(None, reasons), ""):
            return Dropped(document, reason)
        cleaned = [{**message, "content": text} for message, (text, _) in zip(turns, done, strict=True)]
        messages, answers = cleaned[: len(document.messages)], cleaned[len(document.messages) :]
        text = "\n".join(message["content"] for message in messages)
        return document._replace(text=text, messages=tuple(messages), answers=tuple((answer,) for answer in answers))

    def clean(document: Document) -> Document | Dropped:
        if document.messages or document.answers:
            return converse(document)
        # Labels stay as they are.
        texts = {"text": document.text, "pair": document.pair, "target": document.target if target_is_text else None}
        done = {field: apply(text) for field, text in texts.items() if isinstance(text, str)}
        for _, reason in done.values():
            if reason:
                return Dropped(document, reason)
        if isinstance(document.target, tuple) and len(done["text"][0].split(" ")) != len(document.target):
            return Dropped(document, LOST_WORDS)
        return Document(**document._asdict() | {field: text for field, (text, _) in done.items()})

    return clean


def unicode(config: ConfigDict) -> Clean:
    """Canonical composition (NFC), one kind of line end, no invisible oddities."""
    del config

    def clean(text: str) -> str:
        return unicodedata.normalize("NFC", ODDITIES.sub("", LINE_ENDS.sub("\n", text)))

    return clean


def control(config: ConfigDict) -> Clean:
    """No control characters but newline and tab."""
    del config
    return lambda text: CONTROLS.sub("", text)


def whitespace(config: ConfigDict) -> Clean:
    """No spaces at line ends, at most two blank lines in a row, none around the text. Indentation stays."""
    del config

    def clean(text: str) -> str:
        lines = "\n".join(line.rstrip() for line in text.split("\n"))
        return BLANK_LINES.sub("\n\n\n", lines).strip("\n")

    return clean


def min_chars(config: ConfigDict) -> Clean:
    """Drops texts shorter than `data.min_chars` characters."""
    least = config.data.min_chars
    return lambda text: text if len(text) >= least else None
