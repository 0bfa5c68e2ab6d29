"""Beam search: against all sequences of a small vocabulary, and against what transformers found for real architectures."""

import itertools
import json
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm import config, models
from jaxllm.decode import beam, generate
from jaxllm.interop import directory, weights
from jaxllm.ops.sampling import Settings
from jaxllm.types import Model, Params

GOLDEN = Path(__file__).resolve().parent.parent / "golden"
VOCAB, STOP, START, DEPTH = 4, 3, 1, 3
# As many as there are sequences of up to DEPTH tokens, so that none is ever left out: 1 + 3 + 9 + 27.
ALL = 40
PROMPTS = [[2, 0, 1], [1], [0, 2, 2, 1, 0]]


@cache
def made(name: str) -> tuple[Model, Params]:
    """A random model with three tokens and a stop token, whose logits are neither equal nor all but sure."""
    settings = config.base()
    sizes = {"vocab_size": VOCAB, "context_tokens": 16, "layers": 1, "width": 16, "heads": 2}
    settings.model.update({"name": name, **sizes})
    model = models.build(settings)
    return model, jax.tree.map(lambda x: (1 if name == "transformer" else 3) * x, model.init(jax.random.key(3)))


def every_score(name: str, prompt: list[int], length_penalty: float) -> dict[tuple[int, ...], float]:
    """The oracle: all sequences that end, by full forward passes and without a cache."""
    model, params = made(name)
    rows = np.array(list(itertools.product(range(VOCAB), repeat=DEPTH)), np.int32)
    if model.encode is None:
        tokens = np.concatenate([np.tile(np.array(prompt, np.int32), (len(rows), 1)), rows], axis=1)
        logits = jax.jit(model.apply)(params, tokens)[:, len(prompt) - 1 : -1]
    else:
        tokens = np.concatenate([np.full((len(rows), 1), START, np.int32), rows[:, :-1]], axis=1)
        logits = jax.jit(model.apply)(params, tokens, inputs=np.tile(np.array(prompt, np.int32), (len(rows), 1)))
    logits = np.asarray(logits, np.float64)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    found = {}
    for row, its in zip(rows.tolist(), log_p, strict=True):
        length = row.index(STOP) + 1 if STOP in row else DEPTH
        total = sum(its[place, row[place]] for place in range(length))
        found[tuple(row[:length])] = total / length**length_penalty
    return found


def run(name: str, prompts: list[list[int]], settings: beam.Settings, **changes: Any) -> list[beam.Found]:
    model, params = made(name)
    options: dict[str, Any] = {"max_new_tokens": DEPTH, "stop_ids": (STOP,), "vocab_size": VOCAB, **changes}
    return beam.search(model, params, prompts, settings, start_id=START if model.encode else None, **options)


def without_stop(ids: tuple[int, ...]) -> list[int]:
    return [token for token in ids if token != STOP]


@pytest.mark.parametrize(("name", "length_penalty"), [("llama", 1.0), ("llama", -1.0), ("t5", 0.0), ("transformer", 2.0)])
def test_enough_beams_find_the_likeliest_of_all_sequences(name: str, length_penalty: float) -> None:
    """Different lengths win under different penalties, or the test would not see how a length counts."""
    found = run(name, PROMPTS, beam.Settings(ALL, length_penalty))
    for prompt, best in zip(PROMPTS, found, strict=True):
        scores = every_score(name, prompt, length_penalty)
        assert len(scores) == ALL
        expected = max(scores, key=lambda ids: scores[ids])
        assert best.ids == without_stop(expected)
        np.testing.assert_allclose(best.score, scores[expected], rtol=1e-5, atol=1e-6)


def test_the_oracle_sees_the_length() -> None:
    lengths = {
        (name, penalty): len(max((scores := every_score(name, PROMPTS[0], penalty)), key=lambda ids: scores[ids]))
        for name in ("llama", "t5")
        for penalty in (-1.0, 2.0)
    }
    assert len(set(lengths.values())) > 1, lengths


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_a_prompt_does_not_depend_on_its_batch(name: str) -> None:
    settings = beam.Settings(3, early_stopping=True)
    together = run(name, PROMPTS, settings, max_new_tokens=9)
    alone = [run(name, [prompt], settings, max_new_tokens=9)[0] for prompt in PROMPTS]
    assert [best.ids for best in together] == [best.ids for best in alone]
    np.testing.assert_allclose([best.score for best in together], [best.score for best in alone], rtol=1e-5)


def test_one_beam_is_greedy_and_many_prompts_keep_their_order() -> None:
    """More prompts than fit beside each other with their beams."""
    model, params = made("llama")
    prompts = [[index % 3, index // 3 % 3, index // 9] for index in range(27)]
    options: dict[str, Any] = {"max_new_tokens": 6, "stop_ids": (STOP,), "vocab_size": VOCAB}
    greedy = generate.generate(model, params, prompts, Settings(temperature=0), seed=0, **options)
    assert [best.ids for best in beam.search(model, params, prompts, beam.Settings(1), **options)] == greedy
    wide = [best.ids for best in beam.search(model, params, prompts, beam.Settings(3, 0.0), **options)]
    assert wide == [run("llama", [prompt], beam.Settings(3, 0.0), max_new_tokens=6)[0].ids for prompt in prompts]


def scripted(p_of: dict[tuple[int, int], dict[int, float]], vocab: int) -> Model:
    """p_of[new tokens so far, last token][next token]; the other tokens share the rest. Its prompts are one token 0."""
    table = np.full((DEPTH, vocab, vocab), np.nan)
    for place, given in p_of.items():
        table[place] = (1 - sum(given.values())) / (vocab - len(given))
        table[place][list(given)] = list(given.values())
    log_p = jnp.log(jnp.array(np.nan_to_num(table, nan=1 / vocab)))

    def decode(params: Any, tokens_BT: jax.Array, lengths_B: jax.Array, cache: jax.Array) -> tuple[jax.Array, jax.Array]:
        return log_p[cache, jnp.take_along_axis(tokens_BT, lengths_B[:, None] - 1, axis=1)[:, 0]], cache + lengths_B

    class Sizes:
        context_tokens, head = 8, "lm"

    unused: Any = None
    cache: Any = lambda rows, length: jnp.zeros(rows, jnp.int32)  # noqa: E731
    return Model("scripted", Sizes, unused, unused, unused, unused, (), unused, cache, None, decode)


@pytest.mark.parametrize("early_stopping", [True, False])
def test_a_live_beam_is_hopeless_when_the_worst_that_ended_is_better(early_stopping: bool) -> None:
    """After two tokens "stop" has log 0.5, "1 stop" (log 0.04 + log 0.9) / 2, and the live "0 0" lies between: it may overtake both."""
    first, second, third = {STOP: 0.5, 0: 0.45, 1: 0.04}, {0: 0.5}, {0: 0.999}
    model = scripted({(0, 0): first, (1, 0): second, (1, 1): {STOP: 0.9}, (2, 0): third}, vocab=16)
    settings, options = beam.Settings(2, 1.0, early_stopping), {"max_new_tokens": 3, "stop_ids": (STOP,), "vocab_size": 16}
    (best,) = beam.search(model, {}, [[0]], settings, **options)
    overtaking = ([0, 0, 0], np.log(0.45 * 0.5 * 0.999) / 3)
    ids, score = ([], np.log(0.5)) if early_stopping else overtaking
    assert best.ids == ids
    np.testing.assert_allclose(best.score, score, rtol=1e-5)


def test_two_stop_ids_take_no_place_of_a_live_beam() -> None:
    """The likeliest of two tokens are "0 0", "0 stop", "0 other stop", "1 stop", "1 other stop" and only then "1 1", which wins."""
    other = 4
    second = {(1, 0): {0: 0.4, STOP: 0.3, other: 0.25}, (1, 1): {STOP: 0.26, other: 0.25, 1: 0.24}}
    model = scripted({(0, 0): {0: 0.5, 1: 0.45}, **second, (2, 1): {1: 0.99}}, vocab=16)
    options: dict[str, Any] = {"max_new_tokens": 3, "stop_ids": (STOP, other), "vocab_size": 16}
    (best,) = beam.search(model, {}, [[0]], beam.Settings(2), **options)
    assert best.ids == [1, 1, 1]
    np.testing.assert_allclose(best.score, np.log(0.45 * 0.24 * 0.99) / 3, rtol=1e-5)


def test_a_search_ends_at_the_context() -> None:
    (best,) = run("llama", [[1] * 14], beam.Settings(2), max_new_tokens=DEPTH, stop_ids=())
    assert len(best.ids) == 2


def cases() -> list[tuple[str, dict[str, Any]]]:
    files = sorted(GOLDEN.glob("*/generation.json"))
    return [(file.parent.name, search) for file in files for search in json.loads(file.read_text())["searches"]]


@cache
def opened(name: str) -> tuple[Model, Params, dict[str, Any], int]:
    found = directory.read(GOLDEN / name)
    written = json.loads((GOLDEN / name / "generation.json").read_text())
    stop = json.loads((GOLDEN / name / "config.json").read_text())["eos_token_id"]
    return models.build(found.config), jax.tree.map(jnp.asarray, weights.load(found).params), written, stop


@pytest.mark.parametrize(("name", "search"), cases(), ids=str)
def test_finds_what_transformers_finds(name: str, search: dict[str, Any]) -> None:
    """Greedy and beams, tokens and scores; these are stored with six places."""
    model, params, written, stop = opened(name)
    options: dict[str, Any] = {"max_new_tokens": written["new_tokens"], "stop_ids": (stop,), "vocab_size": model.config.vocab_size}
    options["start_id"] = 0 if model.encode else None
    expected = [ids[:-1] if ids[-1] == stop else ids for ids in search["tokens"]]
    if search["num_beams"] == 1:
        assert generate.generate(model, params, written["prompts"], Settings(temperature=0), seed=0, **options) == expected
        return
    settings = beam.Settings(search["num_beams"], search["length_penalty"], search["early_stopping"])
    found = beam.search(model, params, written["prompts"], settings, **options)
    assert [best.ids for best in found] == expected
    np.testing.assert_allclose([best.score for best in found], search["scores"], atol=1e-5)


def test_bad_requests_are_named() -> None:
    with pytest.raises(ValueError, match=r"num_beams = 0.\n  Accepted: 1 \(greedy\) or more"):
        beam.Settings(0)
    with pytest.raises(ValueError, match=r"max_new_tokens = 0.\n  Accepted: 1 or more"):
        run("llama", [[1]], beam.Settings(2), max_new_tokens=0)
