"""Rows of a batch as a reader sees them."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import TYPE_CHECKING

import numpy as np

from jaxllm.data import tokenize
from jaxllm.data.examples.contract import Piece, Shown, spans

if TYPE_CHECKING:
    from jaxllm.types import Tokenizer

Row = Mapping[str, np.ndarray]
# The branches of a pair.
PAIR = ("chosen", "rejected")


def weighted(row: Row, tokenizer: "Tokenizer", labels: tuple[str, ...]) -> Iterator[Shown]:
    """Documents whose tokens are predicted one after the other, and which of these predictions count.

    A document's tokens are what is read of it, and behind that what is predicted last, if it counts: else nobody learns from it here.
    """
    del labels
    for number, place in spans(row["segments"]):
        counts = (row["weights"][place] > 0).tolist()
        ids = [*row["tokens"][place].tolist(), *row["targets"][place].tolist()[-1:]][: len(counts) + counts[-1]]
        trained = [False, *counts][: len(ids)]
        # A document's first token is never predicted. Where all others are, as in all of causal_lm, there is nothing to tell apart.
        whole = 1 < len(ids) == sum(trained) + 1
        yield Shown(
            f"document {number}, {len(ids)} tokens, {sum(trained)} trained", _pieces(ids, tokenizer, None if whole else trained)
        )
    yield from _padding(row)


def prefixed(row: Row, tokenizer: "Tokenizer", labels: tuple[str, ...]) -> Iterator[Shown]:
    """Each document's prefix and what is predicted after it."""
    del labels
    for number, place in spans(row["segments"]):
        prefix = row["tokens"][place][row["prefix"][place]].tolist()
        rest = row["targets"][place][row["weights"][place] > 0].tolist()
        yield Shown(f"document {number}, prefix of {len(prefix)} tokens", _pieces(prefix, tokenizer))
        yield Shown(f"document {number}, {len(rest)} tokens to predict", _pieces(rest, tokenizer))
    yield from _padding(row)


def masked(row: Row, tokenizer: "Tokenizer", labels: tuple[str, ...]) -> Iterator[Shown]:
    """Each document with its masks, and the tokens that are predicted, with what stands there if that is no mask."""
    del labels
    for number, place in spans(row["segments"]):
        tokens, targets = row["tokens"][place].tolist(), row["targets"][place].tolist()
        yield Shown(f"document {number}, {len(tokens)} tokens", _pieces(tokens, tokenizer))
        hidden = []
        for index in np.flatnonzero(row["weights"][place]).tolist():
            seen, name = tokens[index], repr(tokenizer.decode([targets[index]]))
            kept = f"{name} (kept)" if seen == targets[index] else f"{name} (shown as {tokenizer.decode([seen])!r})"
            hidden.append(name if seen == tokenizer.mask_id else kept)
        yield Shown(f"document {number}, {len(hidden)} tokens to predict", [Piece(", ".join(hidden))])
    yield from _padding(row)


def paired(row: Row, tokenizer: "Tokenizer", labels: tuple[str, ...]) -> Iterator[Shown]:
    """What the encoder reads and what the decoder is to write, an example after the other."""
    del labels
    sources = dict(spans(row["input_segments"]))
    for number, place in spans(row["segments"]):
        inputs, targets = row["inputs"][sources[number]].tolist(), row["targets"][place].tolist()
        yield Shown(f"example {number}, {len(inputs)} inputs", _pieces(inputs, tokenizer))
        yield Shown(f"example {number}, {len(targets)} tokens to predict", _pieces(targets, tokenizer))
    yield from _padding(row)


def classified(row: Row, tokenizer: "Tokenizer", labels: tuple[str, ...]) -> Iterator[Shown]:
    """A text, or two, and its class."""
    ids = row["tokens"][row["segments"] > 0].tolist()
    # An eos that is not the last token stands between the two texts of a pair.
    border = ids.index(tokenizer.eos_id) + 1 if tokenizer.eos_id in ids[:-1] else len(ids)
    second = [Piece("\n"), *_pieces(ids[border:], tokenizer)] if ids[border:] else []
    yield Shown(f"text, {len(ids)} tokens", [*_pieces(ids[:border], tokenizer), *second])
    yield Shown("class to predict", [Piece(", ".join(labels[target] for target in row["targets"][row["weights"] > 0]))])


def tagged(row: Row, tokenizer: "Tokenizer", labels: tuple[str, ...]) -> Iterator[Shown]:
    """Each text, and the classes of its words."""
    for number, place in spans(row["segments"]):
        tokens, counts = row["tokens"][place], row["weights"][place] > 0
        text = tokenizer.decode(tokens.tolist())
        classes = [labels[target] for target in row["targets"][place][counts]]
        # Where the tokenizer does not give the words back as they were, the token that has the class stands for its word.
        words = (
            text.split() if len(text.split()) == len(classes) else [tokenizer.decode([token]) for token in tokens[counts].tolist()]
        )
        yield Shown(f"text {number}, {len(tokens)} tokens", _pieces(tokens.tolist(), tokenizer))
        marks = (f"{word} {name}" for word, name in zip(words, classes, strict=True))
        yield Shown(f"text {number}, {len(classes)} classes to predict", [Piece(", ".join(marks))])
    yield from _padding(row)


def pairs(row: Row, tokenizer: "Tokenizer", labels: tuple[str, ...]) -> Iterator[Shown]:
    """Each prompt, its chosen and its rejected answer, and which of their tokens are predicted."""
    del labels
    for number, place in spans(row["segments"]):
        yield _prompt(row, place, f"pair {number}", tokenizer)
        yield from (_answer(row, place, f"pair {number}", tokenizer, branch) for branch in (1, 2))
    yield from _padding(row)


def labelled(row: Row, tokenizer: "Tokenizer", labels: tuple[str, ...]) -> Iterator[Shown]:
    """Each prompt, its answer, and the one of another example."""
    del labels
    for number, place in spans(row["segments"]):
        yield _prompt(row, place, f"example {number}", tokenizer)
        yield _answer(row, place, f"example {number}", tokenizer, 1, "good answer" if row["desirable"][place][0] else "bad answer")
        other = row["targets"][place][row["branches"][place] == 2].tolist()
        title = f"example {number}, answer of another example for the estimate of KL, {len(other)} tokens"
        yield Shown(title, _pieces(other, tokenizer, [False] * len(other)))
    yield from _padding(row)


def scored(row: Row, tokenizer: "Tokenizer", labels: tuple[str, ...]) -> Iterator[Shown]:
    """Each prompt, its chosen and its rejected answer, and where they are scored; of an encoder each answer with its prompt."""
    del labels
    for number, place in spans(row.get("pairs", row["segments"])):
        tokens, counts, branches = (row[name][place] for name in ("tokens", "weights", "branches"))
        margin = row["margins"][place][0]
        for branch, name in enumerate(("prompt", *PAIR)):
            if not (branches == branch).any():
                continue
            ids, flags = tokens[branches == branch].tolist(), (counts[branches == branch] > 0).tolist()
            better = f", better by {margin:g}" if margin and name == PAIR[0] else ""
            yield Shown(f"pair {number}, {name}, {len(ids)} tokens{better}", _pieces(ids, tokenizer, flags))
    yield from _padding(row)


def _prompt(row: Row, place: slice, title: str, tokenizer: "Tokenizer") -> Shown:
    tokens, branches = row["tokens"][place], row["branches"][place]
    # The prompt's last token stands at the beginning of each branch.
    ids = [*tokens[branches == 0].tolist(), int(tokens[branches == 1][0])]
    return Shown(f"{title}, prompt, {len(ids)} tokens", _pieces(ids, tokenizer, [False] * len(ids)))


def _answer(row: Row, place: slice, title: str, tokenizer: "Tokenizer", branch: int, name: str = "") -> Shown:
    here = row["branches"][place] == branch
    ids, flags = row["targets"][place][here].tolist(), (row["weights"][place][here] > 0).tolist()
    name = name or PAIR[branch - 1]
    return Shown(f"{title}, {name}, {len(ids)} tokens, {sum(flags)} trained", _pieces(ids, tokenizer, flags))


def _padding(row: Row) -> Iterator[Shown]:
    count = int((row["segments"] == 0).sum())
    if count:
        yield Shown(f"padding, {count} tokens", [])


def _pieces(ids: Sequence[int], tokenizer: "Tokenizer", trained: Sequence[bool] | None = None) -> list[Piece]:
    """The text of the ids, with special tokens by their names, cut where `trained` changes.

    A character that several tokens spell is not cut: it goes with the first of them. U+FFFD stands only for what the ids themselves
    have no other part of, as where a row begins inside a character.
    """
    names, text, start = tokenize.names(tokenizer, ids), tokenizer.decode(list(ids)), 0
    flags: Sequence[bool | None] = [None] * len(ids) if trained is None else trained
    pieces = []
    for (special, flag), group in groupby(range(len(ids)), lambda place: (ids[place] in names, flags[place])):
        places = list(group)
        if special:
            pieces.append(Piece("".join(names[ids[place]] for place in places), flag))
        else:
            stop = _length(ids, places[-1] + 1, text, tokenizer)
            pieces.append(Piece(text[start:stop], flag))
            start = stop
    spelled = groupby((piece for piece in pieces if piece.text), lambda piece: piece.trained)
    return [Piece("".join(piece.text for piece in group), flag) for flag, group in spelled]


def _length(ids: Sequence[int], count: int, text: str, tokenizer: "Tokenizer") -> int:
    """How long the text of the first `count` ids is in that of all, with the rest of a character whose tokens go on behind them."""
    starts = (tokenizer.decode(list(ids[:stop])) for stop in range(count, len(ids) + 1))
    return next(len(start) for start in starts if text.startswith(start))
