"""What an encoder that was trained on masked text puts in the place of a mask.

A text is encoded as in training: bos, its tokens, eos, as far as the tokenizer has them. Letters: B texts, T length, M masks a text,
K guesses, V vocabulary.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.decode import batching, marks
from jaxllm.models import heads
from jaxllm.parallel import processes
from jaxllm.types import Model, Params, Tokenizer


class Guess(NamedTuple):
    """A token for a mask: its text (of a special token its name), its id and its probability."""

    text: str
    id: int
    probability: float


def fill(model: Model, params: Params, tokenizer: Tokenizer, texts: Sequence[str], top_k: int) -> list[list[list[Guess]]]:
    """For each text, for each of its masks, the `top_k` likeliest tokens, likeliest first.

    Each mask is filled with the others in place. ValueError for a text without a mask or longer than the context, a `top_k` that the
    vocabulary lacks, and a model that fills no masks.
    """
    check(model, tokenizer)
    if not 1 <= top_k <= tokenizer.vocab_size:
        raise ValueError(f"top_k = {top_k}.\n  Accepted: 1 to {tokenizer.vocab_size}, the size of the vocabulary.\n  Change top_k.")
    rows = [_encode(model, tokenizer, text) for text in texts]
    out: list[list[list[Guess]]] = [[]] * len(texts)
    for chosen in batching.group([len(row) for row in rows]):
        mine = [rows[index] for index in chosen]
        places = [[place for place, token in enumerate(row) if token == tokenizer.mask_id] for row in mine]
        found = processes.fetch(_likeliest(model, params, mine, places, tokenizer.vocab_size, top_k))
        for row, index in enumerate(chosen):
            guesses = [zip(*(part[row, order].tolist() for part in found), strict=True) for order in range(len(places[row]))]
            out[index] = [[Guess(marks.spell(tokenizer, token), token, p) for token, p in pairs] for pairs in guesses]
    return out


def complete(model: Model, params: Params, tokenizer: Tokenizer, texts: Sequence[str]) -> list[str]:
    """Each text with the likeliest token in the place of each mask."""
    filled = []
    for text, guesses in zip(texts, fill(model, params, tokenizer, texts, 1), strict=True):
        best = iter(guesses)
        ids = _encode(model, tokenizer, text)
        filled.append(tokenizer.decode([next(best)[0].id if token == tokenizer.mask_id else token for token in ids]))
    return filled


def check_texts(model: Model, tokenizer: Tokenizer, texts: Sequence[str]) -> None:
    """ValueError for a text that `fill` would refuse."""
    check(model, tokenizer)
    for text in texts:
        _encode(model, tokenizer, text)


def has_mask(tokenizer: Tokenizer, text: str) -> bool:
    """Whether the text has a mask, written in one of the accepted ways."""
    return any(mark in text for mark in marks.masks(tokenizer))


def check(model: Model, tokenizer: Tokenizer) -> None:
    """ValueError for a model that fills no masks."""
    if model.decode is not None:
        raise ValueError(
            f"model '{model.name}' fills no masks: it writes text.\n  Accepted: bert.\n  Use python -m jaxllm.generate, or another model."
        )
    if model.config.head != "lm":
        raise ValueError(
            f"this model has no head for tokens (model.head = '{model.config.head}').\n  Accepted: a bert with model.head = 'lm', as the"
            " objective masked_lm trains it.\n  For a head 'classify' or 'tag' use python -m jaxllm.classify, or use another model."
        )
    if tokenizer.mask_id is None:
        raise ValueError(
            "the tokenizer has no mask token.\n  Accepted: a tokenizer whose tokenizer_config.json names a mask_token, or that a run with"
            " train.objective = 'masked_lm' made.\n  Use another model."
        )


def _encode(model: Model, tokenizer: Tokenizer, text: str) -> list[int]:
    ids = marks.encode(tokenizer, text, marks.masks(tokenizer))
    ids = [index for index in (tokenizer.bos_id, *ids, tokenizer.eos_id) if index is not None]
    if tokenizer.mask_id not in ids:
        ways = " or ".join(marks.masks(tokenizer))
        raise ValueError(
            f"no mask in the text {text!r}.\n  Accepted: a text with {ways} in it.\n  Put it in the place to be filled."
        )
    if len(ids) > model.config.context_tokens:
        raise ValueError(
            f"a text of {len(ids)} tokens, for a model with a context of {model.config.context_tokens} tokens.\n"
            f"  Accepted: 1 to {model.config.context_tokens} tokens.\n  Shorten the text."
        )
    return ids


def _likeliest(
    model: Model, params: Params, rows: Sequence[Sequence[int]], places: Sequence[Sequence[int]], vocab_size: int, top_k: int
) -> tuple[jax.Array, jax.Array]:
    """(ids, probabilities) [B, M, K] at the places of each row."""
    tokens_BT, lengths_B = batching.rectangle(rows, model.config.context_tokens)
    most = max(map(len, places))
    places_BM = np.zeros((len(lengths_B), batching.bucket(most, 1, tokens_BT.shape[1])), np.int32)
    for row, mine in enumerate(places):
        places_BM[row, : len(mine)] = mine
    return _guess(model.hidden, model.head, vocab_size, top_k, params, tokens_BT, lengths_B, places_BM)


@partial(jax.jit, static_argnums=range(4))
def _guess(
    hidden: Callable[..., jax.Array],
    head: Callable[[Params], Any],
    vocab_size: int,
    top_k: int,
    params: Params,
    tokens_BT: jax.Array,
    lengths_B: jax.Array,
    places_BM: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    segments_BT = (jnp.arange(tokens_BT.shape[1]) < lengths_B[:, None]).astype(jnp.int32)
    hidden_BTD = hidden(params, tokens_BT, segments=segments_BT)
    hidden_BMD = jnp.take_along_axis(hidden_BTD, places_BM[:, :, None], axis=1)
    logits_BMV = heads.logits(hidden_BMD, head(params))[:, :, :vocab_size]
    probabilities, ids = jax.lax.top_k(jax.nn.softmax(logits_BMV), top_k)
    return ids, probabilities
