"""Losses of preferences and their gradients against those of TRL (golden/make_preferences.py), and what they are at known points."""

import json
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.objectives import preference_losses
from jaxllm.objectives.preference_losses import Answers, How

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "preferences.json").read_text(encoding="utf-8"))
PAIRS = {**preference_losses.LOSSES, "orpo": preference_losses.orpo, "simpo": preference_losses.simpo}
SETTINGS = {
    "cdpo": How(0.1, label_smoothing=0.2),
    "robust": How(0.1, label_smoothing=0.2),
    "simpo": How(2.0, margin=0.5),
}


def answers(half: slice) -> Answers:
    log_p, reference = (np.array(GOLDEN[name], np.float32)[half] for name in ("log_p", "reference"))
    return Answers(jnp.asarray(log_p), jnp.asarray(reference), jnp.asarray(np.array(GOLDEN["tokens"], np.float32)[half]))


NUMBER = len(GOLDEN["log_p"]) // 2
CHOSEN, REJECTED = answers(slice(NUMBER)), answers(slice(NUMBER, None))


def assert_near(actual: Any, expected: Any) -> None:
    """1e-6 of the value, or of 1 where it is smaller."""
    np.testing.assert_allclose(np.asarray(actual, np.float64), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", PAIRS)
def test_losses_of_pairs_and_their_gradients_are_those_of_trl(name: str) -> None:
    expected, how = np.array(GOLDEN["pairs"][name]), SETTINGS.get(name, How(GOLDEN["beta"]))

    def total(chosen: jax.Array, rejected: jax.Array) -> Any:
        found = PAIRS[name](CHOSEN._replace(log_p=chosen), REJECTED._replace(log_p=rejected), how)
        return jnp.sum(found), found

    (_, found), gradients = jax.value_and_grad(total, (0, 1), has_aux=True)(CHOSEN.log_p, REJECTED.log_p)
    assert found.dtype == jnp.float32
    assert_near(found, expected[:, 0])
    # TRL's of these two are with respect to the means.
    scale = [CHOSEN.tokens, REJECTED.tokens] if name in ("orpo", "simpo") else [1, 1]
    for gradient, tokens, column in zip(gradients, scale, (1, 2), strict=True):
        assert_near(gradient * tokens, expected[:, column])


@pytest.mark.parametrize("case", GOLDEN["kto"], ids=lambda case: f"shift {case['shift']}")
def test_losses_of_single_answers_are_those_of_trl(case: dict[str, Any]) -> None:
    how, is_good = How(GOLDEN["beta"], undesirable=1.5), jnp.asarray(case["labels"])

    def mean(log_p: jax.Array) -> tuple[jax.Array, jax.Array]:
        # Each mismatched answer is likelier by `shift` than the reference says.
        kl = preference_losses.divergence(jnp.sum(log_p - log_p + case["shift"]), jnp.float32(NUMBER))
        return jnp.mean(preference_losses.kto(CHOSEN._replace(log_p=log_p), is_good, kl, how)), kl

    (found, kl), gradient = jax.value_and_grad(mean, has_aux=True)(CHOSEN.log_p)
    assert_near(kl, case["kl"])
    assert_near(found, case["loss"])
    assert_near(gradient, case["gradients"])


def test_the_divergence_has_no_gradient_and_is_not_below_zero() -> None:
    value, slope = jax.value_and_grad(preference_losses.divergence)(jnp.float32(6), jnp.float32(4))
    assert (value, slope) == (1.5, 0)
    assert preference_losses.divergence(jnp.float32(-6), jnp.float32(4)) == 0
    assert preference_losses.divergence(jnp.float32(0), jnp.float32(0)) == 0


def test_a_model_that_is_its_reference_has_the_loss_of_no_preference() -> None:
    same = CHOSEN._replace(log_p=CHOSEN.reference), REJECTED._replace(log_p=REJECTED.reference)
    expected = {"sigmoid": math.log(2), "cdpo": math.log(2), "robust": math.log(2), "hinge": 1.0, "ipo": 25.0}
    for name, loss in preference_losses.LOSSES.items():
        np.testing.assert_allclose(loss(*same, SETTINGS.get(name, How(0.1))), expected[name], rtol=1e-6)


def test_robust_is_unbiased_where_so_many_labels_are_wrong() -> None:
    # Chowdhury et al. 2024: the mean over flipped labels is the loss without noise.
    how = How(0.1, label_smoothing=0.2)
    kept, flipped = (np.asarray(preference_losses.robust(*pair, how)) for pair in ((CHOSEN, REJECTED), (REJECTED, CHOSEN)))
    np.testing.assert_allclose(0.8 * kept + 0.2 * flipped, preference_losses.sigmoid(CHOSEN, REJECTED, how), rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("mean", [0.0, -1e-8, -1e-5, -0.6931, -0.6932, -20.0, -200.0])
def test_odds_are_exact_and_finite_near_both_ends(mean: float) -> None:
    value, slope = jax.value_and_grad(preference_losses._log_odds)(jnp.float32(mean))
    x = np.float64(np.float32(min(mean, preference_losses.CERTAIN)))
    np.testing.assert_allclose(value, x - np.log(-np.expm1(x)), rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(slope, 0 if mean > preference_losses.CERTAIN else -1 / np.expm1(x), rtol=1e-6)
