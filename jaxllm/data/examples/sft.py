"""The answers of conversations (supervised fine-tuning).

A conversation is what the chat template writes (data/chat/), without anything added: one that chat sends to the model has the same ids.
Its trained tokens are those of chat.train_on. Several conversations share a row, each in a segment of its own; none goes on in another
row. One that is longer is cut at its end, and counted; one without a trained token, or that cannot be used otherwise, is left out by
the name of the reason.

Stored: tokens, targets, segments and weights (1 if the target is trained), all [N, T]. Padding is known by its segment 0 and its weight
0: where pad and eos are one token, the eos of an answer still counts.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from absl import logging
from ml_collections import ConfigDict

from jaxllm.data import fill, pack
from jaxllm.data.chat import answers, encoding, render, templates
from jaxllm.data.documents import Document, Message
from jaxllm.data.examples import shown
from jaxllm.data.examples.contract import Examples, MakeBatch, count_positions, decoder_arrays, row_tokens
from jaxllm.data.shards import FLAG, Block, Column, Totals, smallest_dtype
from jaxllm.data.tokenizers.added import Added

if TYPE_CHECKING:
    from jaxllm.types import Tokenizer

SHOWN_CHARS = 600
# Why a conversation is left out of which the row has no answer, and the share of all that is said to need how long a row.
TOO_LONG, MOST_FRAC = "no trained token within a row (data.row_tokens)", 0.95


def make(config: ConfigDict) -> Examples:
    """Rows of conversations."""
    width, train_on, context_tokens = row_tokens(config), config.chat.train_on, config.model.context_tokens

    def columns(vocab_size: int) -> dict[str, Column]:
        ids, segments = Column(width, smallest_dtype(vocab_size - 1)), Column(width, smallest_dtype(width))
        return {"tokens": ids, "targets": ids, "segments": segments, "weights": Column(width, FLAG)}

    def rows(documents: Iterable[Document], tokenizer: "Tokenizer", labels: tuple[str, ...], totals: Totals) -> Iterator[Block]:
        del labels
        lengths = _Lengths(width, context_tokens)
        sides = ((side,) for side in _conversations(documents, tokenizer, train_on, lengths, totals))
        for block in fill.fill(sides, (width,), ("segments",), 0):
            padding = block["segments"] == 0
            yield block | {name: np.where(padding, tokenizer.pad_id, block[name]) for name in ("tokens", "targets")}

    recipe = {"rows": "sft", "data.target_field": config.data.target_field}
    recipe |= {f"chat.{name}": config.chat[name] for name in ("format", "template", "train_on")}

    def spell(document: Document) -> list[str]:
        return templates.spell(config, document.messages)

    return Examples(
        columns,
        decoder_arrays(width),
        rows,
        _batch,
        shown.weighted,
        reads="messages",
        added=Added(borders=True, tokens=templates.tokens(config)),
        recipe=recipe,
        spell=spell,
    )


class _Lengths:
    """What rows of `width` tokens would have to hold for conversations to stay whole."""

    def __init__(self, width: int, context_tokens: int):
        self.width = width
        self._context_tokens = context_tokens
        self._needed: list[int] = []

    def add(self, ids: int) -> None:
        """Counts a conversation of so many ids, of which a row has all but the last one."""
        self._needed.append(ids - 1)

    def __str__(self) -> str:
        most = int(np.quantile(self._needed, MOST_FRAC, method="inverted_cdf"))
        limit = ", as many as model.context_tokens allows" if self.width == self._context_tokens else ""
        return (
            f"to be whole, the longest conversation needs rows of {max(self._needed):,} tokens, and {MOST_FRAC:.0%} of them need"
            f" {most:,} or fewer; data.row_tokens is {self.width:,}{limit}"
        )


def _conversations(
    documents: Iterable[Document], tokenizer: "Tokenizer", train_on: str, lengths: _Lengths, totals: Totals
) -> Iterator[fill.Side]:
    encode, width = answers.make(tokenizer, train_on), lengths.width
    resplit = 0
    refused: tuple[Document, str] | None = None
    for document in documents:
        try:
            found = encode(document.messages)
            lengths.add(len(found.ids))
            weights = found.trained[1 : width + 1]
            if not weights.any():
                raise answers.Refused(TOO_LONG if found.trained.any() else "no trained token")
        except answers.Refused as error:
            totals.dropped[str(error)] = totals.dropped.get(str(error), 0) + 1
            refused = refused or (document, str(error))
            continue
        pack.check_ids(found.ids, tokenizer)
        ids = found.ids[: width + 1]
        resplit += found.resplit
        totals.documents += 1
        totals.tokens += len(ids)
        totals.weighted_tokens += int(weights.sum())
        totals.cut += len(ids) < len(found.ids)
        yield {"tokens": ids[:-1], "targets": ids[1:], "weights": weights.astype(np.int32)}
    count = totals.documents + sum(totals.dropped.values())
    if refused is not None and sum(totals.dropped.values()) * 2 > count:
        raise ValueError(_mostly_refused(tokenizer, totals, count, lengths, *refused))
    if train_on != "all" and totals.documents and totals.weighted_tokens == totals.tokens - totals.documents:
        raise ValueError(_all_trained(train_on, totals))
    if totals.cut or TOO_LONG in totals.dropped:
        logging.warning(
            "%d of %d conversations are longer than a row: %s", totals.cut + totals.dropped.get(TOO_LONG, 0), count, lengths
        )
    if resplit:
        logging.warning(
            "in %d of %d conversations what stands before an answer is split into other tokens by itself, as chat sends it: the model"
            " meets other ids there than in training. Another chat.template may not have that.",
            resplit,
            count,
        )


def _mostly_refused(tokenizer: "Tokenizer", totals: Totals, count: int, lengths: _Lengths, document: Document, reason: str) -> str:
    reasons = "\n".join(f"    {number:,} x {name}" for name, number in totals.dropped.items())
    if TOO_LONG in totals.dropped:
        reasons += f"\n    {lengths}"
    said = (
        f"{sum(totals.dropped.values()):,} of {count:,} conversations cannot be used:\n{reasons}\n"
        f"  The first one, {document.origin}, for the reason '{reason}':\n{_example(tokenizer, document.messages)}\n"
    )
    if set(totals.dropped) == {TOO_LONG}:
        return (
            f"{said}  Accepted: conversations of which an answer begins within data.row_tokens.\n"
            "  Raise data.row_tokens, up to model.context_tokens, or shorten what stands before the answers."
        )
    return (
        f"{said}  Accepted: conversations that the chat template writes the same way as they grow, with a token that ends each answer, an"
        " answer of which begins within data.row_tokens.\n"
        "  Set another chat.template (a named one marks its answers), raise data.row_tokens, or correct the data."
    )


def _all_trained(train_on: str, totals: Totals) -> str:
    return (
        f"every token of the {totals.documents:,} conversations is trained, with chat.train_on = '{train_on}': the chat template"
        " writes nothing but answers.\n  Accepted: a template that also writes the questions; chat.train_on=all for all tokens.\n"
        "  Set another chat.template, or chat.train_on."
    )


def _example(tokenizer: "Tokenizer", messages: Sequence[Message]) -> str:
    """The conversation as the template writes it, or as it is."""
    try:
        text = render.render(encoding.require(tokenizer).template, messages, add_generation_prompt=False)
    except ValueError:
        text = "\n".join(f"{message['role']}: {message['content']}" for message in messages)
    text = text if len(text) <= SHOWN_CHARS else text[:SHOWN_CHARS] + " ..."
    return "\n".join(f"    {line}" for line in text.split("\n"))


def _batch(tokenizer: "Tokenizer") -> MakeBatch:
    del tokenizer

    def make_batch(stored: Mapping[str, np.ndarray], rows: np.ndarray, seed: int, step: int) -> dict[str, np.ndarray]:
        del rows, seed, step
        return {
            "tokens": stored["tokens"],
            "targets": stored["targets"],
            "segments": stored["segments"],
            "positions": count_positions(stored["segments"]),
            "weights": stored["weights"].astype(np.float32),
        }

    return make_batch
