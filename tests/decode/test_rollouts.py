"""Drawn answers: their log-probabilities against the full forward pass of the row alone, their frequencies, their ends."""

from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm import config, models
from jaxllm.decode import rollouts
from jaxllm.types import Model, Params

VOCAB, CONTEXT, MOST = 40, 32, 9
STOPS = (7, 11, 26, 30, 2, 17)
PROMPTS = [np.array(ids) for ids in ([3, 1, 4], [1], [5, 9, 2, 6, 5, 3, 5, 8])]


@cache
def made(transforms: tuple[str, ...] = (), layers_as: str = "unrolled") -> tuple[Model, Params]:
    settings = config.base()
    settings.model.update({"vocab_size": VOCAB, "context_tokens": CONTEXT, "layers": 2, "width": 32, "heads": 4, "kv_heads": 2})
    settings.model.layers_as = layers_as
    settings.train.transforms = transforms
    settings.lora.rank = 4
    model = models.build(settings)
    params = model.init(jax.random.key(0))
    # Adapters begin with B = 0 and would do nothing.
    moved = jax.tree.map(lambda x: x + 0.1 if jnp.issubdtype(x.dtype, jnp.floating) and x.ndim > 1 else x, params)
    return model, moved if transforms else jax.tree.map(lambda x: 2 * x, params)


def draw(model: Model, params: Params, *, seed: int = 0, prompts: Any = PROMPTS, **changes: Any) -> rollouts.Drawn:
    options = {
        "answers": 4,
        "most_tokens": MOST,
        "temperature": 0.7,
        "stop_ids": STOPS,
        "vocab_size": VOCAB,
        "longest": 8,
    } | changes
    return rollouts.Sampler(model, **options).draw(params, prompts, jax.random.key(seed))


def log_p_alone(model: Model, params: Params, prompt: np.ndarray, answer: np.ndarray, temperature: float) -> np.ndarray:
    """float64: of the one sequence, without padding, cache or batch."""
    ids = np.concatenate([prompt, answer])
    logits = np.asarray(model.apply(params, jnp.array(ids[None])), np.float64)[0, len(prompt) - 1 : -1] / temperature
    return (logits - np.log(np.exp(logits).sum(-1, keepdims=True)))[np.arange(len(answer)), answer]


@pytest.mark.parametrize(
    ("transforms", "layers_as"), [((), "unrolled"), ((), "scan"), (("lora",), "unrolled"), (("int8", "lora"), "unrolled")]
)
def test_log_probabilities_are_those_of_the_row_alone(transforms, layers_as):
    """Of rows that stand in padded batches, behind a cache that was repeated; also of adapters beside quantized kernels."""
    model, params = made(transforms, layers_as)
    drawn = draw(model, params)
    assert drawn.tokens_RN.shape == (12, MOST) and len(set(drawn.lengths_R.tolist())) > 2
    for row in range(12):
        length = drawn.lengths_R[row]
        answer = drawn.tokens_RN[row, :length]
        expected = log_p_alone(model, params, PROMPTS[row // 4], answer, 0.7)
        np.testing.assert_allclose(drawn.log_p_RN[row, :length], expected, rtol=0, atol=2e-5)
        assert not drawn.tokens_RN[row, length:].any() and not drawn.log_p_RN[row, length:].any()


def test_answers_end_once():
    drawn = draw(*made())
    for ids, length, ended in zip(drawn.tokens_RN, drawn.lengths_R, drawn.ended_R, strict=True):
        stops = np.isin(ids[:length], STOPS)
        assert stops[-1] == ended and not stops[:-1].any()
        assert ended or length == MOST
    assert 0 < drawn.ended_R.sum() < 12


def test_answers_differ_and_come_again():
    model, params = made()
    one, same, other = draw(model, params), draw(model, params), draw(model, params, seed=1)
    jax.tree.map(np.testing.assert_array_equal, one, same)
    assert (one.tokens_RN != other.tokens_RN).any()
    assert len({tuple(row) for row in one.tokens_RN[:4]}) == 4


def test_tokens_are_drawn_as_often_as_they_are_likely():
    """4,000 first tokens; each count within 5 standard deviations of what is expected of it."""
    model, params = made()
    drawn = draw(model, params, prompts=PROMPTS[:1], answers=4000, most_tokens=1)
    p = np.exp([log_p_alone(model, params, PROMPTS[0], np.array([token]), 0.7)[0] for token in range(VOCAB)])
    counts = np.bincount(drawn.tokens_RN[:, 0], minlength=VOCAB)
    assert (np.abs(counts - 4000 * p) < 5 * np.sqrt(4000 * p * (1 - p)) + 1).all()
    assert p.max() / p.min() > 5


def test_rows_without_a_token_are_not_drawn():
    """Their probability is nobody else's: log-probabilities are those of the whole softmax."""
    model, params = made()
    drawn = draw(model, params, vocab_size=20, answers=20, stop_ids=())
    assert drawn.tokens_RN.max() == 19
    expected = log_p_alone(model, params, PROMPTS[2], drawn.tokens_RN[-1], 0.7)
    np.testing.assert_allclose(drawn.log_p_RN[-1], expected, rtol=0, atol=2e-5)


def test_what_does_not_fit_is_refused():
    with pytest.raises(
        ValueError, match=r"(?s)answers of 30 tokens behind prompts of up to 8, with model.context_tokens = 32.*Lower"
    ):
        draw(*made(), most_tokens=30)
