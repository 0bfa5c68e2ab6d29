"""Distillation: NumPy's numbers for whole batches, sums over micro-batches, meshes, stages and cut rows, and what counts nothing."""

from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_training

from jaxllm.engine import gradients, references, state
from jaxllm.objectives import scores
from jaxllm.parallel import measure
from jaxllm.parallel import region as regions

ROWS, LENGTH, VOCAB, TOP = tiny_training.ROWS, tiny_training.LENGTH, tiny_training.VOCAB, 5
BASE = {"train__objective": "distill", "distill__teacher": "a teacher", "distill__top_k": TOP, "distill__hard_frac": 0.0}


def make(**fields: Any) -> tiny_training.Training:
    return tiny_training.make(**BASE | fields)


@cache
def teacher(temperature: float = 1.0, top: int = TOP) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(log p [B, T, V] of random logits in float64, ids [B, T, K], log p [B, T, K + 1])."""
    logits = np.random.default_rng(3).normal(size=(ROWS, LENGTH, VOCAB)) * 2 / temperature
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    ids = np.argsort(-log_p, axis=-1)[..., :top]
    return log_p, ids, outcomes(log_p, ids)


def outcomes(log_p: np.ndarray, ids: np.ndarray) -> np.ndarray:
    rest = np.exp(log_p)
    np.put_along_axis(rest, ids, 0, -1)
    return np.concatenate([np.take_along_axis(log_p, ids, -1), np.log(rest.sum(-1, keepdims=True))], -1)


def batch(temperature: float = 1.0) -> dict[str, np.ndarray]:
    _, ids, log_p = teacher(temperature)
    made = {"teacher_ids": ids.reshape(ROWS, -1).astype(np.int32), "teacher": log_p.reshape(ROWS, -1).astype(np.float32)}
    return tiny_training.batch() | made


def region_of(training: tiny_training.Training) -> regions.Region:
    return regions.Region(training.plan, training.model.axes, tuple(each.path for each in training.model.stacks))


def sums(training: tiny_training.Training, arrays: dict[str, np.ndarray]) -> Any:
    """The sums of a step at the first state."""
    found = gradients.make(training.objective, training.model, training.config, region_of(training))
    arranged = {name: training.plan.in_order(array) for name, array in arrays.items()}
    return jax.jit(found, static_argnums=2)(training.create(), training.place(arranged), None)


@pytest.mark.parametrize("chunk", [0, 32])
@pytest.mark.parametrize(("kl", "temperature", "hard"), [("forward", 1.0, 0.0), ("forward", 2.0, 0.3), ("reverse", 0.5, 0.1)])
def test_the_loss_is_that_of_numpy(kl: str, temperature: float, hard: float, chunk: int) -> None:
    fields = {"distill__kl": kl, "distill__temperature": temperature, "distill__hard_frac": hard, "train__loss_chunk_tokens": chunk}
    training, arrays = make(**fields), batch(temperature)
    read = {name: jnp.asarray(arrays[name]) for name in ("segments", "positions")}
    logits = np.asarray(training.model.apply(state.full_params(training.create()), arrays["tokens"], **read), np.float64)
    log_q, log_q_t = (x - np.log(np.exp(x).sum(-1, keepdims=True)) for x in (logits, logits / temperature))
    p, q = teacher(temperature)[2], outcomes(log_q_t, teacher(temperature)[1])
    first, second = (p, q) if kl == "forward" else (q, p)
    each = (np.exp(first) * (first - second)).sum(-1)
    nll = -np.take_along_axis(log_q, arrays["targets"][..., None], -1)[..., 0]
    weights = arrays["weights"].astype(np.float64)
    expected = {
        "loss": (weights * nll).sum(),
        "kl": (weights * each).sum(),
        "accuracy": (weights * (log_q.argmax(-1) == arrays["targets"])).sum(),
        "covered": (weights * np.exp(p[..., :-1]).sum(-1)).sum(),
    }
    found = sums(training, arrays)
    assert found.metrics.keys() == expected.keys()
    for name, total in expected.items():
        np.testing.assert_allclose(found.metrics[name].total, total, rtol=2e-6, err_msg=name)
        np.testing.assert_allclose(found.metrics[name].weight, weights.sum())
    # Hinton et al. 2015, section 2: times the square of the temperature.
    minimized = (1 - hard) * temperature**2 * expected["kl"] + hard * expected["loss"]
    np.testing.assert_allclose(found.mean.total, minimized, rtol=2e-6)


def assert_equal_sums(found: Any, expected: Any) -> None:
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=2e-6 * max(10, np.abs(other).max()))


@pytest.mark.parametrize("kl", ["forward", "reverse"])
def test_one_micro_batch_of_eight_rows_is_eight_of_one(kl: str) -> None:
    whole, parts = (make(distill__kl=kl, distill__hard_frac=0.2, train__microbatches=count) for count in (1, 8))
    assert_equal_sums(sums(parts, batch()), sums(whole, batch()))


MESHES = [
    {"parallel__data": 8},
    {"parallel__data": 2, "parallel__fsdp": 2, "parallel__tensor": 2},
    {"parallel__fsdp": 4, "parallel__zero_stage": 2, "train__microbatches": 2},
    {"parallel__seq": 2, "parallel__fsdp": 2},
    {"parallel__seq": 4, "parallel__context": "ulysses"},
]


@pytest.mark.parametrize("mesh", MESHES, ids=str)
@pytest.mark.usefixtures("compiled_anew")
def test_a_mesh_has_the_sums_of_one_device(mesh: dict[str, Any]) -> None:
    heads = {"model__kv_heads": 4}
    assert_equal_sums(
        sums(make(distill__hard_frac=0.2, **heads, **mesh), batch()), sums(make(distill__hard_frac=0.2, **heads), batch())
    )


PIPELINE = {"model__layers": 2, "model__layers_as": "scan", "train__microbatches": 2}


@pytest.mark.usefixtures("compiled_anew")
def test_a_pipeline_has_the_sums_of_one_device() -> None:
    expected = sums(make(**PIPELINE), batch())
    assert_equal_sums(sums(make(parallel__pipe=2, parallel__data=2, **PIPELINE), batch()), expected)


def test_what_counts_nothing_need_not_be_a_number() -> None:
    arrays = batch()
    counted = arrays["weights"] > 0
    for name in ("teacher", "teacher_ids"):
        kept = arrays[name].reshape(ROWS, LENGTH, -1)
        arrays[name] = np.where(counted[..., None], kept, 0).astype(kept.dtype).reshape(ROWS, -1)
    assert_equal_sums(sums(make(), arrays), sums(make(), batch()))
    arrays["weights"] = np.zeros_like(arrays["weights"])
    found = sums(make(), arrays)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(found))


@pytest.mark.parametrize("mesh", [{}, *MESHES[1:4], {"parallel__pipe": 2, **PIPELINE}], ids=str)
@pytest.mark.usefixtures("compiled_anew")
def test_a_teacher_scores_alike_on_every_mesh(mesh: dict[str, Any]) -> None:
    """Each token's numbers stand where they belong, whatever the devices hold, and are those of NumPy."""
    training = make(**mesh)
    objective = scores.TopScores(training.model, 32, ROWS * LENGTH, TOP, 1.5, VOCAB - 1)
    arrays = tiny_training.batch()
    place = np.arange(ROWS * LENGTH, dtype=np.int32).reshape(ROWS, LENGTH)
    arranged = {name: training.plan.in_order(array) for name, array in (arrays | {scores.PLACE: place}).items()}
    params = state.full_params(training.create())
    run = jax.jit(measure.make(objective, training.model, training.config, region_of(training)))
    found = {name: np.asarray(each.total) for name, each in run(params, training.place(arranged)).items()}
    alone = tiny_training.make(**{name: value for name, value in mesh.items() if name in PIPELINE})
    read = {name: jnp.asarray(arrays[name]) for name in ("segments", "positions")}
    logits = np.asarray(alone.model.apply(state.full_params(alone.create()), arrays["tokens"], **read), np.float64)
    logits = logits[..., : VOCAB - 1] / 1.5
    log_p = (logits - np.log(np.exp(logits).sum(-1, keepdims=True))).reshape(-1, VOCAB - 1)
    counted = arrays["weights"].reshape(-1) > 0
    assert not found["ids"][~counted].any() and not found["log_p"][~counted].any()
    np.testing.assert_array_equal(found["ids"][counted], np.argsort(-log_p, axis=-1)[counted, :TOP])
    np.testing.assert_allclose(found["log_p"][counted], outcomes(log_p, found["ids"])[counted], rtol=0, atol=2e-6)


def test_a_batch_has_room_for_what_the_teacher_says() -> None:
    arrays = references.arrays(make().config)
    made = batch()
    assert {name: (array.width, array.dtype) for name, array in arrays.items()} == {
        name: (made[name].shape[1], made[name].dtype.type) for name in ("teacher_ids", "teacher")
    }
