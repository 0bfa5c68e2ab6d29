"""Prompts whose answers the model writes itself (grpo, ppo).

A prompt is a conversation that the chat template writes up to where an answer begins. What else the data knows of it (see data/sources/
prompts.py) is kept beside it, for rewards that compare; it is never trained. A prompt behind which the longest answer does not fit into
a row is left out, and so is one with more beside it than rl.field_bytes.

Stored, [N, T]: tokens, segments (1 where the prompt is, else 0), and [N, rl.field_bytes]: fields, JSON in UTF-8 and filled up with 0.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from ml_collections import ConfigDict

from jaxllm.data import pack
from jaxllm.data.chat import encoding, templates
from jaxllm.data.documents import Document
from jaxllm.data.examples.contract import Array, Examples, MakeBatch, Piece, Shown, decoder_arrays, row_tokens
from jaxllm.data.shards import FLAG, Block, Column, Totals, smallest_dtype
from jaxllm.data.tokenizers.added import Added

if TYPE_CHECKING:
    from jaxllm.types import Tokenizer

ROWS_AT_ONCE = 256
TOO_LONG = "a prompt that leaves no room for rl.max_new_tokens in a row (data.row_tokens)"
LONG_FIELDS = "more beside a prompt than rl.field_bytes"
# What an on-policy source writes beside the tokens, float32 [B, T] each.
WRITTEN = {"grpo": ("old", "reference", "advantages"), "ppo": ("old", "advantages", "old_values", "returns")}


def make(config: ConfigDict) -> Examples:
    """Rows of one prompt each; the arrays of a batch are those of rows with several prompts and answers."""
    width, field_bytes, new_tokens = row_tokens(config), config.rl.field_bytes, config.rl.max_new_tokens
    longest = width + 1 - new_tokens

    def columns(vocab_size: int) -> dict[str, Column]:
        return {
            "tokens": Column(width, smallest_dtype(vocab_size - 1)),
            "segments": Column(width, FLAG),
            "fields": Column(field_bytes, FLAG),
        }

    def rows(documents: Iterable[Document], tokenizer: "Tokenizer", labels: tuple[str, ...], totals: Totals) -> Iterator[Block]:
        del labels
        kept = _kept(documents, tokenizer, longest, field_bytes, totals)
        for group in pack.grouped(kept, ROWS_AT_ONCE):
            block = {name: np.zeros((len(group), size), np.int32) for name, size in (("segments", width), ("fields", field_bytes))}
            block["tokens"] = np.full((len(group), width), tokenizer.pad_id, np.int32)
            for row, (ids, written) in enumerate(group):
                block["tokens"][row, : len(ids)] = ids
                block["segments"][row, : len(ids)] = 1
                block["fields"][row, : len(written)] = np.frombuffer(written, np.uint8)
                totals.weighted_tokens += new_tokens
            yield block

    recipe = {"rows": "prompts", "rl.max_new_tokens": new_tokens, "rl.field_bytes": field_bytes}
    recipe |= {"chat.format": config.chat.format, "chat.template": config.chat.template}

    def spell(document: Document) -> list[str]:
        return templates.spell(config, document.messages)

    written = {name: Array(width, np.float32) for name in WRITTEN[config.train.objective]}
    return Examples(
        columns,
        decoder_arrays(width) | written,
        rows,
        _batch,
        _show,
        reads="prompts",
        unit="prompts",
        added=Added(borders=True, tokens=templates.tokens(config)),
        recipe=recipe,
        spell=spell,
    )


def prompts(stored: Mapping[str, np.ndarray]) -> list[np.ndarray]:
    """The ids of the prompts in stored rows."""
    return [ids[inside > 0] for ids, inside in zip(stored["tokens"], stored["segments"], strict=True)]


def fields(stored: Mapping[str, np.ndarray]) -> list[dict[str, Any]]:
    """What the data knows of them besides."""
    return [json.loads(row.astype(np.uint8).tobytes().rstrip(b"\0")) for row in stored["fields"]]


def _kept(
    documents: Iterable[Document], tokenizer: "Tokenizer", longest: int, field_bytes: int, totals: Totals
) -> Iterator[tuple[list[int], bytes]]:
    """(ids of the prompt, its fields) of each that can be used; counts them and the others."""
    for document in documents:
        ids, written = encoding.encode(tokenizer, document.messages), json.dumps(document.fields, ensure_ascii=False).encode()
        reasons = {TOO_LONG: len(ids) > longest, LONG_FIELDS: len(written) > field_bytes}
        if reason := next((reason for reason, holds in reasons.items() if holds), ""):
            totals.dropped[reason] = totals.dropped.get(reason, 0) + 1
            continue
        pack.check_ids(np.array(ids), tokenizer)
        totals.documents += 1
        totals.tokens += len(ids)
        yield ids, written


def _batch(tokenizer: "Tokenizer") -> MakeBatch:
    del tokenizer

    def make_batch(stored: Mapping[str, np.ndarray], rows: np.ndarray, seed: int, step: int) -> dict[str, np.ndarray]:
        """The prompts alone, for a reader."""
        del rows, seed, step
        return dict(stored) | {"weights": np.zeros(stored["tokens"].shape, np.float32)}

    return make_batch


def _show(row: Mapping[str, np.ndarray], tokenizer: "Tokenizer", labels: tuple[str, ...]) -> Iterator[Shown]:
    """A prompt, and what the data knows of it."""
    del labels
    ids = row["tokens"][row["segments"] > 0].tolist()
    yield Shown(f"prompt, {len(ids)} tokens", [Piece(tokenizer.decode(ids))])
    (beside,) = fields({"fields": row["fields"][None]})
    yield Shown("beside it, for rewards", [Piece(json.dumps(beside, ensure_ascii=False))])
