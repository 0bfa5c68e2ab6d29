"""The objective of reward models: TRL's losses and gradients, each answer alone in a row, meshes and micro-batches, and what is missing."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_training

from jaxllm import config as configs
from jaxllm.data.examples import forked
from jaxllm.data.examples.contract import count_positions
from jaxllm.engine import gradients, state
from jaxllm.models import heads
from jaxllm.objectives import rewards
from jaxllm.parallel import region as regions
from jaxllm.types import Mean

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "rewards.json").read_text(encoding="utf-8"))
VOCAB, WIDTH = tiny_training.VOCAB, 40
SIZES = {
    "train__objective": "reward",
    "model__head": "classify",
    "model__classes": 1,
    "model__context_tokens": WIDTH,
    "chat__template": "chatml",
    "reward__centering": 0.0,
}
MODELS = {
    "gpt": {"model__name": "gpt", "model__kv_heads": 0},
    "llama": {},
    "bert": {"model__name": "bert", "model__kv_heads": 0},
}
# Tokens of prompt, chosen and rejected answer of the pairs of each row.
LENGTHS = (
    [(4, 3, 5), (3, 2, 4)],
    [(5, 6, 7)],
    [(2, 1, 1), (3, 2, 2)],
    [(6, 9, 3)],
    [(4, 2, 6), (2, 3, 3)],
    [(9, 4, 5)],
    [(1, 1, 2), (2, 3, 1), (3, 2, 2)],
    [(8, 7, 2)],
)
PAIRS = sum(map(len, LENGTHS))


def training(name: str = "llama", **changes: Any) -> tiny_training.Training:
    return tiny_training.make(**(SIZES | MODELS[name] | changes))


@cache
def drawn() -> tuple[tuple[tuple[list[np.ndarray], int, float], ...], ...]:
    """Of each pair of each row: the ids of the prompt with either answer, the length of the prompt, and a margin."""
    rng = np.random.default_rng(0)
    rows = []
    for lengths in LENGTHS:
        row = []
        for prompt, *answers in lengths:
            asked = rng.integers(0, VOCAB, prompt)
            ids = [np.concatenate([asked, rng.integers(0, VOCAB, answer)]).astype(np.int32) for answer in answers]
            row.append((ids, prompt, float(np.float32(rng.uniform(-0.5, 2)))))
        rows.append(tuple(row))
    return tuple(rows)


def batch(name: str = "llama") -> dict[str, np.ndarray]:
    """The arrays of a batch, as the data side makes them."""
    names = ("tokens", "targets", "segments", "branches", "weights", "margins")
    made = {each: np.zeros((len(LENGTHS), WIDTH), np.int32) for each in names}
    made["margins"] = made["margins"].astype(np.float32)
    for row, pairs in enumerate(drawn()):
        start = 0
        for number, (ids, prompt, margin) in enumerate(pairs, 1):
            side = forked.apart(ids) if name == "bert" else forked.read(ids, prompt)
            place = slice(start, start + len(side["tokens"]))
            assert place.stop <= WIDTH
            for key, values in (side | {"segments": number, "margins": margin}).items():
                made[key][row, place] = values
            start = place.stop
    made["weights"] = made["weights"].astype(np.float32)
    if name != "bert":
        return made | {"positions": forked.positions(made["segments"], made["branches"])}
    pairs = made["segments"]
    segments = np.where(pairs > 0, 2 * pairs - (made["branches"] == 1), 0)
    return made | {"pairs": pairs, "segments": segments, "positions": count_positions(segments)}


def sums(made: tiny_training.Training, arrays: dict[str, np.ndarray]) -> Any:
    """The sums of a step at the first state."""
    region = regions.Region(made.plan, made.model.axes, tuple(each.path for each in made.model.stacks))
    found = gradients.make(made.objective, made.model, made.config, region)
    return jax.jit(found, static_argnums=2)(made.create(), made.place(arrays), None)


def means(metrics: dict[str, Mean]) -> dict[str, float]:
    return {name: float(each.total / each.weight) for name, each in metrics.items()}


def oracle(made: tiny_training.Training, centering: float = 0, factor: float = 1) -> dict[str, float]:
    """The metrics in float64, from the logit of each prompt and answer in a row of their own."""
    params, apply = state.full_params(made.create()), jax.jit(made.model.apply)
    read = 0 if made.model.name == "bert" else -1
    found = [[float(apply(params, each[None])[0, read, 0]) for each in ids] + [margin] for row in drawn() for ids, _, margin in row]
    chosen, rejected, margin = np.array(found, np.float64).T
    each = {
        "loss": np.log1p(np.exp(-(chosen - rejected - factor * margin))),
        "accuracy": chosen > rejected,
        "margin": chosen - rejected,
        "chosen_reward": chosen,
        "rejected_reward": rejected,
    }
    if centering:
        each["penalty"] = centering * (chosen + rejected) ** 2
    return {name: float(values.mean()) for name, values in each.items()}


@pytest.mark.parametrize("case", GOLDEN["cases"], ids=lambda case: f"margins {case['margins']} centering {case['centering']}")
def test_loss_and_gradients_are_those_of_trl(case: dict[str, Any]) -> None:
    chosen, rejected = (jnp.asarray(GOLDEN[name], jnp.float32) for name in ("chosen", "rejected"))
    margin = jnp.asarray(GOLDEN["margin"], jnp.float32) * case["margins"]
    objective = rewards.Rewards(tiny_training.make().model, case["centering"], 1.0, ())

    def mean(chosen: jax.Array, rejected: jax.Array) -> tuple[jax.Array, Any]:
        loss, metrics = objective.of_pairs(rewards.Compared(chosen, rejected, margin, jnp.ones_like(chosen)))
        return loss.total / loss.weight, metrics

    (value, metrics), found = jax.value_and_grad(mean, (0, 1), has_aux=True)(chosen, rejected)
    np.testing.assert_allclose(value, case["loss"], rtol=1e-6)
    for gradient, name in zip(found, ("chosen", "rejected"), strict=True):
        np.testing.assert_allclose(gradient, case[f"gradients_{name}"], rtol=1e-6, atol=1e-7)
    for name in ("accuracy", "margin"):
        np.testing.assert_allclose(means(metrics)[name], case[name], rtol=1e-6)


@pytest.mark.parametrize("fields", [{}, {"reward__centering": 0.1, "reward__margin_factor": 0.5}], ids=["plain", "centred"])
@pytest.mark.parametrize("name", MODELS)
def test_packed_pairs_have_the_numbers_of_each_answer_alone(name: str, fields: dict[str, float]) -> None:
    made = training(name, **fields)
    found = sums(made, batch(name))
    expected = oracle(made, fields.get("reward__centering", 0), fields.get("reward__margin_factor", 1))
    assert means(found.metrics).keys() == expected.keys()
    for metric, value in means(found.metrics).items():
        np.testing.assert_allclose(value, expected[metric], rtol=1e-5, atol=1e-6, err_msg=metric)
    assert {float(each.weight) for each in found.metrics.values()} == {PAIRS}
    minimized = found.metrics["loss"].total + (found.metrics["penalty"].total if fields else 0)
    np.testing.assert_allclose(found.mean.total, minimized, rtol=1e-7)


@pytest.mark.parametrize("name", MODELS)
def test_what_the_other_answer_says_changes_no_bit_of_a_reward(name: str) -> None:
    made, arrays = training(name), batch(name)
    params = state.full_params(made.create())
    other = (arrays["branches"] == 2) & (arrays["weights"] == 0)
    changed = {**arrays, "tokens": np.where(other, (arrays["tokens"] + 7) % VOCAB, arrays["tokens"])}

    @jax.jit
    def compare(arrays: Any) -> rewards.Compared:
        hidden = made.model.hidden(params, arrays["tokens"], **{each: arrays[each] for each in made.objective.reads})
        return made.objective.compare(hidden, made.model.head(params), arrays)

    before, after = compare(arrays), compare(changed)
    np.testing.assert_array_equal(before.chosen, after.chosen)
    assert (before.rejected != after.rejected).sum() >= PAIRS - 3  # answers of one token have none before their last one
    assert before.there.sum() == PAIRS


def assert_equal_sums(found: Any, expected: Any) -> None:
    """1e-6 of the largest entry of each array, or of the number of pairs: a sum of so many terms of about 1 may be near 0."""
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-6 * max(PAIRS, np.abs(other).max()))


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_one_micro_batch_of_eight_rows_is_eight_of_one(name: str) -> None:
    whole, parts = (training(name, reward__centering=0.1, train__microbatches=count) for count in (1, 8))
    assert_equal_sums(sums(parts, batch(name)), sums(whole, batch(name)))


MESHES = [
    {"parallel__fsdp": 4, "parallel__data": 2},
    {"parallel__data": 2, "parallel__fsdp": 2, "parallel__tensor": 2, "train__microbatches": 2},
]


@pytest.mark.parametrize("mesh", MESHES, ids=str)
@pytest.mark.parametrize("name", ["llama", "bert"])
def test_a_mesh_has_the_sums_of_one_device(name: str, mesh: dict[str, int]) -> None:
    assert_equal_sums(
        sums(training(name, reward__centering=0.1, **mesh), batch(name)), sums(training(name, reward__centering=0.1), batch(name))
    )


@pytest.mark.usefixtures("compiled_anew")
def test_a_pipeline_has_the_sums_of_one_device() -> None:
    layers = {"model__layers": 2, "model__layers_as": "scan", "train__microbatches": 2}
    expected = sums(training(**layers), batch())
    assert_equal_sums(sums(training(parallel__pipe=2, parallel__data=2, **layers), batch()), expected)


def test_half_a_pair_is_none_and_no_pair_has_no_gradient() -> None:
    made, arrays = training(), batch()
    without = (arrays["segments"] == 1) & (arrays["branches"] == 2)
    arrays["weights"] = np.where(without, 0, arrays["weights"]).astype(np.float32)
    assert sums(made, arrays).mean.weight == PAIRS - len(LENGTHS)
    found = sums(made, {**arrays, "weights": arrays["weights"] * 0})
    assert found.mean == Mean(0, 0)
    assert not any(np.any(gradient) for gradient in jax.tree.leaves(found.gradients))


def test_equal_rewards_are_not_right_and_have_the_loss_of_a_guess() -> None:
    made, arrays = training(), batch()
    params = state.full_params(made.create())
    head = jax.tree.map(jnp.zeros_like, made.model.head(params))
    assert heads.logits(jnp.ones((1, 1, 32)), head).shape == (1, 1, 1)
    _, metrics = made.objective.of_hidden(
        made.model.hidden(params, arrays["tokens"]), head, {**arrays, "margins": arrays["margins"] * 0}
    )
    assert means(metrics)["accuracy"] == 0
    np.testing.assert_allclose(means(metrics)["loss"], np.log(2), rtol=1e-6)


def test_a_reward_is_one_number() -> None:
    config = tiny_training.config_of({key.replace("__", "."): value for key, value in SIZES.items()} | {"model.classes": 0})
    assert configs.with_classes(config, 0).model.classes == 1
    config.model.classes = 2
    with pytest.raises(ValueError, match=r"model.classes = 2 with train.objective = 'reward': .*\n  Accepted: 1, or 0"):
        configs.check(config)
