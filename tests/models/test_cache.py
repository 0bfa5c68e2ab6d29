"""Decoding with a cache gives the logits of the whole sequence, whatever the model is made of."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm import models
from jaxllm.config import base
from jaxllm.types import Model, Params

TOKENS = np.random.default_rng(0).integers(0, 19, (3, 10)).astype(np.int32)


def build(cache: str = "compute", **switches: Any) -> tuple[Model, Params]:
    config = base()
    config.precision.cache = cache
    config.model.update({"vocab_size": 19, "layers": 2, "width": 16, "heads": 4, "context_tokens": 12, **switches})
    model, rng = models.build(config), np.random.default_rng(0)
    # Large weights, so that attention is far from uniform. NumPy's, because compiling `init` costs seconds.
    draw = lambda leaf: rng.normal(scale=0.5, size=leaf.shape).astype(np.float32)  # noqa: E731
    return model, jax.tree.map(draw, jax.eval_shape(model.init, jax.random.key(0)))


# Every value of every switch occurs, in both families and both forms of the stack.
SWITCHES = [
    {"name": "gpt"},
    {"name": "gpt", "layers_as": "scan", "kv_heads": 2, "remat": "dots", "dropout_frac": 0.5},
    {"name": "gpt", "norm": "rmsnorm", "activation": "swiglu", "positions": "rope", "tied_head": "off", "kv_heads": 1},
    {"name": "gpt", "bias": "off", "activation": "silu", "attention": "plain", "remat": "full"},
    {"name": "llama", "kv_heads": 2},
    {"name": "llama", "layers_as": "scan", "kv_heads": 1, "tied_head": "on", "head_dim": 6, "activation": "relu"},
    {"name": "llama", "norm": "layernorm", "positions": "learned", "bias": "on", "activation": "gelu"},
]


@pytest.mark.parametrize("switches", SWITCHES, ids=lambda switches: "-".join(map(str, switches.values())))
def test_decode_is_apply(switches: dict) -> None:
    """Rows of 7, 3 and 1 prompt tokens: two chunks of prefill, the second one for the long row alone, then single tokens."""
    model, params = build(**switches)
    whole = np.asarray(jax.jit(model.apply)(params, TOKENS))
    assert np.abs(whole).max() > 1
    decode, cache, held = jax.jit(model.decode), model.init_cache(3, 9), np.zeros(3, int)
    # The last chunk is wider than what is left of the cache: only padding falls off its end.
    for width, lengths in ((4, [4, 3, 1]), (4, [3, 0, 0]), (1, [1, 1, 1]), (1, [0, 1, 1]), (4, [1, 3, 4])):
        chunk = np.full((3, width), 5, np.int32)
        for row, length in enumerate(lengths):
            chunk[row, :length] = TOKENS[row, held[row] : held[row] + length]
        logits, cache = decode(params, chunk, jnp.array(lengths, jnp.int32), cache)
        held += lengths
        assert logits.dtype == jnp.float32 and cache["lengths"].tolist() == held.tolist()
        for row in np.flatnonzero(lengths):
            np.testing.assert_allclose(logits[row], whole[row, held[row] - 1], rtol=1e-5, atol=1e-5)
    assert held[0] == 9


@pytest.mark.parametrize("layers_as", ["unrolled", "scan"])
def test_a_cache_in_8_bits(layers_as: str) -> None:
    """Codes are the nearest, with a scale for each token and head; the logits are close to those without, and it holds 1 + 4 / 32 bytes."""
    switches: dict[str, Any] = {"name": "llama", "kv_heads": 2, "head_dim": 32, "layers_as": layers_as}
    (model, params), (plain, _) = build("int8", **switches), build(**switches)
    lengths = jnp.array([10, 4, 0], jnp.int32)
    logits, cache = jax.jit(model.decode)(params, TOKENS, lengths, model.init_cache(3, 12))
    exact, wide = jax.jit(plain.decode)(params, TOKENS, lengths, plain.init_cache(3, 12))
    first, of_wide = (each["layers"] if layers_as == "scan" else each["layers"][0] for each in (cache, wide))
    for name in ("k", "v"):
        codes, scale, given = (np.asarray(array) for array in (first[name], first[name + "_scale"], of_wide[name]))
        if layers_as == "scan":  # the first layer reads what it did
            codes, scale, given = codes[:, 0], scale[:, 0], given[:, 0]
        assert (codes.dtype, scale.shape[-1]) == ("int8", 1)
        expected = np.abs(given.astype(np.float64)).max(-1, keepdims=True) / 127
        np.testing.assert_allclose(scale, expected, rtol=1e-6)
        np.testing.assert_allclose(codes, given / np.where(expected > 0, expected, 1), atol=0.5 + 1e-4)
    change = np.abs(np.asarray(logits - exact)[:2]).max() / np.abs(np.asarray(exact)).max()
    assert 1e-5 < change < 0.03
    held, before = (sum(leaf.nbytes for leaf in jax.tree.leaves(each["layers"])) for each in (cache, wide))
    assert held / before == (32 + 4) / (4 * 32)


@pytest.mark.parametrize("layers_as", ["unrolled", "scan"])
def test_what_an_encoder_gave_in_8_bits(layers_as: str) -> None:
    """The keys and values of cross-attention, too, are codes."""
    found = []
    for cache in ("int8", "compute"):
        model, params = build(cache, name="t5", layers_as=layers_as, head_dim=32)
        assert model.encode and model.init_cache and model.decode
        state = jax.jit(model.encode)(params, TOKENS, jnp.array([10, 4, 7], jnp.int32), model.init_cache(3, 12))
        layers = state["layers"] if layers_as == "scan" else state["layers"][0]
        assert layers["cross_k"].dtype == layers["v"].dtype == ("int8" if cache == "int8" else "float32")
        found.append(np.asarray(jax.jit(model.decode)(params, TOKENS, jnp.array([5, 1, 3], jnp.int32), state)[0]))
    assert 1e-5 < np.abs(found[0] - found[1]).max() / np.abs(found[1]).max() < 0.03


@pytest.mark.parametrize("layers_as", ["unrolled", "scan"])
def test_a_donated_cache_is_written_in_place(layers_as: str) -> None:
    """The compiler keeps one copy of the cache and needs room for less than one more layer's keys and values."""
    model, params = build(name="llama", layers_as=layers_as, layers=4, context_tokens=4096)
    cache = model.init_cache(4, 4096)
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(cache))
    one = jnp.ones((4, 1), jnp.int32)
    memory = jax.jit(model.decode, donate_argnums=3).lower(params, one, one[:, 0], cache).compile().memory_analysis()
    assert memory.alias_size_in_bytes >= held
    assert memory.temp_size_in_bytes < 1.5 * held / 4


@pytest.mark.parametrize("length", [0, 13])
def test_cache_of_impossible_length(length: int) -> None:
    with pytest.raises(ValueError, match=f"a cache of {length} tokens.\n  Accepted: 1 to model.context_tokens = 12"):
        build(name="llama")[0].init_cache(2, length)
