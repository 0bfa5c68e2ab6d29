"""What is left out of the rows, counted by its reason, and the error where that is most of the data."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from absl import logging

from jaxllm.data.chat import encoding, render
from jaxllm.data.documents import Document, Message
from jaxllm.data.shards import Totals

if TYPE_CHECKING:
    from jaxllm.types import Tokenizer

SHOWN_CHARS = 600
# The share of all that is said to need how long a row.
MOST_FRAC = 0.95


class Words(NamedTuple):
    """What is packed, and how an error speaks of it.

    one, many: its name. too_long: reasons that longer rows would take away.
    accepted, change: the last lines of the error; only_too_long: the same two where rows are too short and nothing else is wrong.
    """

    one: str
    many: str
    too_long: tuple[str, ...]
    accepted: str
    change: str
    only_too_long: tuple[str, str]


class LeftOut:
    """Counts what goes into rows of `width` tokens, and what does not, in `totals`."""

    def __init__(self, words: Words, tokenizer: "Tokenizer", width: int, context_tokens: int, totals: Totals):
        self._words, self._tokenizer, self.totals = words, tokenizer, totals
        self.width, self._context_tokens = width, context_tokens
        self._needed: list[int] = []
        self._first: tuple[Document, str] | None = None

    @property
    def count(self) -> int:
        """Documents so far, used or not."""
        return self.totals.documents + sum(self.totals.dropped.values())

    def need(self, tokens: int) -> None:
        """Counts the tokens that a document needs of a row to stay whole."""
        self._needed.append(tokens)

    def add(self, document: Document, reason: str) -> None:
        """Leaves the document out."""
        self.totals.dropped[reason] = self.totals.dropped.get(reason, 0) + 1
        self._first = self._first or (document, reason)

    def check(self) -> None:
        """ValueError, with the first one as an example, if more was left out than used. Warns of what is longer than a row."""
        words, totals = self._words, self.totals
        if self._first is not None and sum(totals.dropped.values()) * 2 > self.count:
            raise ValueError(self._mostly(*self._first))
        if too_long := totals.cut + sum(totals.dropped.get(reason, 0) for reason in words.too_long):
            logging.warning("%d of %d %s are longer than a row: %s", too_long, self.count, words.many, self._lengths())

    def _lengths(self) -> str:
        """What rows would have to hold for everything to stay whole."""
        most = int(np.quantile(self._needed, MOST_FRAC, method="inverted_cdf"))
        limit = ", as many as model.context_tokens allows" if self.width == self._context_tokens else ""
        return (
            f"to be whole, the longest {self._words.one} needs rows of {max(self._needed):,} tokens, and {MOST_FRAC:.0%} of them need"
            f" {most:,} or fewer; data.row_tokens is {self.width:,}{limit}"
        )

    def _mostly(self, document: Document, reason: str) -> str:
        words, dropped = self._words, self.totals.dropped
        reasons = "\n".join(f"    {number:,} x {name}" for name, number in dropped.items())
        if set(words.too_long) & set(dropped):
            reasons += f"\n    {self._lengths()}"
        accepted, change = words.only_too_long if set(dropped) <= set(words.too_long) else (words.accepted, words.change)
        return (
            f"{sum(dropped.values()):,} of {self.count:,} {words.many} cannot be used:\n{reasons}\n"
            f"  The first one, {document.origin}, for the reason '{reason}':\n{_example(self._tokenizer, document)}\n"
            f"  Accepted: {accepted}.\n  {change}."
        )


def _example(tokenizer: "Tokenizer", document: Document) -> str:
    """The conversation, or each answer to the prompt with it, as the template writes it, or as it is."""
    answers = document.answers or ((),)
    return "\n".join(_rendered(tokenizer, [*document.messages, *answer]) for answer in answers)


def _rendered(tokenizer: "Tokenizer", messages: Sequence[Message]) -> str:
    try:
        text = render.render(encoding.require(tokenizer).template, messages, add_generation_prompt=False)
    except ValueError:
        text = "\n".join(f"{message['role']}: {message['content']}" for message in messages)
    text = text if len(text) <= SHOWN_CHARS else text[:SHOWN_CHARS] + " ..."
    return "\n".join(f"    {line}" for line in text.split("\n"))
