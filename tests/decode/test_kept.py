"""A cache that is kept between prompts: the same ids as without it, however the prompts begin alike, and no more read than is new."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm import config, models
from jaxllm.decode import generate
from jaxllm.decode.kept import Kept
from jaxllm.ops.sampling import Settings
from jaxllm.types import Model, Params

VOCAB, CONTEXT = 50, 64
OPTIONS: dict[str, Any] = {"stop_ids": (), "vocab_size": VOCAB, "seed": 5, "chunk_tokens": 3}


def made(objective: str, changes: dict[str, Any]) -> tuple[Model, Params]:
    settings = config.base()
    settings.train.objective = objective
    sizes = {"vocab_size": VOCAB, "context_tokens": CONTEXT, "layers": 2, "width": 32, "heads": 4, "kv_heads": 2, "init_std": 0.02}
    settings.model.update({**sizes, **changes})
    model = models.build(settings)
    return model, jax.tree.map(lambda x: 4 * x, model.init(jax.random.key(0)))


@pytest.fixture
def read_tokens(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Of each prompt, how many tokens are not read again."""
    out, take = [], Kept.take

    def spy(self: Kept, *given: Any) -> Any:
        before, count = take(self, *given)
        assert before.cache["lengths"] == count
        out.append(count)
        return before, count

    monkeypatch.setattr(Kept, "take", spy)
    return out


@pytest.mark.parametrize(
    ("objective", "changes", "stays"),
    [
        ("causal_lm", {"name": "llama", "layers_as": "scan", "window_tokens": 9}, True),
        ("causal_lm", {"name": "gpt", "kv_heads": 0}, True),
        ("causal_lm", {"rope_scaling": "dynamic", "rope_factor": 2.0, "rope_original_tokens": 16}, False),
        ("prefix_lm", {}, False),
    ],
    ids=["window, scan", "learned positions", "dynamic rope", "prefix"],
)
def test_ids_are_those_without_it(objective: str, changes: dict[str, Any], stays: bool, read_tokens: list[int]) -> None:
    """Longer and shorter prompts in turn, so that the cache grows and shrinks; the last has room for two tokens."""
    model, params = made(objective, changes)
    settings, kept, common, asked = Settings(temperature=0.9, top_k=20, repetition_penalty=1.2), Kept(), [0], [[3, 1, 4, 1, 5]]

    def write(prompt: list[int], **given: Any) -> list[int]:
        *_, ids = generate.stream(model, params, prompt, settings, **OPTIONS, **given)
        return ids

    def ask(prompt: list[int], expected_common: int, max_new_tokens: int = 8) -> list[int]:
        new = write(prompt, max_new_tokens=max_new_tokens, kept=kept)
        assert new == write(prompt, max_new_tokens=max_new_tokens)
        common.append(expected_common)
        return new

    first = asked[0]
    new = write(first, max_new_tokens=8, kept=kept)
    second = [*first, *new, 9, 8, 7]
    more = ask(second, len(first) + 7)
    ask([*second, *more[:3], 0, 0], len(second) + 3)
    ask([*second, *more[:3], 0, 0], len(second) + 4)
    ask([*second[:6], *[2] * 56], 6, max_new_tokens=2)
    ask(first, 4)
    ask([30, 31], 0)
    assert read_tokens == (common if stays else [0] * len(common))


def test_logits_are_those_of_the_full_forward_pass() -> None:
    """To the rounding of float32: of the prompt's last token, most of which was read for another prompt."""
    model, params = made("causal_lm", {})
    kept, prompt = Kept(), [(7 * index) % VOCAB for index in range(40)]
    list(generate.stream(model, params, prompt[:30], Settings(temperature=0), max_new_tokens=9, kept=kept, **OPTIONS))
    program = generate.network.make(model, generate.batching.pad([prompt], np.zeros((1, 2)), [4], CONTEXT), VOCAB, None)
    before, count = kept.take(model, program, prompt)
    assert count == 30
    rest = generate.batching.pad([prompt[count:]], np.zeros((1, 2)), [4], CONTEXT)
    logits_BV, state, seen_BV = generate.network.start(program, params, rest, before)
    np.testing.assert_allclose(logits_BV[0], jax.jit(model.apply)(params, jnp.array([prompt]))[0, -1], rtol=1e-4, atol=1e-5)
    assert (int(state["lengths"][0]), set(np.flatnonzero(seen_BV[0]))) == (40, set(prompt))


def test_an_answer_that_is_broken_off_is_kept_as_far_as_it_came(read_tokens: list[int]) -> None:
    model, params = made("causal_lm", {})
    kept, prompt = Kept(), [3, 1, 4]
    growing = generate.stream(model, params, prompt, Settings(temperature=0), max_new_tokens=20, kept=kept, **OPTIONS)
    new = [next(growing), next(growing)][-1]
    growing.close()  # type: ignore[attr-defined]
    list(generate.stream(model, params, [*prompt, *new, 9], Settings(temperature=0), max_new_tokens=1, kept=kept, **OPTIONS))
    assert read_tokens == [0, len(prompt) + len(new) - 1]


def test_nothing_is_kept_of_an_answer_that_failed_while_it_was_computed(
    read_tokens: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As by Ctrl-C: the arrays of the cache were given away, and the next prompt is read from its beginning."""
    model, params = made("causal_lm", {})
    proceed, prompt, kept = generate._continue, [3, 1, 4], Kept()

    def interrupted(*given: Any) -> Any:
        proceed(*given)
        raise KeyboardInterrupt

    def write(kept: Kept | None) -> list[int]:
        *_, ids = generate.stream(model, params, prompt, Settings(temperature=0), max_new_tokens=6, kept=kept, **OPTIONS)
        return ids

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(generate, "_continue", interrupted)
        write(kept)
    assert write(kept) == write(None)
    assert read_tokens == [0, 0]
