"""Prompts whose answers the model writes itself (grpo, ppo).

A prompt is a conversation up to its last answer, as the chat template writes it where that answer begins. What the data has as the answer
is kept beside it, for rewards that compare; it is never trained. A prompt behind which the longest answer does not fit into a row is left
out, and so is one whose answer is too long to keep.

Stored, [N, T]: tokens, segments (1 where the prompt is, else 0), and [N, rl.answer_bytes]: answer, in UTF-8 and filled up with 0.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from ml_collections import ConfigDict

from jaxllm.data import pack
from jaxllm.data.chat import encoding, templates
from jaxllm.data.documents import Document, Message
from jaxllm.data.examples.contract import Array, Examples, MakeBatch, Piece, Shown, decoder_arrays, row_tokens
from jaxllm.data.shards import FLAG, Block, Column, Totals, smallest_dtype
from jaxllm.data.tokenizers.added import Added

if TYPE_CHECKING:
    from jaxllm.types import Tokenizer

ROWS_AT_ONCE = 256
TOO_LONG = "a prompt that leaves no room for rl.max_new_tokens in a row (data.row_tokens)"
LONG_ANSWER = "an answer that is longer than rl.answer_bytes"
NO_CHARACTER = "an answer with U+0000"
# What an on-policy source writes beside the tokens, float32 [B, T] each.
WRITTEN = {"grpo": ("old", "reference", "advantages")}


def make(config: ConfigDict) -> Examples:
    """Rows of one prompt each; the arrays of a batch are those of rows with several prompts and answers."""
    width, answer_bytes, new_tokens = row_tokens(config), config.rl.answer_bytes, config.rl.max_new_tokens
    longest = width + 1 - new_tokens

    def columns(vocab_size: int) -> dict[str, Column]:
        return {
            "tokens": Column(width, smallest_dtype(vocab_size - 1)),
            "segments": Column(width, FLAG),
            "answer": Column(answer_bytes, FLAG),
        }

    def rows(documents: Iterable[Document], tokenizer: "Tokenizer", labels: tuple[str, ...], totals: Totals) -> Iterator[Block]:
        del labels
        kept = _kept(documents, tokenizer, longest, answer_bytes, totals)
        for group in pack.grouped(kept, ROWS_AT_ONCE):
            block = {name: np.zeros((len(group), size), np.int32) for name, size in (("segments", width), ("answer", answer_bytes))}
            block["tokens"] = np.full((len(group), width), tokenizer.pad_id, np.int32)
            for row, (ids, answer) in enumerate(group):
                block["tokens"][row, : len(ids)] = ids
                block["segments"][row, : len(ids)] = 1
                block["answer"][row, : len(answer)] = np.frombuffer(answer, np.uint8)
                totals.weighted_tokens += new_tokens
            yield block

    recipe = {"rows": "prompts", "data.target_field": config.data.target_field, "rl.max_new_tokens": new_tokens}
    recipe |= {"rl.answer_bytes": answer_bytes, "chat.format": config.chat.format, "chat.template": config.chat.template}

    def spell(document: Document) -> list[str]:
        return templates.spell(config, document.messages)

    written = {name: Array(width, np.float32) for name in WRITTEN[config.train.objective]}
    return Examples(
        columns,
        decoder_arrays(width) | written,
        rows,
        _batch,
        _show,
        reads="messages",
        added=Added(borders=True, tokens=templates.tokens(config)),
        recipe=recipe,
        spell=spell,
    )


def prompts(stored: Mapping[str, np.ndarray]) -> list[np.ndarray]:
    """The ids of the prompts in stored rows."""
    return [ids[inside > 0] for ids, inside in zip(stored["tokens"], stored["segments"], strict=True)]


def answers(stored: Mapping[str, np.ndarray]) -> list[str]:
    """The answers that the data has to them."""
    return [row.astype(np.uint8).tobytes().rstrip(b"\0").decode() for row in stored["answer"]]


def _kept(
    documents: Iterable[Document], tokenizer: "Tokenizer", longest: int, answer_bytes: int, totals: Totals
) -> Iterator[tuple[list[int], bytes]]:
    """(ids of the prompt, answer) of each conversation that can be used; counts them and the others."""
    for document in documents:
        before, answer = _cut(document.messages)
        ids, written = encoding.encode(tokenizer, before), answer.encode()
        reasons = {TOO_LONG: len(ids) > longest, LONG_ANSWER: len(written) > answer_bytes, NO_CHARACTER: "\0" in answer}
        if reason := next((reason for reason, holds in reasons.items() if holds), ""):
            totals.dropped[reason] = totals.dropped.get(reason, 0) + 1
            continue
        pack.check_ids(np.array(ids), tokenizer)
        totals.documents += 1
        totals.tokens += len(ids)
        yield ids, written


def _cut(messages: Sequence[Message]) -> tuple[Sequence[Message], str]:
    """(what stands before the last answer, that answer)."""
    return messages[:-1], messages[-1]["content"]


def _batch(tokenizer: "Tokenizer") -> MakeBatch:
    del tokenizer

    def make_batch(stored: Mapping[str, np.ndarray], rows: np.ndarray, seed: int, step: int) -> dict[str, np.ndarray]:
        """The prompts alone, for a reader."""
        del rows, seed, step
        return dict(stored) | {"weights": np.zeros(stored["tokens"].shape, np.float32)}

    return make_batch


def _show(row: Mapping[str, np.ndarray], tokenizer: "Tokenizer", labels: tuple[str, ...]) -> Iterator[Shown]:
    """A prompt, and the answer in the data."""
    del labels
    ids = row["tokens"][row["segments"] > 0].tolist()
    yield Shown(f"prompt, {len(ids)} tokens", [Piece(tokenizer.decode(ids))])
    (answer,) = answers({"answer": row["answer"][None]})
    yield Shown("answer in the data", [Piece(answer)])
