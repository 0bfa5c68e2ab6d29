"""Prompts with two answers, of which one is preferred (pairs), and with one that was called good or bad (labelled); as forked rows.

A conversation is what the chat template writes, as in sft.py; the answer is its last message up to the token that ends it, and the
prompt is all before it. Examples share rows by best fit, each in a segment of its own (forked.py). None is cut: what does not fit is
left out.

Stored, all [N, T]: tokens, targets, segments, branches and weights (1 if the target is an answer's). Besides these
    pairs      branch 1 is the chosen answer, 2 the rejected one.
    scored     pairs for a reward model: the weight 1 stands at the last token of each branch, which is the one that ends the answer, and
               margins (float32, stored by its bits) holds by how much chosen is better at all tokens of the pair; 0 if nothing says it.
               An encoder's tokens see those behind them, and branches would not keep the answers apart: there each branch is the prompt
               with its answer, a segment of its own in a batch (pair k has the segments 2k - 1 and 2k, and k is in the array pairs), and
               the weight 1 stands at its first token.
    labelled   branch 1 is the answer, and desirable is 1 at all tokens of a good one's segment, else 0. Branch 2 is the answer of another
               example, from which KTO estimates how far the model is from the reference (Ethayarajh et al. 2024, arXiv:2402.01306, section
               4.1, z_0): the one before it, as if they stood in a circle, which gives each answer to the next prompt. Where that has the
               same prompt, its answer is no other prompt's, and the nearest example before it with another prompt takes its place.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from jaxllm.data import fill, pack
from jaxllm.data.chat import answers, templates
from jaxllm.data.documents import Document
from jaxllm.data.examples import forked, shown
from jaxllm.data.examples.contract import Array, Examples, MakeBatch, Show, count_positions, decoder_arrays, row_tokens
from jaxllm.data.examples.left_out import LeftOut, Words
from jaxllm.data.examples.sequence_classification import ENCODERS
from jaxllm.data.shards import FLAG, Block, Column, Totals, smallest_dtype
from jaxllm.data.tokenizers.added import Added

if TYPE_CHECKING:
    from jaxllm.types import Tokenizer

LONG_PROMPT = "a prompt longer than the row (data.row_tokens)"
LONG = {"pairs": "a pair longer than the row (data.row_tokens)", "answers": "longer than the row with its prompt (data.row_tokens)"}
IDENTICAL, EMPTY = "chosen and rejected are identical", "an empty answer"


class Prompted(NamedTuple):
    """The ids of a prompt with each of its answers, up to their ends, and which of these are an answer's. The first `prompt_tokens` of all
    are the same, and none of them is an answer's."""

    document: Document
    ids: list[np.ndarray]
    trained: list[np.ndarray]
    prompt_tokens: int
    resplit: bool

    @property
    def length(self) -> int:
        """Places of a row that they take where the answers are predicted."""
        return self.prompt_tokens - 1 + sum(len(ids) - self.prompt_tokens for ids in self.ids)


def make_pairs(config: ConfigDict) -> Examples:
    """Rows of pairs whose answers are predicted."""
    return _examples(config, "pairs", {}, _pairs, shown.pairs)


def make_scored(config: ConfigDict) -> Examples:
    """Rows of pairs whose answers are scored."""
    margins = {"margins": np.dtype(np.uint32)}
    if config.model.name not in ENCODERS:
        return _examples(config, "scored", margins, _scored, shown.scored)
    made = _examples(config, "scored_apart", margins, _scored_apart, shown.scored)
    return replace(made, arrays={**made.arrays, "pairs": Array(row_tokens(config), np.int32)}, batch=_batch_apart)


def make_labelled(config: ConfigDict) -> Examples:
    """Rows of answers that are good or bad, each with another one behind the same prompt."""
    return _examples(config, "labelled", {"desirable": FLAG}, _labelled, shown.labelled)


# (examples that can be used, width of a row) -> the segment of each.
MakeSides = Callable[[Iterable[Prompted], int], Iterator[dict[str, np.ndarray]]]


def _examples(config: ConfigDict, rows_name: str, more: Mapping[str, np.dtype], make_sides: MakeSides, show: Show) -> Examples:
    width, context_tokens = row_tokens(config), config.model.context_tokens
    unit = "answers" if rows_name == "labelled" else "pairs"

    def places(found: Prompted) -> int:
        """Of a row, for the example and what it needs besides: the prompt's last token in the trunk, or a first one of another answer."""
        return sum(map(len, found.ids)) if rows_name == "scored_apart" else found.length + (rows_name != "pairs")

    def columns(vocab_size: int) -> dict[str, Column]:
        ids, segments = Column(width, smallest_dtype(vocab_size - 1)), Column(width, smallest_dtype(width))
        flags = {name: Column(width, FLAG) for name in ("weights", "branches")}
        return (
            {"tokens": ids, "targets": ids, "segments": segments}
            | flags
            | {name: Column(width, kind) for name, kind in more.items()}
        )

    def rows(documents: Iterable[Document], tokenizer: "Tokenizer", labels: tuple[str, ...], totals: Totals) -> Iterator[Block]:
        del labels
        left_out = LeftOut(_words(unit), tokenizer, width, context_tokens, totals)
        examples = _usable(documents, tokenizer, left_out, places, LONG[unit])
        for block in fill.fill(_counted(make_sides(examples, width), totals), (width,), ("segments",), 0):
            padding = block["segments"] == 0
            yield block | {name: np.where(padding, tokenizer.pad_id, block[name]) for name in ("tokens", "targets")}

    def spell(document: Document) -> list[str]:
        first, *others = ([*document.messages, *answer] for answer in document.answers)
        return [*templates.spell(config, first), *(messages[-1]["content"] for messages in others)]

    # The fields that may name what is read (sources/fields.py).
    named = {f"data.{name}": config.data[name] for name in ("text_field", "target_field")}
    kinds = {"margins": np.float32, "desirable": np.int32}
    return Examples(
        columns,
        decoder_arrays(width) | {"branches": Array(width, np.int32)} | {name: Array(width, kinds[name]) for name in more},
        rows,
        partial(_batch, tuple(more)),
        show,
        reads="labelled" if unit == "answers" else "pairs",
        unit=unit,
        added=Added(borders=True, tokens=templates.tokens(config)),
        recipe={"rows": rows_name} | named | {f"chat.{name}": config.chat[name] for name in ("format", "template")},
        spell=spell,
    )


def _words(unit: str) -> Words:
    return Words(
        unit.removesuffix("s"),
        unit,
        (LONG_PROMPT, LONG[unit]),
        "answers that are not empty, chosen and rejected ones that differ, behind a prompt that the chat template writes the same way with"
        " each of them, with a token that ends each answer, all within data.row_tokens",
        "Set another chat.template (a named one marks its answers), raise data.row_tokens, or correct the data",
        (
            "a prompt with its answers within data.row_tokens",
            "Raise data.row_tokens, up to model.context_tokens, or leave out what is too long",
        ),
    )


def _counted(sides: Iterable[dict[str, np.ndarray]], totals: Totals) -> Iterator[tuple[fill.Side]]:
    for side in sides:
        totals.tokens += len(side["tokens"])
        totals.weighted_tokens += int(side["weights"].sum())
        yield (side,)


def _usable(
    documents: Iterable[Document], tokenizer: "Tokenizer", left_out: LeftOut, places: Callable[[Prompted], int], too_long: str
) -> Iterator[Prompted]:
    """Those of the documents that a row has room for. Checks in the end that they are not too few."""
    encode, resplit = answers.make(tokenizer, "last"), 0
    for document in documents:
        try:
            found = prompted(document, encode)
            needs = places(found)
            left_out.need(needs)
            if needs > left_out.width:
                room = left_out.width - (needs - found.length)
                raise answers.Refused(LONG_PROMPT if found.prompt_tokens > room else too_long)
        except answers.Refused as error:
            left_out.add(document, str(error))
            continue
        for ids in found.ids:
            pack.check_ids(ids, tokenizer)
        resplit += found.resplit
        left_out.totals.documents += 1
        yield found
    left_out.check()
    answers.warn_resplit(resplit, left_out.count, "prompts with answers")


def prompted(document: Document, encode: answers.Encode) -> Prompted:
    """The prompt of a document with each of its answers as ids; answers.Refused if it cannot be used."""
    if not all(answer[-1]["content"].strip() for answer in document.answers):
        raise answers.Refused(EMPTY)
    found = [encode([*document.messages, *answer]) for answer in document.answers]
    if not all(each.trained.any() for each in found):
        raise answers.Refused("no trained token")
    stops = [int(np.flatnonzero(each.trained)[-1]) + 1 for each in found]
    ids = [each.ids[:stop] for each, stop in zip(found, stops, strict=True)]
    trained = [each.trained[:stop] for each, stop in zip(found, stops, strict=True)]
    if len(ids) == 2 and np.array_equal(ids[0], ids[1]):
        raise answers.Refused(IDENTICAL)
    # Where an answer is one token with what stands before it, the prompts with either are the same only up to that.
    limit = min(int(each.argmax()) for each in trained)
    differ = np.any([each[:limit] != ids[0][:limit] for each in ids], axis=0)
    prompt_tokens = int(differ.argmax()) if differ.any() else limit
    if not prompt_tokens:
        raise answers.Refused("no token before the answer")
    return Prompted(document, ids, trained, prompt_tokens, any(each.resplit for each in found))


def _pairs(examples: Iterable[Prompted], width: int) -> Iterator[dict[str, np.ndarray]]:
    del width
    for found in examples:
        yield forked.predicted(found.ids, found.trained, found.prompt_tokens)


def _scored(examples: Iterable[Prompted], width: int) -> Iterator[dict[str, np.ndarray]]:
    del width
    for found in examples:
        yield _with_margin(forked.read(found.ids, found.prompt_tokens), found.document)


def _scored_apart(examples: Iterable[Prompted], width: int) -> Iterator[dict[str, np.ndarray]]:
    del width
    for found in examples:
        yield _with_margin(forked.apart(found.ids), found.document)


def _with_margin(side: dict[str, np.ndarray], document: Document) -> dict[str, np.ndarray]:
    margin = np.array(document.score or 0, np.float32)
    return side | {"margins": np.full(len(side["tokens"]), margin.view(np.int32))}


def _labelled(examples: Iterable[Prompted], width: int) -> Iterator[dict[str, np.ndarray]]:
    for found, other in mismatched(examples):
        prompt, room = found.prompt_tokens, width - found.length
        # The end of an answer that is too long is cut: what is estimated from it is a mean over examples, and no example is lost.
        behind = slice(other.prompt_tokens, other.prompt_tokens + room)
        ids = [*found.ids, np.concatenate([found.ids[0][:prompt], other.ids[0][behind]])]
        trained = [*found.trained, np.concatenate([found.trained[0][:prompt], other.trained[0][behind]])]
        side = forked.predicted(ids, trained, prompt)
        yield side | {"desirable": np.full(len(side["tokens"]), int(found.document.score or 0))}


def mismatched(examples: Iterable[Prompted]) -> Iterator[tuple[Prompted, Prompted]]:
    """Each example, and the nearest one before it that has another prompt; before the first stands the last. ValueError if none has."""
    first: list[Prompted] = []  # those before which no other prompt has come
    last: Prompted | None = None
    other: Prompted | None = None
    for example in examples:
        if last is not None and last.document.messages != example.document.messages:
            other = last
        if other is None:
            first.append(example)
        else:
            yield example, other
        last = example
    if first and last is not None and last.document.messages != first[0].document.messages:
        other = last
    if first and other is None:
        raise ValueError(
            f"all {len(first):,} answers that can be used have one and the same prompt, {first[0].document.origin}: there is no answer to"
            " another one, by which train.objective = 'kto' tells how far the model is from the reference.\n"
            "  Accepted: answers to two prompts or more, in the training data and in what is held out.\n"
            "  Give more data, raise data.validation_frac, or set data.validation_source."
        )
    yield from ((example, other) for example in first if other is not None)


def _batch(more: tuple[str, ...], tokenizer: "Tokenizer") -> MakeBatch:
    del tokenizer

    def make_batch(stored: Mapping[str, np.ndarray], rows: np.ndarray, seed: int, step: int) -> dict[str, np.ndarray]:
        del rows, seed, step
        batch = {name: stored[name] for name in ("tokens", "targets", "segments", "branches", *more)}
        if "margins" in more:
            batch["margins"] = stored["margins"].view(np.float32)
        positions = forked.positions(stored["segments"], stored["branches"])
        return batch | {"positions": positions, "weights": stored["weights"].astype(np.float32)}

    return make_batch


def _batch_apart(tokenizer: "Tokenizer") -> MakeBatch:
    """Each answer with its prompt is a segment."""
    make = _batch(("margins",), tokenizer)

    def make_batch(stored: Mapping[str, np.ndarray], rows: np.ndarray, seed: int, step: int) -> dict[str, np.ndarray]:
        batch = make(stored, rows, seed, step)
        pairs = batch["segments"].astype(np.int32)
        segments = np.where(pairs > 0, 2 * pairs - (batch["branches"] == 1), 0)
        return batch | {"pairs": pairs, "segments": segments, "positions": count_positions(segments)}

    return make_batch
