"""Exact sequences: of an encoder-decoder that writes what it is told, and pairs unpacked from the rows of the data side."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm import config
from jaxllm.data import examples, shards
from jaxllm.data.documents import Document
from jaxllm.data.tokenizers.byte import ByteTokenizer
from jaxllm.evals import exact
from jaxllm.evals.exact import Pair
from jaxllm.types import Model

TOKENIZER = ByteTokenizer()
EOS = TOKENIZER.eos_id


class Sizes:
    context_tokens, head = 32, "lm"


def copier(extra: int = 0) -> Model:
    """Writes its input, then eos at its place, `extra` tokens late; what follows eos is no matter."""

    def encode(params: Any, inputs_BS: jax.Array, lengths_B: jax.Array, cache: Any) -> Any:
        return {**cache, "inputs": jnp.pad(inputs_BS, ((0, 0), (0, 32))), "lengths": lengths_B}

    def decode(params: Any, tokens_BT: jax.Array, lengths_B: jax.Array, cache: Any) -> tuple[jax.Array, Any]:
        place_B = cache["place"]
        token_B = jnp.take_along_axis(cache["inputs"], jnp.minimum(place_B, 40)[:, None], axis=1)[:, 0]
        token_B = jnp.where((place_B >= cache["lengths"] - 1) & (place_B < cache["lengths"] - 1 + extra), 65, token_B)
        return jax.nn.one_hot(token_B, TOKENIZER.vocab_size), {**cache, "place": place_B + lengths_B}

    unused: Any = None
    cache: Any = lambda rows, length: {"place": jnp.zeros(rows, jnp.int32)}  # noqa: E731
    return Model("copier", Sizes, unused, unused, unused, unused, (), unused, cache, encode, decode)


def pair(text: str, target: str) -> Pair:
    return Pair([*text.encode(), EOS], [*target.encode(), EOS])


def test_only_the_same_tokens_up_to_eos_are_right() -> None:
    """Too short, too long and different by one are wrong; the first `max_seqs` count."""
    pairs = [pair("abc", "abc"), pair("abc", "abd"), pair("abc", "ab"), pair("abc", "abcd"), pair("abcdef", "abcdef")]
    assert exact.measure(copier(), {}, TOKENIZER, pairs, 0) == (2, 5)
    assert exact.measure(copier(), {}, TOKENIZER, pairs, 2) == (1, 2)
    assert exact.measure(copier(extra=1), {}, TOKENIZER, pairs[:1], 0) == (0, 1), "what does not end is wrong"
    assert exact.measure(copier(), {}, TOKENIZER, [], 0) == (0, 0)


def test_pairs_come_back_from_packed_rows(tmp_path: Path) -> None:
    settings = config.base()
    settings.model.update({"name": "transformer", "context_tokens": 20})
    settings.train.objective = "seq2seq"
    documents = [Document("a" * size, "", "b" * (1 + size % 4)) for size in (3, 1, 9, 4, 2, 2)]
    rows = examples.write(settings, tmp_path / "rows", documents, TOKENIZER, (), shards.Totals())
    assert len(rows) < len(documents)
    places = np.arange(len(rows))
    batch = examples.make(settings).batch(TOKENIZER)(rows.rows(places), places, 0, 0)
    assert sorted(exact.unpack([batch])) == sorted(pair(document.text, str(document.target)) for document in documents)
