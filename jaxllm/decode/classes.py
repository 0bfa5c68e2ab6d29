"""Which class a classifier gives a text, a pair of texts, or each word of a text.

Texts are encoded by the code that makes training rows of them. Letters: B texts, T length, M places a text that have a class, C classes.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from jaxllm.data import pack
from jaxllm.data.examples import token_classification
from jaxllm.data.examples.sequence_classification import ENCODERS, join
from jaxllm.data.tokenizers.words import word_starts
from jaxllm.decode import batching
from jaxllm.models import heads
from jaxllm.types import Model, Params, Tokenizer

HEADS = {"classify": "sequence_classification", "tag": "token_classification"}
TASKS = {"classify": "a class for a text or a pair of texts", "tag": "a class for each word of a text"}
CHANGES = {"classify": "Ask for the class of the whole text", "tag": "Give single texts, without a pair"}
SHOWN_CHARS = 40


class Label(NamedTuple):
    """A class: its name (its number where it has none), its number and its probability."""

    name: str
    id: int
    probability: float


class Word(NamedTuple):
    """A word and its likeliest classes, likeliest first; none if the model did not read it: it is cut off, or has no token."""

    text: str
    labels: list[Label]


class Row(NamedTuple):
    """What the model reads of a text. tokens: ids with bos and eos. border: so many of them belong to the first text of a pair.
    places: which of them have a class."""

    tokens: Sequence[int]
    border: int
    places: Sequence[int]


def of_texts(
    model: Model,
    params: Params,
    tokenizer: Tokenizer,
    texts: Sequence[str],
    pairs: Sequence[str] | None = None,
    *,
    names: Sequence[str] = (),
    top_k: int,
    row_tokens: int = 0,
) -> list[list[Label]]:
    """For each text, or each text with its pair, the `top_k` likeliest classes (all, if there are fewer), likeliest first.

    names: of the classes, by number. row_tokens: what is longer is cut as in training, and a line says so; 0: the model's context.
    Training and evaluation cut, and so a class is what was learned of such a text, too; a mask to fill would be lost.
    ValueError for a model without the head 'classify', for a text without a token, and for pairs that do not fit.
    """
    _check(model, "classify", names, top_k)
    _check_pairs(model, tokenizer, texts, pairs)
    rows, width = [], row_tokens or model.config.context_tokens
    seconds = [None] * len(texts) if pairs is None else _encode(tokenizer, pairs)
    for text, ids, pair in zip(texts, _encode(tokenizer, texts), seconds, strict=True):
        tokens, border, cut = join(ids, pair, tokenizer, width)
        pack.check_ids(tokens, tokenizer)
        _report_cut(text, width, cut)
        rows.append(Row(tokens.tolist(), border, [0 if model.name in ENCODERS else len(tokens) - 1]))
    return [_likeliest(p_MC[0], names, top_k) for p_MC in score(model, params, rows)]


def of_words(
    model: Model,
    params: Params,
    tokenizer: Tokenizer,
    texts: Sequence[str],
    *,
    names: Sequence[str] = (),
    top_k: int,
    row_tokens: int = 0,
) -> list[list[Word]]:
    """For each text all of its words, which single spaces divide, with their likeliest classes; the rest as `of_texts`."""
    _check(model, "tag", names, top_k)
    _encode(tokenizer, texts)
    width, starts = row_tokens or model.config.context_tokens, word_starts(tokenizer)
    encoded = list(token_classification.encode(list(texts), tokenizer, starts, width, first=model.name in ENCODERS))
    found = score(model, params, [Row(each.tokens.tolist(), len(each.tokens), each.places) for each in encoded])
    out = []
    for text, each, p_MC in zip(texts, encoded, found, strict=True):
        _report_cut(text, width, each.cut)
        labels = {word: _likeliest(p_C, names, top_k) for word, p_C in zip(each.words, p_MC, strict=True)}
        out.append([Word(word, labels.get(order, [])) for order, word in enumerate(text.split(" "))])
    return out


def score(model: Model, params: Params, rows: Sequence[Row]) -> list[np.ndarray]:
    """The probabilities of the classes [M, C] at the places of each row, whatever rows are beside it."""
    out: list[np.ndarray] = [np.zeros(0)] * len(rows)
    for chosen in batching.group([len(row.tokens) for row in rows]):
        mine = [rows[index] for index in chosen]
        tokens_BT, lengths_B = batching.rectangle([row.tokens for row in mine], model.config.context_tokens)
        place_T = np.arange(tokens_BT.shape[1])
        read = {"segments": (place_T < lengths_B[:, None]).astype(np.int32)}
        if model.name in ENCODERS:
            borders_B = lengths_B.copy()
            borders_B[: len(mine)] = [row.border for row in mine]
            read["token_types"] = ((place_T >= borders_B[:, None]) & (place_T < lengths_B[:, None])).astype(np.int32)
        most = max(len(row.places) for row in mine)
        places_BM = np.zeros((len(lengths_B), batching.bucket(most, 1, tokens_BT.shape[1])), np.int32)
        for order, row in enumerate(mine):
            places_BM[order, : len(row.places)] = row.places
        found_BMC = np.asarray(_score(model.hidden, model.head, params, tokens_BT, read, places_BM))
        for order, index in enumerate(chosen):
            out[index] = found_BMC[order, : len(rows[index].places)]
    return out


@partial(jax.jit, static_argnums=range(2))
def _score(
    hidden: Callable[..., jax.Array],
    head: Callable[[Params], Any],
    params: Params,
    tokens_BT: jax.Array,
    read: Mapping[str, jax.Array],
    places_BM: jax.Array,
) -> jax.Array:
    hidden_BMD = jnp.take_along_axis(hidden(params, tokens_BT, **read), places_BM[:, :, None], axis=1)
    return jax.nn.softmax(heads.logits(hidden_BMD, head(params)))


def _likeliest(p_C: np.ndarray, names: Sequence[str], top_k: int) -> list[Label]:
    best = np.argsort(-p_C, kind="stable")[:top_k].tolist()
    return [Label(names[number] if names else str(number), number, float(p_C[number])) for number in best]


def _encode(tokenizer: Tokenizer, texts: Sequence[str]) -> list[list[int]]:
    """Ids of each text alone; ValueError for one that has none."""
    encoded = tokenizer.encode_batch(list(texts))
    for text, ids in zip(texts, encoded, strict=True):
        if not ids:
            raise ValueError(
                f"the text {text!r} has no token.\n  Accepted: at least one character that the tokenizer knows.\n  Give another text."
            )
    return encoded


def _report_cut(text: str, width: int, cut: bool) -> None:
    if cut:
        start = text if len(text) <= SHOWN_CHARS else text[:SHOWN_CHARS] + "..."
        logging.warning("%r does not fit into %d tokens: its end was cut off, as in training.", start, width)


def _check_head(model: Model) -> None:
    """ValueError for a model without a head for classes."""
    head = model.config.head
    if head in HEADS:
        return
    writes = "fill_mask" if model.decode is None else "generate"
    instead = f"Use python -m jaxllm.{writes}" if head == "lm" else "Train it with such a head"
    raise ValueError(
        f"this model has no head for classes (model.name = '{model.name}', model.head = '{head}').\n  Accepted: "
        + ", ".join(f"model.head = '{name}', as the objective {objective} trains it" for name, objective in HEADS.items())
        + f".\n  {instead}, or use another model."
    )


def _check(model: Model, head: str, names: Sequence[str], top_k: int) -> None:
    _check_head(model)
    if model.config.head != head:
        gives, wanted, change = TASKS[model.config.head], TASKS[head], CHANGES[model.config.head]
        raise ValueError(
            f"this model has {gives}, not {wanted}.\n  Accepted: model.head = '{head}'.\n  {change}, or use another model."
        )
    if model.config.classes == 1:
        raise ValueError(
            "this model has one class, and so nothing to choose from: its head gives a number, as a reward model's does.\n  Accepted: two"
            " classes or more.\n  Use python -m jaxllm.reward (jaxllm.reward in Python) for rewards of answers."
        )
    if top_k < 1:
        raise ValueError(f"top_k = {top_k}.\n  Accepted: 1 or more.\n  Change top_k.")
    if names and len(names) != model.config.classes:
        raise ValueError(
            f"{len(names)} names of classes, for a model with {model.config.classes} classes.\n  Accepted: a name for each, by number, or"
            " none.\n  Change the names."
        )


def _check_pairs(model: Model, tokenizer: Tokenizer, texts: Sequence[str], pairs: Sequence[str] | None) -> None:
    if pairs is None:
        return
    if len(pairs) != len(texts):
        raise ValueError(
            f"{len(pairs)} second texts of pairs for {len(texts)} texts.\n  Accepted: none, or one for each text, in the same order.\n"
            "  Give as many (--pair) as texts (--text)."
        )
    if tokenizer.eos_id is None:
        raise ValueError(
            "pairs for a tokenizer without an eos, which stands between the texts of a pair.\n  Accepted: the tokenizer of a model that"
            " was trained with data.pair_field.\n  Give single texts, or use another model."
        )
    if model.name in ENCODERS and model.config.token_types < 2:
        raise ValueError(
            f"pairs for a model with model.token_types = {model.config.token_types}.\n  Accepted: 2 or more, so that the second text has"
            " a type.\n  Give single texts, or use another model."
        )
