"""Generated ids: against the full forward pass, against themselves in other batches, and where they must stop."""

import dataclasses
from collections.abc import Callable
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm import config, models
from jaxllm.decode import generate
from jaxllm.ops.sampling import Settings
from jaxllm.types import Model, Params

VOCAB, CONTEXT = 50, 64
GREEDY = Settings(temperature=0)
SAMPLED = Settings(temperature=0.9, top_k=20, top_p=0.95, min_p=0.01, repetition_penalty=1.2)
# Of different lengths, and one twice; all in the smallest buckets, as every further shape is compiled.
PROMPTS = [[3, 1, 4], [1], [(7 * i) % VOCAB for i in range(20)], [3, 1, 4]]


START = 2


@cache
def made(name: str = "llama", layers_as: str = "unrolled", objective: str = "causal_lm", **changes: Any) -> tuple[Model, Params]:
    """A random model whose logits are far enough apart for argmax to be the same in every batch."""
    settings = config.base()
    settings.train.objective = objective
    sizes = {"vocab_size": VOCAB, "context_tokens": CONTEXT, "layers": 2, "width": 32, "heads": 4, "kv_heads": 2, "init_std": 0.02}
    settings.model.update({"name": name, "layers_as": layers_as, **sizes, **changes})
    model = models.build(settings)
    return model, jax.tree.map(lambda x: 4 * x, model.init(jax.random.key(0)))


def run(model: Model, params: Params, prompts: list[list[int]], settings: Settings = GREEDY, **changes: Any) -> list[list[int]]:
    options = {"max_new_tokens": 12, "stop_ids": (), "vocab_size": VOCAB, "seed": 5, "start_id": START, **changes}
    return generate.generate(model, params, prompts, settings, **options)


def argmax_of_full_forward(model: Model, params: Params, prompt: list[int], count: int) -> list[int]:
    """The oracle: no cache, the whole sequence again for each token. A prefix sees itself, an encoder reads its prompt."""
    apply, ids, beside = jax.jit(model.apply), list(prompt), {}
    padded = jnp.zeros((1, CONTEXT), jnp.int32).at[0, : len(prompt)].set(jnp.array(prompt))
    real = jnp.arange(CONTEXT)[None] < len(prompt)
    if model.encode is not None:
        ids, ones = [START], jnp.ones((1, CONTEXT), jnp.int32)
        beside = {"inputs": padded, "input_segments": real.astype(jnp.int32), "segments": ones}
    elif model.config.bidirectional_prompt:
        beside = {"prefix": real}
    before = len(ids)
    for _ in range(count):
        row = jnp.zeros((1, CONTEXT), jnp.int32).at[0, : len(ids)].set(jnp.array(ids))
        ids.append(int(apply(params, row, **beside)[0, len(ids) - 1].argmax()))
    return ids[before:]


@pytest.mark.parametrize(
    ("name", "layers_as", "objective"),
    [
        ("llama", "unrolled", "causal_lm"),
        ("llama", "scan", "prefix_lm"),
        ("gpt", "unrolled", "causal_lm"),
        ("t5", "unrolled", "span_corruption"),
        ("transformer", "scan", "seq2seq"),
    ],
)
def test_greedy_is_argmax_of_the_full_forward_pass(name: str, layers_as: str, objective: str) -> None:
    """In one batch of prompts of different lengths, and with a prompt alone."""
    model, params = made(name, layers_as, objective, **({"tied_head": "off"} if name in ("t5", "transformer") else {}))
    expected = [argmax_of_full_forward(model, params, prompt, 12) for prompt in PROMPTS]
    assert len({token for row in expected for token in row}) > 5, "the test model is stuck on a few tokens"
    assert len(set(map(tuple, expected))) > 1, "the test model does not read its prompt"
    assert run(model, params, PROMPTS) == expected
    assert run(model, params, [PROMPTS[2]]) == [expected[2]]


def test_a_prefix_matters_in_both_directions() -> None:
    """The same weights read as causal ones write something else, so that the test above can tell the two apart."""
    prefix, params = made("llama", "scan", "prefix_lm")
    causal, _ = made("llama", "scan")
    assert run(prefix, params, [PROMPTS[2]]) != run(causal, params, [PROMPTS[2]])


@pytest.mark.parametrize(("name", "settings"), [("llama", GREEDY), ("llama", SAMPLED), ("t5", SAMPLED)])
def test_a_row_does_not_depend_on_its_batch(name: str, settings: Settings) -> None:
    model, params = made(name)
    together = run(model, params, PROMPTS, settings)
    assert [run(model, params, [prompt], settings)[0] for prompt in PROMPTS[:3]] == together[:3]
    assert run(model, params, [PROMPTS[2], PROMPTS[0], PROMPTS[1]], settings) == [together[2], together[0], together[1]]


def test_sampling_is_a_function_of_seed_prompt_and_copy() -> None:
    model, params = made()
    first, again, other = (run(model, params, PROMPTS, SAMPLED, seed=seed) for seed in (5, 5, 6))
    assert first == again
    assert all(a != b for a, b in zip(first, other, strict=True))
    assert first[0] != first[3], "equal prompts must get different samples"


def test_streams_end_where_generate_does() -> None:
    model, params = made()
    options = {"max_new_tokens": 12, "vocab_size": VOCAB, "seed": 5}
    for settings in (GREEDY, SAMPLED):
        whole = run(model, params, [PROMPTS[0]], settings)[0]
        parts = list(generate.stream(model, params, PROMPTS[0], settings, stop_ids=(), chunk_tokens=4, **options))
        assert parts == [whole[:1], whole[:5], whole[:9], whole]


def test_rows_stop_at_their_own_stop_id() -> None:
    model, params = made()
    free = run(model, params, PROMPTS)
    stop = free[0][1]
    expected = [row[: row.index(stop)] if stop in row else row for row in free]
    assert len(expected[0]) < max(map(len, expected)), "the test needs a row that goes on"
    assert run(model, params, PROMPTS, stop_ids=(stop,)) == expected


def test_second_call_compiles_nothing() -> None:
    """Other prompts, another seed and another number of tokens are data, as long as the shapes fall into the same buckets."""
    model, params = made()
    traced: list[int] = []

    def counting(function: Callable) -> Callable:
        return lambda *arguments: (traced.append(1), function(*arguments))[1]

    model = dataclasses.replace(model, decode=counting(model.decode))
    run(model, params, [[1, 2, 3]], SAMPLED, max_new_tokens=3)
    once = len(traced)
    run(model, params, [[4]], SAMPLED, max_new_tokens=9, seed=8)
    assert once > 0
    assert len(traced) == once


def constant(logits: list[float]) -> Model:
    """A model that has seen nothing and always says the same."""
    logits_V = jnp.array(logits)

    def decode(params: Any, tokens_BT: jax.Array, lengths_B: jax.Array, cache: Any) -> tuple[jax.Array, Any]:
        return jnp.broadcast_to(logits_V, (tokens_BT.shape[0], len(logits))), cache

    class Sizes:
        context_tokens, head = CONTEXT, "lm"

    unused: Any = None
    return Model("constant", Sizes, unused, unused, unused, unused, (), unused, lambda rows, length: (), None, decode)


def test_tokens_have_the_softmax_distribution_and_are_independent() -> None:
    """1920 copies of one prompt, two tokens each: every pair as often as the product of softmax(logits / 2), within 5 deviations."""
    logits, copies = [0.0, 1.0, 2.0, 3.0], 60 * 32
    rows = run(constant(logits), {}, [[1, 2]] * copies, Settings(temperature=2.0), max_new_tokens=2, vocab_size=4)
    counts = np.zeros((4, 4))
    np.add.at(counts, tuple(np.array(rows).T), 1)
    p = np.exp(np.array(logits) / 2) / np.exp(np.array(logits) / 2).sum()
    expected = copies * np.outer(p, p)
    assert np.all(np.abs(counts - expected) <= 5 * np.sqrt(expected))


@pytest.mark.parametrize(("prompt", "expected"), [([2], [0, 1, 0, 0]), ([0, 2], [1, 0, 0, 0]), ([0, 1], [0, 0, 0, 0])])
def test_repetition_penalty_knows_prompt_and_new_tokens_and_not_the_padding(prompt: list[int], expected: list[int]) -> None:
    """Seen tokens count half: 0 falls from 1 to 0.5 and 1 from 0.9 to 0.45. The prompt is padded with zeros."""
    settings = Settings(temperature=0, repetition_penalty=2.0)
    assert run(constant([1.0, 0.9, 0.0]), {}, [prompt], settings, max_new_tokens=4, vocab_size=3) == [expected]


def test_only_ids_of_the_tokenizer_are_drawn() -> None:
    model, params = made()
    assert max(token for row in run(model, params, PROMPTS) for token in row) >= 10
    assert max(token for row in run(model, params, PROMPTS, vocab_size=10) for token in row) < 10


def test_generation_ends_at_the_context(caplog: pytest.LogCaptureFixture) -> None:
    """The long row stops, the short one goes on; neither changes the other. Both lie in larger buckets than other tests use."""
    model, params = made()
    prompts = [[5] * (CONTEXT - 3), [2]]
    caplog.clear()
    rows = run(model, params, prompts)
    assert [len(row) for row in rows] == [3, 12]
    assert "12 new tokens do not fit behind a prompt of 61 tokens in the model's context of 64: stopping after 3." in caplog.text
    assert rows == [argmax_of_full_forward(model, params, prompt, count) for prompt, count in zip(prompts, (3, 12), strict=True)]


def test_an_encoder_reads_as_much_as_the_context_and_the_decoder_writes_as_much(caplog: pytest.LogCaptureFixture) -> None:
    """The prompt takes no room from what is written; the start token takes one place."""
    model, params = made("t5", "unrolled", "span_corruption")
    caplog.clear()
    prompts = [[5, 7] * (CONTEXT // 2), [2]]
    rows = run(model, params, prompts, max_new_tokens=CONTEXT)
    assert [len(row) for row in rows] == [CONTEXT - 1] * 2
    assert "64 new tokens do not fit in the model's context of 64: stopping after 63." in caplog.text
    assert [row[:12] for row in rows] == [argmax_of_full_forward(model, params, prompt, 12) for prompt in prompts]
    with pytest.raises(ValueError, match=r"a prompt of 65 tokens[\s\S]*Accepted: 1 to 64 tokens.\n  Shorten"):
        run(model, params, [[1] * (CONTEXT + 1)])
    with pytest.raises(ValueError, match=r"without a start_id.\n  Accepted"):
        run(model, params, [[1]], start_id=None)


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("bert", {}, r"'bert' is an encoder, which writes no text.\n  Accepted: gpt, llama, t5[\s\S]*jaxllm.fill_mask"),
        ("llama", {"head": "tag", "classes": 3}, r"predicts classes \(model.head = 'tag'\)[\s\S]*jaxllm.evaluate"),
    ],
)
def test_models_that_write_no_text_are_refused(name: str, changes: dict[str, Any], words: str) -> None:
    model, params = made(name, **changes)
    with pytest.raises(ValueError, match=words):
        run(model, params, [[1]])


@pytest.mark.parametrize(
    ("prompts", "changes", "words"),
    [
        ([[1], []], {}, r"a prompt of 0 tokens[\s\S]*Accepted: 1 to 63 tokens"),
        ([[1] * CONTEXT], {}, r"a prompt of 64 tokens, for a model with a context of 64 tokens.\n  Accepted: 1 to 63"),
        ([[1]], {"max_new_tokens": 0}, r"max_new_tokens = 0.\n  Accepted: 1 or more"),
        ([[1]], {"seed": -1}, r"seed = -1.\n  Accepted: 0 to 4294967295"),
    ],
)
def test_bad_requests_are_named(prompts: list[list[int]], changes: dict[str, Any], words: str) -> None:
    """At once, also by the lazy `stream`."""
    model, params = made()
    with pytest.raises(ValueError, match=words):
        run(model, params, prompts, **changes)
    options = {"max_new_tokens": 12, "stop_ids": (), "vocab_size": VOCAB, "seed": 5, "chunk_tokens": 4, **changes}
    with pytest.raises(ValueError, match=words):
        generate.stream(model, params, prompts[-1], GREEDY, **options)


def test_no_prompts_give_no_texts() -> None:
    assert run(*made(), []) == []
