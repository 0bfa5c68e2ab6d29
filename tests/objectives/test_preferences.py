"""Objectives of preferences: each answer alone in NumPy, sums over micro-batches, meshes and stages, and what is missing or wrong."""

from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_training
from forked_rows import Forked, alone, draw, pack

from jaxllm.engine import gradients, state
from jaxllm.parallel import region as regions
from jaxllm.types import Mean

OBJECTIVES = ("dpo", "orpo", "simpo", "kto")
VOCAB, WIDTH = tiny_training.VOCAB, 32
SIZES = {"model__context_tokens": WIDTH, "chat__template": "chatml"}


@cache
def rows() -> tuple[tuple[Forked, ...], ...]:
    """Eight rows of one to three pairs, of unequal lengths."""
    rng = np.random.default_rng(0)
    sizes = [
        [(4, 3, 5), (3, 2, 4)],
        [(5, 6, 7)],
        [(2, 1, 1), (3, 2, 2), (1, 4, 3)],
        [(6, 9, 3)],
        [(4, 2, 6), (2, 3, 3)],
        [(9, 4, 5)],
        [(1, 1, 2), (2, 3, 1), (3, 2, 2)],
        [(8, 7, 2)],
    ]
    return tuple(tuple(draw(rng, VOCAB, *each) for each in row) for row in sizes)


def batch(shift: float = 1.0) -> dict[str, np.ndarray]:
    """With references that are `shift` times the noise of a token away from an equal guess; every second segment is good."""
    made, rng = pack(rows(), WIDTH), np.random.default_rng(5)
    made["reference"] = (-np.log(VOCAB) + shift * rng.normal(size=made["tokens"].shape)).astype(np.float32)
    made["desirable"] = (made["segments"] % 2).astype(np.int32) * (made["segments"] > 0)
    # A mismatched answer that the reference thinks less likely: the divergence is above 0.
    made["reference"] -= (made["branches"] == 2).astype(np.float32) * 2
    return made


def placed(training: tiny_training.Training, arrays: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    return training.place(
        {name: array for name, array in arrays.items() if name != "desirable" or training.config.train.objective == "kto"}
    )


def sums(training: tiny_training.Training, arrays: dict[str, np.ndarray]) -> Any:
    """The sums of a step at the first state."""
    model, config = training.model, training.config
    region = regions.Region(training.plan, model.axes, tuple(each.path for each in model.stacks))
    found = gradients.make(training.objective, model, config, region)
    return jax.jit(found, static_argnums=2)(training.create(), placed(training, arrays), None)


def oracle(objective: str, training: tiny_training.Training, arrays: dict[str, np.ndarray]) -> dict[str, float]:
    """The metrics in float64, from logits of each prompt and answer in a row of their own."""
    params, apply = state.full_params(training.create()), jax.jit(training.model.apply)
    of = []  # (log p, reference, tokens) of both answers, and whether the first is good
    for row, forked_rows in enumerate(rows()):
        for segment, forked in enumerate(forked_rows, 1):
            both = []
            for branch, answer in enumerate(forked.answers, 1):
                logits = np.asarray(apply(params, alone(forked, branch))[0, -len(answer) :], np.float64)
                log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
                mine = (arrays["segments"][row] == segment) & (arrays["branches"][row] == branch)
                both.append((log_p[np.arange(len(answer)), answer].sum(), arrays["reference"][row][mine].sum(), len(answer)))
            of.append((*both, segment % 2 == 1))
    (chosen, rejected), good = (np.array([pair[i] for pair in of], np.float64) for i in (0, 1)), np.array([pair[2] for pair in of])
    return _kto(chosen, rejected, good) if objective == "kto" else _pairs(objective, chosen, rejected)


def logistic(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def _pairs(objective: str, chosen: np.ndarray, rejected: np.ndarray) -> dict[str, float]:
    """Rafailov et al. 2023, eq. 7; Hong et al. 2024, eq. 6 and 7; Meng et al. 2024, eq. 6."""
    beta = 2.0 if objective == "simpo" else 0.1
    score = [x[:, 0] - x[:, 1] if objective == "dpo" else x[:, 0] / x[:, 2] for x in (chosen, rejected)]
    logp = [x[:, 0] if objective == "dpo" else x[:, 0] / x[:, 2] for x in (chosen, rejected)]
    if objective == "orpo":
        p = [np.exp(x) for x in score]
        ratio = p[0] / (1 - p[0]) / (p[1] / (1 - p[1]))
        loss = -score[0] - beta * np.log(logistic(np.log(ratio)))
    else:
        loss = -np.log(logistic(beta * (score[0] - score[1]) - (0.5 if objective == "simpo" else 0)))
    each = {
        "loss": loss,
        "accuracy": score[0] > score[1],
        "margin": beta * (score[0] - score[1]),
        "chosen_reward": beta * score[0],
        "rejected_reward": beta * score[1],
        "chosen_logp": logp[0],
        "rejected_logp": logp[1],
    }
    return {name: float(values.mean()) for name, values in each.items()}


def _kto(answers: np.ndarray, mismatched: np.ndarray, good: np.ndarray) -> dict[str, float]:
    """Ethayarajh et al. 2024, eq. 8, with weights of 1."""
    ratio = answers[:, 0] - answers[:, 1]
    kl = max(0.0, (mismatched[:, 0] - mismatched[:, 1]).mean())
    assert kl > 0
    reward, sign = 0.1 * ratio, np.where(good, 1, -1)
    loss = 1 - logistic(sign * 0.1 * (ratio - kl))
    sides = {"chosen": good, "rejected": ~good}
    found = {
        f"{side}_{name}": x[which].mean()
        for side, which in sides.items()
        for name, x in (("reward", reward), ("logp", answers[:, 0]))
    }
    return {"loss": loss.mean(), "kl": kl, **found}


def means(metrics: dict[str, Mean]) -> dict[str, float]:
    return {name: float(each.total / each.weight) for name, each in metrics.items()}


@pytest.mark.parametrize("name", ["gpt", "llama"])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_packed_pairs_have_the_numbers_of_each_answer_alone(objective: str, name: str) -> None:
    kv_heads = 2 if name == "llama" else 0
    training = tiny_training.make(train__objective=objective, model__name=name, model__kv_heads=kv_heads, **SIZES)
    found = sums(training, batch())
    expected = oracle(objective, training, batch())
    assert means(found.metrics).keys() == expected.keys()
    for metric, value in means(found.metrics).items():
        np.testing.assert_allclose(value, expected[metric], rtol=1e-6, atol=1e-6, err_msg=metric)
    pairs = sum(map(len, rows()))
    assert found.mean.weight == pairs and found.metrics["loss"].weight == pairs
    assert float(found.mean.total) == float(found.metrics["loss"].total)


def reference_of(training: tiny_training.Training, arrays: dict[str, np.ndarray]) -> np.ndarray:
    """What the first state says of the targets."""
    read = {name: arrays[name] for name in ("segments", "positions", "branches")}
    logits = training.model.apply(state.full_params(training.create()), arrays["tokens"], **read)
    return np.take_along_axis(np.asarray(jax.nn.log_softmax(logits)), arrays["targets"][..., None], -1)[..., 0]


@pytest.mark.parametrize(("objective", "loss"), [("dpo", np.log(2)), ("kto", 0.5)])
def test_training_begins_with_the_loss_of_no_preference(objective: str, loss: float) -> None:
    training = tiny_training.make(train__objective=objective, **SIZES)
    arrays = batch()
    arrays["reference"] = reference_of(training, arrays)
    found = means(sums(training, arrays).metrics)
    np.testing.assert_allclose(found["loss"], loss, rtol=1e-6)
    rewards = [found[name] for name in ("chosen_reward", "rejected_reward")]
    np.testing.assert_allclose(rewards, 0, atol=1e-6)


def test_equal_rewards_are_not_right() -> None:
    training = tiny_training.make(train__objective="simpo", **SIZES)
    same = Forked([1, 2, 3], [[4, 5], [4, 5]])
    found = sums(training, {**batch(), **pack([[same]] * 8, WIDTH)})
    assert found.metrics["accuracy"] == Mean(0, 8)


def assert_equal_sums(found: Any, expected: Any) -> None:
    """1e-6 of the largest entry of each array, or of 14, the number of pairs: a sum of so many terms of about 1 may be near 0."""
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-6 * max(14, np.abs(other).max()))


@pytest.mark.parametrize("objective", ["dpo", "orpo", "simpo"])
def test_one_micro_batch_of_eight_rows_is_eight_of_one(objective: str) -> None:
    whole, parts = (tiny_training.make(train__objective=objective, train__microbatches=count, **SIZES) for count in (1, 8))
    assert_equal_sums(sums(parts, batch()), sums(whole, batch()))


MESHES = [
    {"parallel__data": 8},
    {"parallel__data": 2, "parallel__fsdp": 2, "parallel__tensor": 2},
    {"parallel__fsdp": 4, "parallel__zero_stage": 2, "train__microbatches": 2},
]


@pytest.mark.parametrize("mesh", MESHES, ids=str)
@pytest.mark.parametrize("objective", ["dpo", "kto"])
def test_a_mesh_has_the_sums_of_one_device(objective: str, mesh: dict[str, int]) -> None:
    # The divergence of kto is that of a micro-batch on all devices, so both must cut the batch alike.
    one = {"train__microbatches": mesh.get("train__microbatches", 1)}
    expected = sums(tiny_training.make(train__objective=objective, **SIZES, **one), batch())
    assert_equal_sums(sums(tiny_training.make(train__objective=objective, **SIZES, **mesh), batch()), expected)


@pytest.mark.parametrize("objective", ["dpo", "kto"])
@pytest.mark.usefixtures("compiled_anew")
def test_a_pipeline_has_the_sums_of_one_device(objective: str) -> None:
    layers = {"model__layers": 2, "model__layers_as": "scan", "train__microbatches": 2, **SIZES}
    expected = sums(tiny_training.make(train__objective=objective, **layers), batch())
    piped = tiny_training.make(train__objective=objective, parallel__pipe=2, parallel__data=2, **layers)
    assert_equal_sums(sums(piped, batch()), expected)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_rows_without_pairs_count_nothing(objective: str) -> None:
    training = tiny_training.make(train__objective=objective, **SIZES)
    arrays = batch()
    arrays["weights"] = arrays["weights"] * 0
    found = sums(training, arrays)
    assert found.mean == Mean(0, 0)
    assert not any(np.any(gradient) for gradient in jax.tree.leaves(found.gradients))


def test_half_a_pair_is_none() -> None:
    training = tiny_training.make(train__objective="dpo", **SIZES)
    arrays = batch()
    without = (arrays["segments"] == 1) & (arrays["branches"] == 2)
    arrays["weights"] = np.where(without, 0, arrays["weights"]).astype(np.float32)
    assert sums(training, arrays).mean.weight == sum(map(len, rows())) - len(rows())


def test_a_target_outside_the_vocabulary_is_not_a_number() -> None:
    training = tiny_training.make(train__objective="dpo", **SIZES)
    arrays = batch()
    place = np.unravel_index(np.flatnonzero(arrays["weights"])[3], arrays["weights"].shape)
    arrays["targets"][place] = VOCAB
    assert np.isnan(sums(training, arrays).mean.total)
    arrays["weights"][place] = 0
    assert jnp.isfinite(sums(training, arrays).mean.total)
