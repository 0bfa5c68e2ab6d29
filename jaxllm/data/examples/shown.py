"""Rows of a batch as a reader sees them."""

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import numpy as np

from jaxllm.data.examples.contract import Shown, spans

if TYPE_CHECKING:
    from jaxllm.types import Tokenizer

Row = Mapping[str, np.ndarray]


def continued(row: Row, tokenizer: "Tokenizer", labels: tuple[str, ...]) -> Iterator[Shown]:
    """Documents whose tokens are predicted one after the other, with what follows the row's last token."""
    del labels
    for number, place in spans(row["segments"]):
        ids = [*row["tokens"][place].tolist(), *row["targets"][place].tolist()[-1:]]
        # The last target belongs to the document if it counts, else it starts the next one.
        ids = ids if row["weights"][place][-1] else ids[:-1]
        yield Shown(f"document {number}, {len(ids)} tokens", tokenizer.decode(ids))
    last = int(row["targets"][-1])
    if row["segments"][-1] > 0 and not row["weights"][-1]:
        yield Shown(f"document {int(row['segments'][-1]) + 1}, 1 token", tokenizer.decode([last]))
    yield from _padding(row)


def conversed(row: Row, tokenizer: "Tokenizer", labels: tuple[str, ...]) -> Iterator[Shown]:
    """Conversations, with what follows the last token that the model reads of each."""
    del labels
    for number, place in spans(row["segments"]):
        ids = [*row["tokens"][place].tolist(), int(row["targets"][place][-1])]
        trained = int(row["weights"][place].sum())
        yield Shown(f"conversation {number}, {len(ids)} tokens, {trained} of them trained", tokenizer.decode(ids))
    yield from _padding(row)


def prefixed(row: Row, tokenizer: "Tokenizer", labels: tuple[str, ...]) -> Iterator[Shown]:
    """Each document's prefix and what is predicted after it."""
    del labels
    for number, place in spans(row["segments"]):
        prefix = row["tokens"][place][row["prefix"][place]].tolist()
        rest = row["targets"][place][row["weights"][place] > 0].tolist()
        yield Shown(f"document {number}, prefix of {len(prefix)} tokens", tokenizer.decode(prefix))
        yield Shown(f"document {number}, {len(rest)} tokens to predict", tokenizer.decode(rest))
    yield from _padding(row)


def masked(row: Row, tokenizer: "Tokenizer", labels: tuple[str, ...]) -> Iterator[Shown]:
    """Each document with its masks, and the tokens that are predicted, with what stands there if that is no mask."""
    del labels
    for number, place in spans(row["segments"]):
        tokens, targets = row["tokens"][place].tolist(), row["targets"][place].tolist()
        yield Shown(f"document {number}, {len(tokens)} tokens", _with_masks(tokens, tokenizer))
        hidden = []
        for index in np.flatnonzero(row["weights"][place]).tolist():
            seen, name = tokens[index], repr(tokenizer.decode([targets[index]]))
            kept = f"{name} (kept)" if seen == targets[index] else f"{name} (shown as {tokenizer.decode([seen])!r})"
            hidden.append(name if seen == tokenizer.mask_id else kept)
        yield Shown(f"document {number}, {len(hidden)} tokens to predict", ", ".join(hidden))
    yield from _padding(row)


def _with_masks(ids: list[int], tokenizer: "Tokenizer") -> str:
    """The text with [MASK] where a mask is, which `decode` leaves out."""
    text, shown, start = tokenizer.decode(ids), "", 0
    for index in (place for place, token in enumerate(ids) if token == tokenizer.mask_id):
        stop = len(tokenizer.decode(ids[:index]))
        shown, start = f"{shown}{text[start:stop]}[MASK]", stop
    return shown + text[start:]


def paired(row: Row, tokenizer: "Tokenizer", labels: tuple[str, ...]) -> Iterator[Shown]:
    """What the encoder reads and what the decoder is to write, an example after the other."""
    del labels
    sources = dict(spans(row["input_segments"]))
    for number, place in spans(row["segments"]):
        inputs, targets = row["inputs"][sources[number]].tolist(), row["targets"][place].tolist()
        yield Shown(f"example {number}, {len(inputs)} inputs", tokenizer.decode(inputs))
        yield Shown(f"example {number}, {len(targets)} tokens to predict", tokenizer.decode(targets))
    yield from _padding(row)


def classified(row: Row, tokenizer: "Tokenizer", labels: tuple[str, ...]) -> Iterator[Shown]:
    """A text, or two, and its class."""
    ids = row["tokens"][row["segments"] > 0].tolist()
    # An eos that is not the last token stands between the two texts of a pair.
    border = ids.index(tokenizer.eos_id) + 1 if tokenizer.eos_id in ids[:-1] else len(ids)
    yield Shown(f"text, {len(ids)} tokens", "\n".join(tokenizer.decode(part) for part in (ids[:border], ids[border:]) if part))
    yield Shown("class to predict", ", ".join(labels[target] for target in row["targets"][row["weights"] > 0]))


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
        yield Shown(f"text {number}, {len(tokens)} tokens", text)
        marks = (f"{word} {name}" for word, name in zip(words, classes, strict=True))
        yield Shown(f"text {number}, {len(classes)} classes to predict", ", ".join(marks))
    yield from _padding(row)


def _padding(row: Row) -> Iterator[Shown]:
    count = int((row["segments"] == 0).sum())
    if count:
        yield Shown(f"padding, {count} tokens", "")
