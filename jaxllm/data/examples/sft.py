"""The answers of conversations (supervised fine-tuning).

A conversation is what the chat template writes (data/chat/), without anything added: one that chat sends to the model has the same ids.
Its trained tokens are those of chat.train_on. Several conversations share a row, each in a segment of its own; none goes on in another
row. One that is longer is cut at its end, and counted; one without a trained token, or that cannot be used otherwise, is left out by
the name of the reason.

Stored: tokens, targets, segments and weights (1 if the target is trained), all [N, T]. Padding is known by its segment 0 and its weight
0: where pad and eos are one token, the eos of an answer still counts.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

import numpy as np
from ml_collections import ConfigDict

from jaxllm.data import fill, pack
from jaxllm.data.chat import answers, templates
from jaxllm.data.documents import Document
from jaxllm.data.examples import shown
from jaxllm.data.examples.contract import Examples, MakeBatch, count_positions, decoder_arrays, row_tokens
from jaxllm.data.examples.left_out import LeftOut, Words
from jaxllm.data.shards import FLAG, Block, Column, Totals, smallest_dtype
from jaxllm.data.tokenizers.added import Added

if TYPE_CHECKING:
    from jaxllm.types import Tokenizer

# Why a conversation is left out of which the row has no answer.
TOO_LONG = "no trained token within a row (data.row_tokens)"
WORDS = Words(
    "conversation",
    "conversations",
    (TOO_LONG,),
    "conversations that the chat template writes the same way as they grow, with a token that ends each answer, an answer of which begins"
    " within data.row_tokens",
    "Set another chat.template (a named one marks its answers), raise data.row_tokens, or correct the data",
    (
        "conversations of which an answer begins within data.row_tokens",
        "Raise data.row_tokens, up to model.context_tokens, or shorten what stands before the answers",
    ),
)


def make(config: ConfigDict) -> Examples:
    """Rows of conversations."""
    width, train_on, context_tokens = row_tokens(config), config.chat.train_on, config.model.context_tokens

    def columns(vocab_size: int) -> dict[str, Column]:
        ids, segments = Column(width, smallest_dtype(vocab_size - 1)), Column(width, smallest_dtype(width))
        return {"tokens": ids, "targets": ids, "segments": segments, "weights": Column(width, FLAG)}

    def rows(documents: Iterable[Document], tokenizer: "Tokenizer", labels: tuple[str, ...], totals: Totals) -> Iterator[Block]:
        del labels
        sides = ((side,) for side in _conversations(documents, tokenizer, train_on, width, context_tokens, totals))
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


def _conversations(
    documents: Iterable[Document], tokenizer: "Tokenizer", train_on: str, width: int, context_tokens: int, totals: Totals
) -> Iterator[fill.Side]:
    encode, left_out = answers.make(tokenizer, train_on), LeftOut(WORDS, tokenizer, width, context_tokens, totals)
    resplit = 0
    for document in documents:
        try:
            found = encode(document.messages)
            left_out.need(len(found.ids) - 1)  # a row has all but the last one
            weights = found.trained[1 : width + 1]
            if not weights.any():
                raise answers.Refused(TOO_LONG if found.trained.any() else "no trained token")
        except answers.Refused as error:
            left_out.add(document, str(error))
            continue
        pack.check_ids(found.ids, tokenizer)
        ids = found.ids[: width + 1]
        resplit += found.resplit
        totals.documents += 1
        totals.tokens += len(ids)
        totals.weighted_tokens += int(weights.sum())
        totals.cut += len(ids) < len(found.ids)
        yield {"tokens": ids[:-1], "targets": ids[1:], "weights": weights.astype(np.int32)}
    left_out.check()
    if train_on != "all" and totals.documents and totals.weighted_tokens == totals.tokens - totals.documents:
        raise ValueError(_all_trained(train_on, totals))
    answers.warn_resplit(resplit, left_out.count, WORDS.many)


def _all_trained(train_on: str, totals: Totals) -> str:
    return (
        f"every token of the {totals.documents:,} conversations is trained, with chat.train_on = '{train_on}': the chat template"
        " writes nothing but answers.\n  Accepted: a template that also writes the questions; chat.train_on=all for all tokens.\n"
        "  Set another chat.template, or chat.train_on."
    )


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
