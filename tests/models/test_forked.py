"""Answers that share the row and the prompt: logits and gradients of each prompt with its answer alone, for every attention and model."""

import re
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from forked_rows import Forked, alone, draw, pack

from jaxllm import models, registry
from jaxllm.config import base
from jaxllm.types import Model, Params

VOCAB, WIDTH = 23, 40
RNG = np.random.default_rng(3)
# A prompt of one token has no trunk; of three answers none sees another.
ROWS = [
    [draw(RNG, VOCAB, 5, 4, 7), draw(RNG, VOCAB, 1, 3, 2), draw(RNG, VOCAB, 4, 1, 5)],
    [draw(RNG, VOCAB, 9, 6, 3, 5)],
]
BACKENDS = registry.names("attention")
MODELS = {
    "gpt": {"name": "gpt"},
    "llama": {"name": "llama", "kv_heads": 2, "layers_as": "scan"},
}


def build(name: str, backend: str = "blocked") -> Model:
    config = base()
    config.model.update({"vocab_size": VOCAB, "layers": 2, "width": 16, "heads": 4, "context_tokens": WIDTH, **MODELS[name]})
    config.model.update({"attention": backend, "attention_block_tokens": 8})
    return models.build(config)


def parameters(model: Model) -> Params:
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape) * 0.3, jnp.float32), shapes)


def logits_of(model: Model, params: Params, batch: Any) -> jax.Array:
    arrays = {name: batch[name] for name in ("segments", "positions", "branches")}
    return model.apply(params, batch["tokens"], **arrays)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", MODELS)
def test_a_forked_row_gives_what_each_answer_alone_gives(name: str, backend: str) -> None:
    model, batch = build(name, backend), pack(ROWS, WIDTH)
    params = parameters(model)
    logits_BTV = np.asarray(jax.jit(partial(logits_of, model))(params, batch))
    apply = jax.jit(model.apply)
    checked = 0
    for row, forked_rows in enumerate(ROWS):
        for segment, forked in enumerate(forked_rows, 1):
            mine = batch["segments"][row] == segment
            for branch in range(1, len(forked.answers) + 1):
                expected_TV = apply(params, alone(forked, branch))[0]
                trunk, answer = (logits_BTV[row][mine & (batch["branches"][row] == number)] for number in (0, branch))
                np.testing.assert_allclose(np.concatenate([trunk, answer]), expected_TV, rtol=0, atol=1e-6)
                checked += len(answer)
    assert checked == batch["weights"].sum()


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_a_rejected_answer_says_changes_no_bit_of_the_chosen_one(backend: str) -> None:
    model, batch = build("llama", backend), pack(ROWS, WIDTH)
    params, run = parameters(model), jax.jit(partial(logits_of, model))
    rejected = batch["branches"] == 2
    # The first token of a branch is the prompt's last one.
    changed = {**batch, "tokens": np.where(rejected, (batch["tokens"] + 7) % VOCAB, batch["tokens"])}
    before, after = run(params, batch), run(params, changed)
    np.testing.assert_array_equal(before[~rejected], after[~rejected])
    assert (np.asarray(before != after).any(-1) == rejected).all()


@pytest.mark.parametrize("backend", ["plain", "blocked", "flash"])
def test_gradients_of_a_forked_row_are_the_sum_of_those_of_its_answers(backend: str) -> None:
    model, forked = build("gpt", backend), ROWS[0][0]
    batch = pack([[forked]], WIDTH)
    params, rng = parameters(model), np.random.default_rng(1)
    pull = rng.normal(size=(1, WIDTH, VOCAB)).astype(np.float32) * batch["weights"][..., None]

    @jax.jit
    @jax.grad
    def together(params: Params) -> jax.Array:
        return jnp.sum(logits_of(model, params, batch) * pull)

    @jax.grad
    def separate(params: Params) -> jax.Array:
        total = jnp.float32(0)
        for branch in (1, 2):
            own = pull[0][batch["branches"][0] == branch]
            total += jnp.sum(model.apply(params, alone(forked, branch))[0, -len(own) :] * own)
        return total

    for found, expected in zip(jax.tree.leaves(together(params)), jax.tree.leaves(jax.jit(separate)(params)), strict=True):
        np.testing.assert_allclose(found, expected, rtol=0, atol=2e-6 * max(1, np.abs(expected).max()))


def test_branches_of_another_shape_and_beside_a_window_are_refused() -> None:
    model, batch = build("gpt"), pack([[Forked([1, 2], [[3], [4, 5]])]], WIDTH)
    params = parameters(model)
    with pytest.raises(ValueError, match=re.escape(f"branches has shape (1, {WIDTH - 1}).\n  Accepted: that of the tokens")):
        model.apply(params, batch["tokens"], branches=batch["branches"][:, 1:])
    config = base()
    config.model.update({"vocab_size": VOCAB, "layers": 1, "width": 16, "context_tokens": WIDTH, "window_tokens": 4})
    with pytest.raises(ValueError, match="branches_BT with window_tokens = 4"):
        jax.eval_shape(partial(logits_of, models.build(config)), parameters(models.build(config)), batch)
