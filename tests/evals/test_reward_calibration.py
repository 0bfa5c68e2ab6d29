"""Calibration of rewards against NumPy: bins, shares and their error, over batches and devices that see different pairs."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import tiny_training

from jaxllm.evals import calibration, metrics
from jaxllm.objectives.rewards import Compared, Rewards
from jaxllm.objectives.tokens import Tokens


def objective() -> Any:
    return calibration.added(Rewards(tiny_training.make().model, 0.0, 1.0, ()))


def sums(pairs: list[Compared]) -> dict[str, np.ndarray]:
    total: dict[str, Any] = {}
    for each in pairs:
        for name, mean in objective().of_pairs(each)[1].items():
            total[name] = total.get(name, 0) + np.array(mean, np.float64)
    return total


def draw(seed: int, shape: tuple[int, int] = (8, 5)) -> Compared:
    rng = np.random.default_rng(seed)
    there = rng.random(shape) < 0.7
    chosen, rejected = (np.where(there, rng.normal(size=shape), 0).astype(np.float32) for _ in range(2))
    return Compared(jnp.asarray(chosen), jnp.asarray(rejected), jnp.zeros(shape), jnp.asarray(there, jnp.float32))


def oracle(chosen: np.ndarray, rejected: np.ndarray) -> tuple[float, list[list[float]]]:
    """Guo et al. 2017, eq. 3, pair by pair."""
    p = 1 / (1 + np.exp(-np.abs(chosen - rejected).astype(np.float64)))
    edges, bins, error = np.linspace(0.5, 1, 11), [], 0.0
    for low, high in zip(edges[:-1], edges[1:], strict=True):
        mine = (p >= low) & ((p < high) | (high == 1))
        if mine.any():
            right = (chosen > rejected)[mine].mean()
            bins.append([p[mine].mean(), right, mine.sum()])
            error += mine.sum() / len(p) * abs(p[mine].mean() - right)
    return error, bins


def test_bins_and_error_are_those_of_numpy() -> None:
    pairs = [draw(0), draw(1)]
    told = calibration.told(sums(pairs))
    there = np.concatenate([np.asarray(each.there).ravel() > 0 for each in pairs])
    chosen, rejected = (
        np.concatenate([np.asarray(getattr(each, name)).ravel() for each in pairs])[there] for name in Compared._fields[:2]
    )
    error, bins = oracle(chosen, rejected)
    assert len(bins) > 5
    np.testing.assert_allclose(told["calibration"], bins, rtol=1e-6)
    np.testing.assert_allclose(told["calibration_error"], error, rtol=1e-6)


def test_a_model_that_is_as_sure_as_it_is_right_has_no_error() -> None:
    """Rewards that are the truth: of many pairs with the probability p of being right so many are."""
    rng = np.random.default_rng(2)
    difference = np.abs(rng.normal(size=200_000) * 2)
    right = rng.random(difference.size) < 1 / (1 + np.exp(-difference))
    signed = jnp.asarray(np.where(right, difference, -difference), jnp.float32)[None]
    zero = jnp.zeros_like(signed)
    told = calibration.told(sums([Compared(signed, zero, zero, zero + 1)]))
    assert told["calibration_error"] < 0.005
    # Twice as sure as it may be: the share that is right stays.
    sure = calibration.told(sums([Compared(2 * signed, zero, zero, zero + 1)]))
    assert sure["calibration_error"] > 0.05


def test_certainty_and_ties() -> None:
    chosen, zero = jnp.asarray([[100.0, 0.0, 0.0]]), jnp.zeros((1, 3))
    told = calibration.told(sums([Compared(chosen, zero, zero, zero + 1)]))
    assert told["calibration"] == [[0.5, 0.5, 2], [1.0, 1.0, 1]] and told["calibration_error"] == 0


def test_other_objectives_have_none() -> None:
    other = Tokens(tiny_training.make().model, None)
    assert calibration.added(other) is other
    assert calibration.told({"loss": np.ones(2)}) == {}


@pytest.mark.parametrize("cut", [1, 4])
def test_an_evaluation_adds_up_its_batches(cut: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration.Calibrated, "__call__", lambda self, params, batch, rng: self.of_pairs(Compared(**batch)))
    model = tiny_training.make().model
    evaluate, pairs = metrics.make_eval(Rewards(model, 0.0, 1.0, ()), model, None, "pairs"), draw(3)
    row = evaluate({}, [{name: array[start::cut] for name, array in pairs._asdict().items()} for start in range(cut)])
    there = np.asarray(pairs.there) > 0
    error, bins = oracle(np.asarray(pairs.chosen)[there], np.asarray(pairs.rejected)[there])
    np.testing.assert_allclose(row["calibration_error"], error, rtol=1e-6)
    assert [each[2] for each in row["calibration"]] == [each[2] for each in bins]
    assert row["pairs"] == there.sum() and not any(name.startswith("calibration_") for name in row if name != "calibration_error")
